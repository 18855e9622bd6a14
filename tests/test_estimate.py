"""Dry runs: what they foretell comes true, and they touch nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import sentences, tiny_config
from safetensors import safe_open
from transformers import PreTrainedTokenizerFast

from fffconvert import estimate as module
from fffconvert.cli import main
from fffconvert.errors import UserError
from fffconvert.estimate import COPIES_WHILE_FITTING, Workload, estimate, seconds_of, seconds_to_fit
from fffconvert.recipe import Init
from fffconvert.tree import TreeShape

TREE = TreeShape(2, 4)


@pytest.fixture(autouse=True)
def small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLES", (64, 128))
    monkeypatch.setattr(module, "LENGTH", 16)


@pytest.fixture
def home(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    transformers.BertForMaskedLM(tiny_config()).save_pretrained("dense")  # its output shares the embeddings
    tokenizer.save_pretrained("dense")
    Path("own.txt").write_text("\n".join(sentences(60)), encoding="utf-8")
    return tmp_path


def numbers_in(folder: str) -> int:
    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - no mapping


def test_what_is_foretold_comes_true(home: Path) -> None:
    options = ("--depth", "2", "--leaf-width", "4", "--trunk", "3", "--calibration", "own.txt")
    convert = ["convert", "dense", "student", *options, "--calibration-tokens", "300"]
    there = sorted(home.rglob("*"))
    dry = CliRunner().invoke(main, [*convert, "--dry-run", "--json", "dry.json"])
    assert dry.exit_code == 0, dry.output
    assert sorted(home.rglob("*")) == sorted([*there, home / "dry.json"]), "only what --json asked for"
    assert "Nothing was written" in dry.output
    assert CliRunner().invoke(main, convert).exit_code == 0
    found = json.loads(Path("dry.json").read_text())
    for when, folder in (("before", "dense"), ("after", "student")):
        assert found[f"parameters_{when}"] == numbers_in(folder)
        header = Path(folder, "model.safetensors").stat().st_size - found[f"bytes_{when}"]
        assert 0 < header < 10_000
    assert (found["n_layers"], found["active_neurons"], found["dense_neurons"]) == (2, 8, 32)
    assert found["share"] == 8 / 32
    assert set(found["seconds"]) == {"calibration", "trees"}
    assert all(seconds > 0 for seconds in found["seconds"].values())


def test_dry_run_of_a_recipe(home: Path) -> None:
    recipe = {"model": "dense", "text": "own.txt", "held_out": 10, "tree": {"depth": 2, "leaf_width": 4}}
    Path("own.yaml").write_text(json.dumps({**recipe, "controls": ["removed", "narrow"]}))
    there = sorted(home.rglob("*"))
    dry = CliRunner().invoke(main, ["run", "own.yaml", "--output", "made", "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert sorted(home.rglob("*")) == there
    assert "active per token" in dry.output
    assert "time: distillation" in dry.output


def test_a_dry_run_refuses_more_leaves_than_there_are_tokens(home: Path) -> None:
    Path("own.yaml").write_text(json.dumps({"model": "dense", "text": "own.txt", "held_out": 10}))
    dry = CliRunner().invoke(
        main, ["run", "own.yaml", "--output", "made", "--dry-run", "--set", "tree={depth: 9, leaf_width: 1}"]
    )
    assert dry.exit_code == 1
    assert "depth 9 has 512 leaves" in dry.output


def test_a_head_that_chooses_among_texts_is_foretold() -> None:
    state = torch.get_rng_state()
    found = estimate(transformers.BertForMultipleChoice, tiny_config(), TREE, "inputs", Workload(100))
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert torch.equal(torch.get_rng_state(), state)


def test_dry_run_with_a_head_that_is_still_to_be_made(home: Path) -> None:
    lines = [f"{text},{'good' in text}" for text in sentences(40)]
    Path("own.csv").write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    recipe = {"model": "dense", "data": {"path": "own.csv"}, "held_out": 10, "finetune": {"epochs": 2}}
    Path("own.yaml").write_text(json.dumps({**recipe, "tree": {"depth": 2, "leaf_width": 4}}))
    arguments = ["run", "own.yaml", "--output", "made", "--dry-run", "--json", "dry.json"]
    dry = CliRunner().invoke(main, arguments)
    assert dry.exit_code == 0, dry.output
    found = json.loads(Path("dry.json").read_text())
    head = transformers.BertForSequenceClassification(tiny_config(num_labels=2))
    assert found["parameters_before"] == sum(tensor.numel() for tensor in head.parameters())
    assert set(found["seconds"]) == {"calibration", "trees", "fine-tuning", "distillation"}


def test_time_and_memory_grow_with_the_workload() -> None:
    def found(**workload: int) -> module.Estimate:
        return estimate(transformers.BertModel, tiny_config(), TREE, "inputs", Workload(**workload))

    few, many = found(calibration_tokens=1000), found(calibration_tokens=1_000_000)
    assert many.memory_bytes - few.memory_bytes == COPIES_WHILE_FITTING * 999_000 * 16 * 4
    assert many.seconds["calibration"] > 10 * few.seconds["calibration"]
    short, trained = found(calibration_tokens=10), found(calibration_tokens=10, distill_tokens=1000)
    learning = 3 * short.parameters_after * 4
    assert trained.memory_bytes - short.memory_bytes == learning - COPIES_WHILE_FITTING * 10 * 16 * 4


def test_glu_counts_in_neurons_with_gates() -> None:
    """Of three vectors: a router is one, a linear neuron two."""
    head, config = transformers.ModernBertForSequenceClassification, tiny_config("modernbert")
    made = estimate(head, config, replace(TREE, linear=True), "random", Workload(calibration_tokens=64))
    assert made.active_neurons == pytest.approx((2 * 4 + 2) / 3)
    assert made.share == pytest.approx((2 * 4 + 2) / 3 / 32)


def test_shared_ffn_is_fitted_on_all_its_uses() -> None:
    head = transformers.AlbertForSequenceClassification
    made_of = {
        n_layers: estimate(
            head,
            tiny_config("albert", num_hidden_layers=n_layers),
            TREE,
            "random",
            Workload(calibration_tokens=64),
        )
        for n_layers in (4, 8)
    }
    assert {made.n_layers for made in made_of.values()} == {2}
    assert made_of[8].memory_bytes - made_of[4].memory_bytes == (2 + COPIES_WHILE_FITTING) * 2 * 64 * 16 * 4


def test_an_ffn_of_several_that_layers_share_is_used_as_often() -> None:
    config = tiny_config("albert", num_hidden_layers=6, num_hidden_groups=3, inner_group_num=2)
    made = estimate(transformers.AlbertModel, config, TREE, "random", Workload(calibration_tokens=64))
    once = estimate(
        transformers.AlbertModel,
        tiny_config("albert", num_hidden_layers=3, num_hidden_groups=3, inner_group_num=2),
        TREE,
        "random",
        Workload(calibration_tokens=64),
    )
    assert made.n_layers == 6
    assert made.memory_bytes - once.memory_bytes == (6 * 2 + COPIES_WHILE_FITTING) * 64 * 16 * 4


def test_a_model_may_read_less_than_it_is_timed_on() -> None:
    config = tiny_config("roberta", max_position_embeddings=12)
    made = estimate(transformers.RobertaModel, config, TREE, "random", Workload(calibration_tokens=64))
    assert made.n_layers == 2


def test_half_precision_is_half_the_file_until_it_is_trained_and_no_less_memory() -> None:
    def found(dtype: torch.dtype, workload: Workload) -> module.Estimate:
        return estimate(transformers.BertModel, tiny_config(dtype=dtype), TREE, "inputs", workload)

    for workload, ratio in ((Workload(100), 2), (Workload(100, distill_tokens=10), 1)):
        half, whole = found(torch.float16, workload), found(torch.float32, workload)
        assert half.bytes_after * ratio == whole.bytes_after
        assert half.memory_bytes >= whole.memory_bytes
    assert half.bytes_before * 2 == whole.bytes_before


def test_each_control_is_timed_by_its_own_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "seconds_to_fit", lambda _ffn, shape, _init, _n: float(shape.n_leaves))
    monkeypatch.setattr(module, "seconds_of", lambda *_, **__: 0.0)

    def trees(*controls: tuple[TreeShape, Init]) -> float:
        workload = Workload(100, controls=controls)
        return estimate(transformers.BertModel, tiny_config(), TREE, "inputs", workload).seconds["trees"]

    n_layers = 2
    assert trees() == n_layers * 4
    assert trees((TreeShape(0, 5), "inputs"), (TREE, "random")) == n_layers * (4 + 1 + 4)


def test_a_fit_is_timed_as_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 seconds in itself and a hundredth for each token."""
    sizes = iter([3 + 0.64, 3 + 1.28])
    monkeypatch.setattr(module, "seconds_of", lambda *_, **__: next(sizes))

    class FFN:
        d_model = 4

    assert seconds_to_fit(FFN(), TREE, "inputs", 1000) == pytest.approx(13)  # type: ignore[arg-type]


def test_seconds_are_the_better_of_two_after_a_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    clock = iter([0.0, 3.0, 10.0, 12.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    assert seconds_of(lambda: calls.append(1)) == 2
    assert len(calls) == 3


def test_what_cannot_be_converted_is_refused(home: Path) -> None:
    from fffconvert.families import FAMILIES
    from fffconvert.modeling import config_class

    converted = config_class(FAMILIES["bert"])(fff=TREE.to_dict())
    with pytest.raises(UserError, match="converted already"):
        estimate(transformers.BertModel, converted, TREE, "inputs", Workload(100))
    wide = CliRunner().invoke(main, ["convert", "dense", "no", "--leaf-width", "99", "--dry-run"])
    assert wide.exit_code == 1
    assert "tree.leaf_width is 99; expected at most 32 for this model" in wide.output
