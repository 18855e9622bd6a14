"""The whole story in small: every shipped recipe, what it reports, and what a run survives."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import sentences, tiny_config
from datasets import Dataset
from processes import finish, in_processes, start, wait_until
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    pipeline,
    set_seed,
)

from fffconvert import pipeline as pipeline_module
from fffconvert import students, training
from fffconvert.checkpoint import load
from fffconvert.comparison import scores_of_teacher
from fffconvert.errors import NotWritten, UserError
from fffconvert.pipeline import Result, run
from fffconvert.recipe import Recipe, Training, load_recipe
from fffconvert.tree import TreeShape

pytestmark = pytest.mark.usefixtures("quick_latency")

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
ALIKE = {f"bert-base-{task}" for task in ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "wnli")}
TINY = (
    "tree={depth: 2, leaf_width: 2}",
    "calibration_tokens=300",
    "train_rows=32",
    "held_out=20",
    "distill={epochs: 1, batch_size: 8, checkpoint_every: 2}",
)
TINY_FINETUNE = "finetune={epochs: 1, batch_size: 8, checkpoint_every: 2}"
SCORE_KEYS = set(
    "task metric score teacher_score retention agreement hidden_error active_neurons dense_neurons share".split()  # noqa: SIM905
)


@pytest.fixture
def base(folder_of: Callable[..., str]) -> str:
    """The folder of a tiny encoder, in place of BERT-base."""
    set_seed(0)
    return folder_of(BertModel(tiny_config(initializer_range=0.5)).eval(), "base")


@pytest.fixture
def recipe(classifier: BertForSequenceClassification, folder_of: Callable[..., str]) -> Recipe:
    """Converts a classifier for SST-2 as it is, without a control."""
    return Recipe(
        model=folder_of(classifier),
        task="sst2",
        tree=TreeShape(depth=2, leaf_width=2),
        calibration_tokens=300,
        train_rows=32,
        distill=Training(epochs=1, batch_size=8, checkpoint_every=2),
    )


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def interrupt(
    recipe: Recipe,
    output: Path,
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    ends: Callable[..., None] = interrupted,
) -> None:
    """Ends a run as Ctrl-C does, where it comes to one of the functions that the pipeline calls."""
    with monkeypatch.context() as patched:
        patched.setattr(students if hasattr(students, stage) else pipeline_module, stage, ends)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, output, data_dir=data_dir)


# ---- Every recipe that is shipped


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, id=file.stem, marks=[pytest.mark.slow] if file.stem in ALIKE else [])
        for file in RECIPES
    ],
)
def test_shipped_recipe_runs_tiny(
    file: Path, base: str, glue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(sentences(100)), encoding="utf-8")
    recipe = load_recipe(file, TINY)
    changes = {"model": base, "text": str(text) if recipe.text else None}
    if recipe.finetune is not None:
        changes["finetune"] = replace(recipe.finetune, epochs=1, batch_size=8)
    recipe = replace(recipe, **changes)
    result = run(recipe, tmp_path / "out", data_dir=glue)
    said = " ".join(capsys.readouterr().err.split())
    assert ("only a part of the split" in said) == (recipe.task == "mnli")
    check_report(result, recipe)
    check_folder(result, recipe, tmp_path)


def check_report(result: Result, recipe: Recipe) -> None:
    report = result.report
    scores = report["scores"]
    assert set(scores) >= SCORE_KEYS
    assert scores["task"] == (recipe.task or "text")
    assert (scores["active_neurons"], scores["dense_neurons"], scores["share"]) == (3.0, 32, 3 / 32)
    for metrics in scores["metrics"].values():
        assert all(-1 <= value <= 1 for value in metrics.values())
    if recipe.task == "mnli":
        assert set(scores["metrics"]) == {"validation_matched", "validation_mismatched"}
    teacher, converted, *controls = report["table"]
    removed, narrow = controls
    assert [row["name"] for row in controls] == list(recipe.controls)
    assert teacher["active_neurons"] == 32
    assert teacher["agreement"] == pytest.approx(1)
    assert teacher["hidden_error"] == 0 < converted["hidden_error"] < removed["hidden_error"]
    assert teacher["score"] == scores["teacher_score"]
    assert converted["score"] == scores["score"]
    assert converted["before_distillation"] == report["before_distillation"]["score"]
    assert removed["active_neurons"] == 0
    assert narrow["active_neurons"] == 3, "as many as the tree has active"
    if teacher["score"] > removed["score"]:
        kept = (converted["score"] - removed["score"]) / (teacher["score"] - removed["score"])
        assert converted["value_kept"] == pytest.approx(kept)
        assert (removed["value_kept"], teacher["value_kept"]) == (0, 1)
    assert [layer["layer"] for layer in report["layers"]] == [0, 1]
    assert all(row["medians"]["dense"] > 0 for row in report["latency"]["rows"])


def check_folder(result: Result, recipe: Recipe, tmp_path: Path) -> None:
    made = {"out", "out-teacher"} if recipe.finetune else {"out"}
    assert names_in(tmp_path) - {"base", "dense", "glue", "text.txt"} == made, "nothing else is left"
    assert result.output == tmp_path / "out"
    assert result.teacher == (tmp_path / "out-teacher" if recipe.finetune else None)
    assert names_in(result.output) >= {
        "model.safetensors", "config.json", "tokenizer.json", "recipe.yaml", "report.json", "README.md",
    }  # fmt: skip
    assert load_recipe(result.output / "recipe.yaml") == recipe
    saved = json.loads((result.output / "report.json").read_text())
    assert {key: saved[key] for key in result.report} == json.loads(json.dumps(result.report))
    assert "torch" in saved["versions"]


# ---- What was written is an ordinary model


def test_the_folder_is_what_stock_transformers_loads(recipe: Recipe, glue: Path, tmp_path: Path) -> None:
    result = run(replace(recipe, finetune=Training(epochs=1, batch_size=8)), tmp_path / "out", data_dir=glue)
    ours = load(result.output)
    tokenizer = AutoTokenizer.from_pretrained(result.output)
    stock = AutoModelForSequenceClassification.from_pretrained(result.output)
    assert type(stock).__name__ == "FFFBertForSequenceClassification"
    inputs = tokenizer(sentences(5), padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(stock(**inputs).logits, ours.model(**inputs).logits)
        classify = pipeline("text-classification", str(result.output))
        answers = classify(sentences(5), batch_size=5)
        expected = stock(**inputs).logits.softmax(-1)
    assert [answer["label"] for answer in answers] == [
        ("negative", "positive")[number] for number in expected.argmax(-1).tolist()
    ]
    assert [answer["score"] for answer in answers] == pytest.approx(expected.amax(-1).tolist())
    teacher = AutoModelForSequenceClassification.from_pretrained(result.teacher)
    assert type(teacher) is BertForSequenceClassification

    stock.save_pretrained(tmp_path / "again")
    again, first = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", result.output))
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in first.items())


# ---- Killed and resumed


def run_and_hold(recipe: Recipe, output: Path, data_dir: Path, resume: bool, held: str) -> None:
    """Runs in a process of its own, and stands still once it has come to `held`, until it is killed."""

    def hold(place: str) -> None:
        if place == held:
            output.with_name(held).touch()
            time.sleep(600)

    log_step, distill = training.log_step, students.distill

    def log_and_hold(accelerator: object, parts: list[dict[str, object]], step: int, *rest, **more) -> None:
        log_step(accelerator, parts, step, *rest, **more)
        hold(f"step {step} of {'teacher' if 'loss' in parts[0] else 'student'}")

    def hold_and_distill(*arguments, **more) -> None:
        hold(f"start of {more['checkpoints'].stem}")
        distill(*arguments, **more)

    training.log_step, students.distill = log_and_hold, hold_and_distill
    run(recipe, output, data_dir=data_dir, resume=resume)


KILLED_AT = {
    "step 3 of teacher": {"recipe.yaml", "lock"},
    "step 7 of teacher": {"recipe.yaml", "lock", "teacher.checkpoints"},
    "start of converted": {"recipe.yaml", "lock", "inputs.json", "teacher", "converted.start"},
    "step 7 of student": {
        "recipe.yaml",
        "lock",
        "inputs.json",
        "teacher",
        "converted.start",
        "converted.checkpoints",
    },
    "start of removed": {"recipe.yaml", "lock", "inputs.json", "teacher", "converted", "removed.start"},
}
"""Where one run is killed, time after time, and what then lies in its work folder."""


@in_processes
def test_a_run_that_is_killed_and_resumed_makes_the_same_models(
    recipe: Recipe, glue: Path, tmp_path: Path
) -> None:
    settings = Training(epochs=1, batch_size=8, checkpoint_every=5)
    recipe = replace(recipe, train_rows=64, finetune=settings, distill=settings, controls=("removed",))
    whole = run(recipe, tmp_path / "whole", data_dir=glue)

    out, work = tmp_path / "out", tmp_path / "out.work"
    for held, left in KILLED_AT.items():
        process = start(run_and_hold, recipe, out, glue, work.exists(), held)
        wait_until((tmp_path / held).exists, process)
        process.kill()
        assert finish(process) == -signal.SIGKILL
        assert names_in(work) == left
        assert not out.exists()

    with pytest.raises(UserError, match=r"out.work holds a run that did not end; go on with --resume"):
        run(recipe, out, data_dir=glue)
    with pytest.raises(UserError, match=r"is another recipe than this one; resume with that one, or delete"):
        run(replace(recipe, seed=1), out, data_dir=glue, resume=True)
    assert names_in(work) == left, "refusing harms nothing"

    torch.manual_seed(123)  # must not matter
    resumed = run(recipe, out, data_dir=glue, resume=True)
    for ours, theirs in ((resumed.output, whole.output), (resumed.teacher, whole.teacher)):
        assert ours is not None
        assert theirs is not None
        assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    assert resumed.report["table"] == whole.report["table"]
    assert not work.exists()


def test_two_runs_do_not_write_the_same_folder(
    recipe: Recipe, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, message = tmp_path / "out", r"another run is at work in .*out.work"

    def meanwhile(*_: object, **__: object) -> None:
        left = names_in(tmp_path / "out.work")
        for resume in (True, False):
            with pytest.raises(UserError, match=message):
                run(recipe, out, data_dir=glue, resume=resume)
        assert names_in(tmp_path / "out.work") == left
        raise KeyboardInterrupt

    interrupt(recipe, out, glue, monkeypatch, "distill", meanwhile)
    assert run(recipe, out, data_dir=glue, resume=True).output.is_dir()


def test_a_run_is_not_resumed_with_another_teacher_and_loses_nothing_by_it(
    recipe: Recipe, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(recipe, tmp_path / "out", glue, monkeypatch, "distill")
    left = {"recipe.yaml", "inputs.json", "converted.start", "lock"}
    assert names_in(tmp_path / "out.work") == left
    other = load(recipe.model)
    other.model.classifier.bias.data += 0.1
    other.model.save_pretrained(recipe.model)
    with pytest.raises(
        UserError, match=r"out.work holds a run with another teacher; resume with that, or delete"
    ):
        run(recipe, tmp_path / "out", data_dir=glue, resume=True)
    assert names_in(tmp_path / "out.work") == left


def test_a_run_that_is_killed_when_all_is_written_is_cleared_away(
    recipe: Recipe, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = replace(recipe, finetune=Training(epochs=1, batch_size=8)), tmp_path / "out"
    interrupt(recipe, out, glue, monkeypatch, "finish")
    with pytest.raises(UserError, match=r"out.* exists"):
        run(recipe, out, data_dir=glue)
    with pytest.raises(UserError, match=r"out.* exists"):
        run(replace(recipe, seed=1), out, data_dir=glue, resume=True)
    (tmp_path / "out.work" / "converted").rename(tmp_path / "elsewhere")  # as if clearing up had begun
    shutil.rmtree(tmp_path / "elsewhere")
    result = run(recipe, out, data_dir=glue, resume=True)
    check_folder(result, recipe, tmp_path)
    assert result.report["latency"]["rows"]


def test_a_run_is_not_resumed_with_other_data(
    recipe: Recipe, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(recipe, tmp_path / "out", glue, monkeypatch, "distill")
    other = glue / "sst2" / "train.parquet"
    Dataset.from_parquet(str(other)).map(lambda row: {"sentence": row["sentence"] + " good"}).to_parquet(
        other
    )
    with pytest.raises(
        UserError, match=r"out.work holds a run with another data; resume with that, or delete"
    ):
        run(recipe, tmp_path / "out", data_dir=glue, resume=True)


def test_an_interrupt_leaves_what_it_tells_to_resume(
    recipe: Recipe, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(recipe, tmp_path / "out", glue, monkeypatch, "calibrate")
    assert run(recipe, tmp_path / "out", data_dir=glue, resume=True).output.is_dir()


def test_controls_are_what_they_are_called() -> None:
    asked = Recipe(
        "m", task="sst2", tree=TreeShape(2, 3), controls=("removed", "narrow", "random", "neurons")
    )
    made = students.planned_students(asked, tiny_config())
    tree = TreeShape(2, 3, linear=False)  # as wide a leaf has, in so narrow a model
    assert made == {
        "converted": (tree, "inputs"),
        "removed": (TreeShape(0, 0), "inputs"),
        "narrow": (TreeShape(0, 4), "inputs"),
        "random": (tree, "random"),
        "neurons": (tree, "neurons"),
    }


def test_an_empty_output_is_no_run_that_ended(
    recipe: Recipe, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupt(recipe, out, glue, monkeypatch, "distill")
    out.mkdir()
    result = run(recipe, out, data_dir=glue, resume=True)
    check_folder(result, recipe, tmp_path)
    assert result.report["scores"]


def test_a_disk_that_is_full_when_a_student_is_saved_costs_no_conversion(
    recipe: Recipe, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = PreTrainedModel.save_pretrained

    def full(model: PreTrainedModel, folder: Path, **rest: Any) -> None:
        if folder.parent.name == ".converted.writing":
            raise SafetensorError("No space left on device")
        write(model, folder, **rest)

    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedModel, "save_pretrained", full)
        with pytest.raises(NotWritten, match=r"could not be written .*No space left"):
            run(recipe, tmp_path / "out", data_dir=glue)
    assert "converted.start" in names_in(tmp_path / "out.work")


def test_a_full_disk_leaves_what_was_converted(
    recipe: Recipe, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Accelerator, "save_state", full)
        with pytest.raises(UserError, match=r"could not be written .*No space left"):
            run(recipe, tmp_path / "out", data_dir=glue)
    assert "converted.start" in names_in(tmp_path / "out.work")
    run(recipe, tmp_path / "out", data_dir=glue, resume=True)


def test_a_model_in_half_precision_goes_all_the_way(recipe: Recipe, glue: Path, tmp_path: Path) -> None:
    loaded = load(recipe.model)
    loaded.model.bfloat16().save_pretrained(recipe.model)
    result = run(recipe, tmp_path / "out", data_dir=glue)
    assert result.report["latency"]["rows"]
    assert load(result.output).model.dtype == torch.float32


# ---- Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "sst3"}, "task 'sst3' is unknown; expected one of cola, sst2"),
        ({"task": "stsb"}, "has 2 outputs; task stsb expects 1"),
        ({"task": None, "text": "no.txt"}, r"no.txt could not be read"),
        ({"model": "nobody/nothing"}, "nobody/nothing could not be loaded"),
        ({"tree": TreeShape(depth=1, leaf_width=33)}, "tree.leaf_width is 33; expected at most 32"),
        ({"distill": Training(learning_rate=1e30)}, "training diverged; lower the learning_rate"),
    ],
    ids=["task", "head", "text", "model", "tree", "learning_rate"],
)
def test_a_run_that_cannot_be_leaves_nothing(
    changes: dict[str, object], message: str, recipe: Recipe, glue: Path, tmp_path: Path
) -> None:
    before = names_in(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        run(replace(recipe, **changes), tmp_path / "out", data_dir=glue)
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path) == before


def test_a_run_of_a_converted_model_is_refused(recipe: Recipe, glue: Path, tmp_path: Path) -> None:
    run(recipe, tmp_path / "first", data_dir=glue)
    with pytest.raises(UserError, match="converted already; expected a dense model"):
        run(replace(recipe, model=str(tmp_path / "first")), tmp_path / "out", data_dir=glue)
    assert not (tmp_path / "out.work").exists()


def test_other_rows_to_evaluate_on_are_not_mixed_with_those_of_before(
    recipe: Recipe, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(pipeline_module, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "out", data_dir=glue)
    file = glue / "sst2" / "validation.parquet"
    Dataset.from_parquet(str(file)).select(range(10)).to_parquet(file)
    with pytest.raises(UserError, match=r"holds a run with another set of evaluation rows; resume with that"):
        run(recipe, tmp_path / "out", data_dir=glue, resume=True)


def test_a_tracker_that_is_unknown_is_refused_before_anything_is_made(
    recipe: Recipe, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(students, "build", interrupted)
    with pytest.raises(UserError, match="tracker 'nosuch' is unknown to Accelerate"):
        run(recipe, tmp_path / "out", data_dir=glue, log_with="nosuch")
    assert not (tmp_path / "out.work").exists()


def test_a_run_that_has_ended_may_be_resumed(recipe: Recipe, glue: Path, tmp_path: Path) -> None:
    tuned = replace(recipe, finetune=Training(epochs=1))
    first = run(tuned, tmp_path / "out", data_dir=glue)
    before = names_in(tmp_path)
    assert run(tuned, tmp_path / "out", data_dir=glue, resume=True) == first
    assert names_in(tmp_path) == before
    assert "# out-teacher" in (tmp_path / "out-teacher" / "README.md").read_text()


def test_a_teacher_may_lie_beside_the_output_where_none_is_made(
    recipe: Recipe, glue: Path, tmp_path: Path
) -> None:
    Path(recipe.model).rename(tmp_path / "out-teacher")
    result = run(replace(recipe, model=str(tmp_path / "out-teacher")), tmp_path / "out", data_dir=glue)
    assert result.teacher is None
    assert (tmp_path / "out-teacher" / "model.safetensors").exists()


def test_an_output_that_is_there_is_left_alone(recipe: Recipe, glue: Path, tmp_path: Path) -> None:
    tuned = replace(recipe, finetune=Training(epochs=1))
    for name, asked in (("out", recipe), ("out-teacher", tuned)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
        with pytest.raises(UserError, match=rf"{name} exists and is not empty; name a new folder"):
            run(asked, tmp_path / "out", data_dir=glue)
        assert names_in(tmp_path / name) == {"mine.txt"}
        (tmp_path / name).rename(tmp_path / f"kept-{name}")
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"out.work exists and is not empty; name a new folder"):
        run(recipe, tmp_path / "out", data_dir=glue)
    assert names_in(tmp_path / "out.work") == {"mine.txt"}
    (tmp_path / "out.work").rename(tmp_path / "kept.work")
    with pytest.raises(UserError, match=r"out.work holds no run to resume"):
        run(recipe, tmp_path / "out", data_dir=glue, resume=True)
    assert not (tmp_path / "out.work").exists()


def test_a_teacher_below_nothing_keeps_nothing() -> None:
    scores = {"dense_neurons": 32, "teacher_score": -0.2}
    assert scores_of_teacher({"converted": {"scores": scores}})["retention"] is None
