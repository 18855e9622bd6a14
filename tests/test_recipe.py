"""Recipes: strict, in YAML and back, and the ones that are shipped."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fffconvert.errors import UserError
from fffconvert.recipe import FINETUNE, Recipe, Training, load_recipe
from fffconvert.tasks import TASKS
from fffconvert.tree import TreeShape

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
SHORTEST = {"model": "some/model", "task": "sst2"}


@pytest.fixture
def load(tmp_path: Path):
    """Writes text as a recipe and loads it."""

    def load_text(text: str | dict[str, object], *overrides: str) -> Recipe:
        file = tmp_path / "my.yaml"
        file.write_text(text if isinstance(text, str) else yaml.safe_dump(text), encoding="utf-8")
        return load_recipe(file, overrides)

    return load_text


# ---- The recipes that are shipped


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_shipped_recipe(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.task is None or recipe.task in TASKS
    assert file.read_text(encoding="utf-8").startswith("# "), "says what it is and whether it was run"
    assert recipe.controls == ("removed", "narrow")


def test_there_is_a_recipe_for_bert_base_on_every_task() -> None:
    recipes = {file.stem: load_recipe(file) for file in RECIPES}
    for task in TASKS:
        assert recipes[f"bert-base-{task}"].task == task
        assert recipes[f"bert-base-{task}"].model == "google-bert/bert-base-uncased"


# ---- What a recipe may say


def test_defaults(load) -> None:
    assert load(SHORTEST) == Recipe(model="some/model", task="sst2")
    assert load(SHORTEST).distill == Training()


def test_everything(load) -> None:
    recipe = load(
        """
        model: folder/of/a model
        task: stsb
        tree: {depth: 3, leaf_width: 4, trunk: 5, trees: 2, emitting: true, linear: false}
        init: neurons
        calibration_tokens: 100
        train_rows: 10
        held_out: 5
        finetune: {epochs: 1, learning_rate: 0.5, batch_size: 2, gradient_accumulation: 3, warmup: 0.25,
                   weight_decay: 0.125, max_grad_norm: 2, checkpoint_every: 7}
        distill: {}
        controls: [narrow]
        seed: 3
        """
    )
    assert recipe == Recipe(
        model="folder/of/a model",
        task="stsb",
        tree=TreeShape(3, 4, 5, 2, emitting=True, linear=False),
        init="neurons",
        calibration_tokens=100,
        train_rows=10,
        held_out=5,
        finetune=Training(1, 0.5, 2, 3, 0.25, 0.125, 2.0, 7),
        controls=("narrow",),
        seed=3,
    )


@pytest.mark.parametrize("text", ["2e-4", "2.0e-4", "2E-4", "0.0002", "'0.0002'"])
def test_every_way_to_write_a_small_number(text: str, load) -> None:
    """YAML 1.1 reads `2e-4`, without a point, as text."""
    assert load(f"model: m\ntask: sst2\ndistill: {{learning_rate: {text}}}").distill.learning_rate == 2e-4
    assert load(SHORTEST, f"distill.learning_rate={text}").distill.learning_rate == 2e-4


def test_a_whole_number_serves_where_a_number_is_asked_for(load) -> None:
    norm = load(SHORTEST, "distill.max_grad_norm=3").distill.max_grad_norm
    assert norm == 3.0
    assert type(norm) is float


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("m", task="sst2"),
        Recipe("m", text="file.txt", controls=("removed", "narrow"), init="random", train_rows=3),
        Recipe(
            "m", task="cola", finetune=FINETUNE, tree=TreeShape(2, 0, trunk=1, emitting=True, linear=True)
        ),
        Recipe("yes: 'no' # \n…", task="rte", distill=Training(learning_rate=1e-9, epochs=12)),
        Recipe("m", "rte", min_retention=np.float32(0.5), distill=Training(learning_rate=np.float64(1e-3))),
    ],
    ids=["defaults", "text", "tree", "awkward_text", "numpy"],
)
def test_yaml_and_back(recipe: Recipe, load) -> None:
    assert load(recipe.to_yaml()) == recipe


def test_yaml_holds_every_value_even_defaults(load) -> None:
    """The recipe beside the weights must not change its meaning when a default does."""
    values = yaml.safe_load(Recipe("m", task="sst2").to_yaml())
    assert set(values) == {item.name for item in fields(Recipe)}
    assert set(values["distill"]) == {item.name for item in fields(Training)}
    assert set(values["tree"]) == {item.name for item in fields(TreeShape)}


# ---- Overrides


def test_overrides_win_and_reach_inside(load) -> None:
    text = {**SHORTEST, "tree": {"depth": 7, "leaf_width": 12}, "seed": 1, "controls": ["narrow"]}
    recipe = load(text, "tree.depth=2", "distill.epochs=5", "seed=2", "seed=4", "controls=[]", "model=a=b")
    assert recipe.tree == TreeShape(2, 12)
    assert recipe.distill.epochs == 5
    assert recipe.seed == 4, "the last one wins"
    assert recipe.controls == ()
    assert recipe.model == "a=b"


def test_an_override_can_take_a_section_away(load) -> None:
    assert load({**SHORTEST, "finetune": {"epochs": 2}}, "finetune=null").finetune is None
    assert load({**SHORTEST, "finetune": None}, "finetune.epochs=2").finetune == replace(FINETUNE, epochs=2)


def test_an_override_leaves_what_repeats_its_section(load) -> None:
    recipe = load("model: m\ntask: sst2\nfinetune: &a {epochs: 1}\ndistill: *a\n", "finetune.epochs=9")
    assert recipe.finetune == replace(FINETUNE, epochs=9)
    assert recipe.distill == Training(epochs=1)


def test_keys_may_be_merged_from_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(
        "model: m\ntask: sst2\nfinetune: &all {epochs: 4}\ndistill: {<<: *all, batch_size: 8}\n",
        encoding="utf-8",
    )
    assert load_recipe(file).distill == Training(epochs=4, batch_size=8)


# ---- What it may not: each mistake has one line that names the key and what was expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dept": 3}, r"my.yaml: unknown key 'dept'; expected one of model, task,"),
        ({"modle": "x"}, r"my.yaml: unknown key 'modle'; did you mean 'model'\?"),
        ({3: "x"}, r"my.yaml: unknown key 3; expected one of"),
        ({"tree": {"dpeth": 3}}, r"my.yaml: tree: unknown key 'dpeth'; did you mean 'depth'\?"),
        ({"tree": {"depth": 3}}, r"my.yaml: tree: key 'leaf_width' is missing"),
        ({"controls": ["narrow", "narrow"]}, r"controls are narrow, narrow; expected each once"),
        ({"tree": None}, r"my.yaml: tree is None; expected keys such as depth, leaf_width"),
        ({"tree": 7}, r"my.yaml: tree is 7; expected keys such as depth, leaf_width"),
        ({"tree": {"depth": 25, "leaf_width": 1}}, r"tree.depth is 25; .* from 0 to 20"),
        ({"tree": {"depth": 2, "leaf_width": -1}}, r"tree.leaf_width is -1; .* at least 0"),
        ({"tree": {"depth": 2.0, "leaf_width": 1}}, r"tree: depth is 2.0; expected a whole number"),
        ({"tree": {"depth": True, "leaf_width": 1}}, r"tree: depth is True; expected a whole number"),
        (
            {"tree": {"depth": 2, "leaf_width": 1, "linear": 1}},
            r"tree: linear is 1; expected true or false",
        ),
        ({"model": 5}, r"my.yaml: model is 5; expected text"),
        ({"model": None}, r"my.yaml: model is None; expected text"),
        ({"init": "kmeans"}, r"my.yaml: init is 'kmeans'; expected one of inputs, neurons, random"),
        ({"init": ["inputs"]}, r"my.yaml: init is \['inputs'\]; expected one of"),
        ({"task": None}, r"my.yaml: a recipe names exactly one of `task` .*, `text`"),
        ({"text": "x.txt"}, r"my.yaml: a recipe names exactly one of `task` .*, `text`"),
        ({"task": None, "text": "x.txt", "finetune": {}}, r"my.yaml: `finetune` needs a `task`"),
        ({"calibration_tokens": 0}, r"calibration_tokens is 0; expected a whole number of at least 1"),
        ({"calibration_tokens": "many"}, r"calibration_tokens is 'many'; expected a whole number"),
        ({"train_rows": -5}, r"train_rows is -5; expected a whole number of at least 1"),
        ({"held_out": 0}, r"held_out is 0; expected a whole number of at least 1"),
        ({"seed": -1}, r"seed is -1; expected"),
        ({"seed": 2**64}, r"seed is 18446744073709551616; expected"),
        ({"controls": "removed"}, r"my.yaml: controls is 'removed'; expected a list"),
        ({"controls": ["removed", "wide"]}, r"controls is 'wide'; expected one of removed, narrow"),
        ({"controls": None}, r"my.yaml: controls is None; expected a list"),
        ({"distill": None}, r"my.yaml: distill is None; expected keys such as epochs"),
        ({"distill": [1]}, r"my.yaml: distill is \[1\]; expected keys such as epochs"),
        ({"distill": {"epochs": 0}}, r"my.yaml: distill: epochs is 0; expected a whole number of at least 1"),
        ({"distill": {"epochs": "two"}}, r"my.yaml: distill: epochs is 'two'; expected a whole number"),
        ({"distill": {"epochs": 1.5}}, r"my.yaml: distill: epochs is 1.5; expected a whole number"),
        ({"distill": {"batch_size": -1}}, r"distill: batch_size is -1; expected a whole number"),
        ({"distill": {"gradient_accumulation": 0}}, r"gradient_accumulation is 0; expected a whole number"),
        ({"distill": {"checkpoint_every": 0}}, r"checkpoint_every is 0; expected a whole number"),
        ({"distill": {"learning_rate": "fast"}}, r"distill: learning_rate is 'fast'; expected a number"),
        ({"distill": {"learning_rate": True}}, r"distill: learning_rate is True; expected a number"),
        ({"distill": {"learning_rate": 0}}, r"distill: learning_rate is 0.0; expected a .*number above 0"),
        ({"distill": {"learning_rate": "nan"}}, r"distill: learning_rate is nan; expected"),
        ({"distill": {"learning_rate": "inf"}}, r"distill: learning_rate is inf; expected"),
        ({"distill": {"max_grad_norm": -1}}, r"max_grad_norm is -1.0; expected a .*number above 0"),
        ({"distill": {"weight_decay": -1}}, r"weight_decay is -1.0; expected"),
        ({"distill": {"weight_decay": "nan"}}, r"weight_decay is nan; expected"),
        ({"distill": {"warmup": 1}}, r"warmup is 1.0; expected a share of at least 0 and below 1"),
        ({"finetune": {"learningrate": 1}}, r"finetune: unknown key 'learningrate'; .* 'learning_rate'\?"),
    ],
    ids=lambda value: str(value).replace(" ", "") if isinstance(value, dict) else "",
)
def test_a_mistake_is_named(changes: dict[str, object], message: str, load) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load({**SHORTEST, **changes})
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("my.yaml: "), "says which recipe"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"controls": ("remove",)}, r"controls are \('remove',\); expected a tuple of some of removed, "),
        ({"controls": "removed"}, r"controls are 'removed'; expected a tuple of some of removed, "),
        ({"controls": None}, r"controls are None; expected a tuple of some of removed, "),
        ({"init": "kmeans"}, r"init is 'kmeans'; expected one of inputs, neurons, random"),
        ({"held_out": 0.1}, r"held_out is 0.1; expected a whole number of at least 1"),
        ({"train_rows": True}, r"train_rows is True; expected a whole number of at least 1"),
        ({"seed": 1.5}, r"seed is 1.5; expected a whole number from 0 to 2147483647"),
        ({"seed": True}, r"seed is True; expected a whole number from 0"),
    ],
)
def test_a_mistake_in_python_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe("m", task="sst2", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 1.5}, r"epochs is 1.5; expected a whole number of at least 1"),
        ({"epochs": "3"}, r"epochs is '3'; expected a whole number of at least 1"),
        ({"learning_rate": None}, r"learning_rate is None; expected a number"),
        ({"weight_decay": "0.1"}, r"weight_decay is '0.1'; expected a number"),
    ],
)
def test_a_mistaken_training_in_python_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Training(**changes)


@pytest.mark.parametrize("key", ["model", "task"])
def test_a_missing_key_is_named(key: str, load) -> None:
    with pytest.raises(UserError, match=key):
        load({name: value for name, value in SHORTEST.items() if name != key})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "my.yaml holds no keys"),
        ("# nothing", "my.yaml holds no keys"),
        ("- model: m", "my.yaml holds no keys"),
        ("just text", "my.yaml holds no keys"),
        ("model: [unclosed", "my.yaml is not YAML: .* line 1"),
        ("model: m\n\ttask: sst2", "my.yaml is not YAML"),
        ("model: 2024-13-01", "my.yaml is not YAML: month must be in 1..12"),
        ("model: !!python/object/apply:os.getcwd []", "my.yaml is not YAML"),
    ],
    ids=["empty", "comment", "list", "text", "unclosed", "tab", "date", "code"],
)
def test_a_file_that_is_no_recipe(text: str, message: str, load) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(text)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.yaml could not be read \(No such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"could not be read \(Is a directory\); expected a recipe in YAML"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(UserError, match=r"binary.yaml is not YAML"):
        load_recipe(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set seed: expected key=value"),
        ("sead=1", "unknown key 'sead'; did you mean 'seed'"),
        ("=1", "unknown key ''"),
        ("tree.dept=1", "tree: unknown key 'dept'; did you mean 'depth'"),
        ("seed.x=1", "--set seed.x=1: seed holds no keys of its own"),
        ("controls=[narrow", r"--set controls=\[narrow: \[narrow is not YAML"),
        ("distill.epochs=", "distill: epochs is None; expected a whole number"),
        ("task=2024-13-01", "--set task=2024-13-01: 2024-13-01 is not YAML"),
        (f"distill.learning_rate={10**400}", "distill: learning_rate is 1000.*; expected a number"),
        ("distill.learning_rate=fast", "distill: learning_rate is 'fast'; expected a number"),
    ],
)
def test_a_mistaken_override_is_named(override: str, message: str, load) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load({**SHORTEST, "seed": 1}, override)
    assert "\n" not in str(caught.value)


def test_a_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: a\ntask: sst2\nseed: 1\nseed: 2\n")
    with pytest.raises(UserError, match=r"mine.yaml is not YAML: key 'seed' comes twice .*line 4"):
        load_recipe(file)


def test_one_column_of_text_needs_no_list(load) -> None:
    assert load({"model": "m", "data": {"path": "own.csv", "text": "review"}}).data.text == ("review",)


def test_data_without_a_path_is_not_the_folder_here(load) -> None:
    with pytest.raises(UserError, match=r"data.path is empty; expected a file, a folder, or the id"):
        load({"model": "m", "data": {"path": ""}})
