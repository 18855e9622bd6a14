"""The command line from outside: every command, and one clear line for whatever goes wrong."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import commands, sentences, tiny_config
from datasets import Dataset
from processes import finish, in_processes, start_command, wait_until
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2Model,
    set_seed,
)

import fffconvert
from fffconvert import display, pipeline
from fffconvert.cli import main
from fffconvert.folders import locked

pytestmark = pytest.mark.usefixtures("quick_latency")

TREE = ["--depth", "2", "--leaf-width", "2", "--calibration-tokens", "300"]
QUICK = ["--epochs", "1", "--batch-size", "8"]


def call(*arguments: object) -> Result:
    """Runs a command in this process; a bug's exception is raised here."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def succeed(*arguments: object) -> str:
    """Runs a command that must do what it is asked; gives what it prints."""
    result = call(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def fail(*arguments: object) -> str:
    """Runs a command that must fail with one line; gives that line."""
    result = call(*arguments)
    assert result.exit_code not in (0, None)
    return the_error_in(result.stderr)


def the_error_in(stderr: str) -> str:
    assert "Traceback" not in stderr
    errors = [line for line in stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1, stderr
    assert errors[0].startswith("error: ")
    assert stderr.splitlines()[-1] == errors[0], "it is the last thing that is said"
    return errors[0]


@pytest.fixture
def dense(classifier: BertForSequenceClassification, folder_of: Callable[..., str]) -> str:
    return folder_of(classifier)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(sentences(100)), encoding="utf-8")
    return file


@pytest.fixture
def student(dense: str, text: Path, tmp_path: Path) -> str:
    """A converted model, made by the command."""
    succeed("convert", dense, tmp_path / "student", "--calibration", text, *TREE)
    return str(tmp_path / "student")


@pytest.fixture
def listing(tmp_path: Path) -> Callable[[], set[str]]:
    """What there is, to see that nothing was added."""
    return lambda: {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}


# ---- Every command


def test_an_output_without_a_name_is_refused_at_once(
    dense: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    (tmp_path / "recipe.yaml").write_text(f"model: {dense}\ntext: {text}\n")
    for output in (".", ".."):
        assert "name a new one" in fail("convert", dense, output, "--calibration", text, *TREE)
        assert "name a new one" in fail("run", tmp_path / "recipe.yaml", "--output", output)


def test_a_dry_run_looks_at_what_it_is_given(dense: str, tmp_path: Path) -> None:
    asked = fail("convert", dense, tmp_path / "out", "--calibration", tmp_path / "no.txt", "--dry-run")
    assert "no.txt is neither a file nor a task" in asked
    asked = fail("convert", dense, tmp_path / "out", "--data", tmp_path / "no.csv", "--dry-run")
    assert "no.csv" in asked
    (tmp_path / "empty.txt").touch()
    asked = fail("convert", dense, tmp_path / "out", "--calibration", tmp_path / "empty.txt", "--dry-run")
    assert "empty.txt is empty" in asked
    (tmp_path / "few.txt").write_text("a good film\n" * 5)
    asked = fail(
        "convert", dense, tmp_path / "out", "--calibration", tmp_path / "few.txt", "--depth", "5", "--dry-run"
    )
    assert "has 32 leaves and there are 25 tokens to calibrate on" in asked
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").touch()
    assert "exists and is not empty" in fail("convert", dense, tmp_path / "there", "--dry-run")


def test_texts_are_cut_at_what_a_new_teacher_can_read(dense: str, tmp_path: Path) -> None:
    rows = [{"text": "good film " * 100, "label": label} for label in ("a", "b")]
    (tmp_path / "long.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    long = ["--data", tmp_path / "long.jsonl", "--max-length", 1000]
    succeed("finetune", dense, tmp_path / "out", *long, *QUICK)


def test_labels_stand_in_one_column(dense: str, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("text,a,b\ngood,0,1\nbad,1,0\n")
    twice = ["--label-column", "a", "--label-column", "b"]
    asked = fail("finetune", dense, tmp_path / "out", "--data", tmp_path / "own.csv", *twice)
    assert "--label-column is given more than once" in asked


def test_a_teacher_is_dense_and_an_output_no_link(
    dense: str, student: str, text: Path, tmp_path: Path
) -> None:
    asked = fail("distill", student, tmp_path / "out", "--teacher", student, "--text", text)
    assert "converted already; expected a dense model" in asked
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    asked = fail("convert", dense, tmp_path / "link", "--calibration", text, *TREE)
    assert "is a link; name the folder itself" in asked


def test_a_teacher_with_another_tokenizer_is_refused(
    dense: str, text: Path, folder_of: Callable[..., str], classifier: BertForSequenceClassification
) -> None:
    other = folder_of(classifier, "other")
    file = Path(other, "tokenizer.json")
    file.write_text(file.read_text().replace('"Lowercase"', '"NFC"'))
    line = fail("evaluate", dense, "--teacher", other, "--text", text)
    assert "the student's tokenizer reads a text as other tokens than the teacher's" in line


def test_a_teacher_of_another_size_is_refused(dense: str, text: Path, folder_of: Callable[..., str]) -> None:
    deep = folder_of(BertForSequenceClassification(tiny_config(num_hidden_layers=3)), "deep")
    assert "num_hidden_layers is 2 in the student and 3 in the teacher" in fail(
        "evaluate", dense, "--text", text, "--teacher", deep
    )


def test_all_processes_but_the_first_are_done_when_the_run_is(
    dense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {dense}\ntask: sst2\n")
    result = pipeline.Result(tmp_path / "out", None, {"table": [], "scores": {"retention": 0.5}})
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: result)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert succeed("run", recipe, "--output", tmp_path / "out", "--min-retention", 0.9) == ""


@pytest.mark.parametrize(("name", "command"), list(commands()), ids=[name for name, _ in commands()])
def test_help_teaches(name: str, command: click.Command) -> None:
    text = succeed(*name.split(), "--help")
    assert re.search(rf"^ +fffconvert {name}\b", text, re.MULTILINE), "shows an example"
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{parameter.name} is explained"
            assert all(option in text for option in parameter.opts)
        else:
            assert parameter.make_metavar(click.Context(command)) in text


@pytest.mark.parametrize("name", list(main.commands))
def test_a_command_is_a_public_function(name: str) -> None:
    public = "export_onnx" if name == "export" else name  # for each format one
    assert callable(getattr(fffconvert, public))


def test_commands_that_report_write_json() -> None:
    reporting = {name for name, command in commands() if any(p.name == "json_file" for p in command.params)}
    assert {"run", "convert", "evaluate", "benchmark", "info", "env"} <= reporting


def test_the_whole_way_step_by_step(dense: str, glue: Path, tmp_path: Path) -> None:
    base, teacher, student, distilled = (tmp_path / name for name in ("base", "teacher", "student", "out"))
    shutil.copytree(dense, base)
    data = ["--task", "sst2", "--data-dir", glue]

    succeed("finetune", base, teacher, *data, *QUICK, "--train-rows", 40)
    found = AutoModelForSequenceClassification.from_pretrained(teacher)
    assert found.config.id2label == {0: "negative", 1: "positive"}

    file = tmp_path / "made.json"
    asked = ["--calibration", "sst2", "--data-dir", glue, *TREE, "--json", file]
    result = call("convert", teacher, student, *asked)
    assert result.exit_code == 0, result.stderr
    assert "Fit of each layer" in result.stdout
    assert "every token uses 3 of 32 neurons (9.4%) in each layer" in " ".join(result.stderr.split())
    layers = json.loads(file.read_text())["layers"]
    assert [set(layer) for layer in layers] == 2 * [{"layer", "error", "smallest_leaf", "largest_leaf"}]

    succeed("distill", student, distilled, "--teacher", teacher, *data, *QUICK)
    moved, still = (AutoModelForSequenceClassification.from_pretrained(p) for p in (distilled, student))
    assert not torch.equal(moved.classifier.weight, still.classifier.weight)
    assert not list(tmp_path.glob("*.checkpoints"))

    file = tmp_path / "scores.json"
    table = succeed("evaluate", distilled, *data, "--teacher", teacher, "--json", file)
    scores = json.loads(file.read_text())
    expected = "task metric score teacher_score retention agreement active_neurons dense_neurons share"
    assert set(scores) >= set(expected.split())
    assert (scores["task"], scores["metric"]) == ("sst2", "accuracy")
    assert (scores["active_neurons"], scores["dense_neurons"], scores["share"]) == (3.0, 32, 3 / 32)
    assert scores["retention"] == scores["score"] / scores["teacher_score"]
    assert 0 <= scores["agreement"] <= 1
    assert (scores["model"], scores["teacher"]) == (str(distilled), str(teacher))
    assert (scores["rows"], scores["max_length"]) == ({"validation": 37}, 64)  # as the model reads no more
    assert "3 of 32 neurons (9.4%)" in table

    file = tmp_path / "latency.json"
    assert "FFNs removed" in succeed("benchmark", distilled, "--against", teacher, "--json", file)
    measured = json.loads(file.read_text())["rows"]
    half = len(measured) // 2
    assert [row["what"] for row in measured] == ["layer"] * half + ["model"] * half
    assert {"dense", "converted", "FFNs removed"} <= set(measured[-1]["medians"])

    file = tmp_path / "info.json"
    assert "3 of 32 neurons (9.4%)" in succeed("info", distilled, "--json", file)
    info = json.loads(file.read_text())
    assert (info["model_type"], info["tree"]["depth"], info["active_neurons"]) == ("fff-bert", 2, 3.0)
    assert info["layers"] == layers
    assert json.loads(file.read_text())["dense_neurons"] == 32

    table = succeed("push", distilled, "user/name", "--dry-run")
    assert "Would send to user/name" in table
    assert "model.safetensors" in table


def test_run(dense: str, glue: Path, tmp_path: Path) -> None:
    recipe, file = tmp_path / "mine.yaml", tmp_path / "report.json"
    recipe.write_text("model: nobody/nothing\ntask: sst2\ntree: {depth: 1, leaf_width: 2}\n")
    settings = ["--set", "distill={epochs: 1, batch_size: 8}", "--set", "tree.depth=2"]
    printed = succeed(
        "run", recipe, "--model", dense, "--output", tmp_path / "out", "--data-dir", glue, *settings,
        "--set", "calibration_tokens=300", "--json", file,
    )  # fmt: skip
    assert "FFN value kept" in printed
    report = json.loads(file.read_text())
    assert report["scores"]["active_neurons"] == 3.0
    assert {"table", "latency", "layers", "before_distillation"} <= set(report)


def test_an_encoder(folder_of: Callable[..., str], text: Path, tmp_path: Path) -> None:
    set_seed(0)
    encoder = folder_of(BertModel(tiny_config(initializer_range=0.5)).eval())
    succeed("convert", encoder, tmp_path / "student", "--calibration", text, *TREE)
    succeed("distill", tmp_path / "student", tmp_path / "out", "--teacher", encoder, "--text", text, *QUICK)
    file = tmp_path / "scores.json"
    succeed("evaluate", tmp_path / "out", "--text", text, "--teacher", encoder, "--json", file)
    scores = json.loads(file.read_text())
    assert (scores["task"], scores["metric"], scores["teacher_score"]) == ("text", "cosine", 1.0)
    assert 0 < scores["score"] < 1


def test_env(tmp_path: Path) -> None:
    assert "kernel" in succeed("env", "--json", tmp_path / "env.json")
    found = json.loads((tmp_path / "env.json").read_text())
    assert found["torch"] == torch.__version__
    assert found["kernel reference"].startswith("available")


def test_a_result_is_written_where_a_link_leads(tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "new" / "env.json")
    assert f"there is no folder {tmp_path}/new" in fail("env", "--json", link)
    (tmp_path / "new").mkdir()
    succeed("env", "--json", link)
    assert json.loads((tmp_path / "new" / "env.json").read_text())["torch"] == torch.__version__


def test_a_result_is_kept_where_it_cannot_be_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(display, "table", closed)
    call("env", "--json", tmp_path / "env.json")
    assert json.loads((tmp_path / "env.json").read_text())["torch"] == torch.__version__


def test_a_locale_without_dashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    main(["--version"])
    display.table("–", ["→"], [["–"]])


def test_without_a_command_there_is_help() -> None:
    assert succeed() == succeed("--help")


# ---- Bad input: what is asked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--hepl", "No such option '--hepl'"),
        ("convrt a b", r"No such command 'convrt'.*\(see fffconvert --help\)"),
        ("convert", "Missing argument 'MODEL'"),
        ("convert a", "Missing argument 'OUTPUT'"),
        ("convert a b --depht 3", r"No such option '--depht'.* \(see fffconvert convert --help\)"),
        ("convert a b --depth deep", "'deep' is not a valid integer"),
        ("convert a b --depth 25", "depth is 25; expected a whole number from 0 to 20"),
        ("convert a b --depth -1", "depth is -1"),
        ("convert a b --leaf-width -1", "leaf_width is -1"),
        ("convert a b --trees 0", "trees is 0"),
        ("convert a b --init kmeans", "'kmeans' is not one of 'inputs', 'neurons', 'random'"),
        ("convert a b --seed -1", "-1 is not in the range"),
        ("convert a b --calibration-tokens 0", "0 is not in the range"),
        (
            "convert a b --depth 20",
            r"depth 20 has 1,048,576 leaves and there are 131,072 tokens .* at most 12, or",
        ),
        (
            "convert a b --depth 9 --dry-run --calibration-tokens 500",
            "expected a depth of at most 3, or more",
        ),
        ("convert a b --calibration sst3", "sst3 is neither a file nor a task"),
        ("convert a b --calibration sst2 --data c.csv", "--calibration and --data are both given"),
        ("finetune a b", "nothing to read is named; expected either `task` "),
        ("finetune a b --task sst3", "task 'sst3' is unknown; expected one of cola"),
        ("distill a b --teacher c --task sst3", "task 'sst3' is unknown; expected one of cola"),
        ("evaluate a --task sst3", "task 'sst3' is unknown; expected one of cola"),
        ("finetune a b --task sst2 --batch-size 0", "batch_size is 0; expected a whole number of at least 1"),
        ("finetune a b --task sst2 --epochs -1", "epochs is -1; expected a whole number of at least 1"),
        ("finetune a b --task sst2 --learning-rate nan", "learning_rate is nan; expected a finite number"),
        ("finetune a b --task sst2 --train-rows 0", "0 is not in the range"),
        ("distill a b", "Missing option '--teacher'"),
        ("run no.yaml --output b", "no.yaml could not be read"),
        ("env --json no/such/env.json", "there is no folder no/such"),
    ],
)
def test_what_no_command_takes(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(message, fail(*arguments.split()))
    assert not list(tmp_path.iterdir())


def test_a_misspelt_recipe(dense: str, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"model: {dense}\ntask: sst2\ndistil: {{epochs: 1}}\n")
    line = fail("run", recipe, "--output", tmp_path / "out")
    assert line == "error: mine.yaml: unknown key 'distil'; did you mean 'distill'?"


# ---- Bad input: folders


def change_config(folder: str, **changes: Any) -> None:
    file = Path(folder, "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: Path(folder, "config.json").unlink(), "has no config.json"),
        (lambda folder: Path(folder, "config.json").write_text("{no"), "not a valid JSON file"),
        (lambda folder: Path(folder, "config.json").write_text("[1]"), "could not be loaded"),
        (lambda folder: change_config(folder, model_type="nonesuch"), "nonesuch"),
        (lambda folder: change_config(folder, model_type="gpt2"), "type 'gpt2' is not supported"),
        (lambda folder: change_config(folder, architectures=["GPT2Model"]), "'GPT2Model', which is no"),
        (lambda folder: change_config(folder, architectures=[3]), "architecture 3, which is no"),
        (lambda folder: change_config(folder, architectures=None), "None, which is no model of type 'bert'; expected"),
        (lambda folder: change_config(folder, hidden_size="a"), "hidden_size"),
        (lambda folder: change_config(folder, hidden_act="nope"), "'nope'"),
        (lambda folder: change_config(folder, intermediate_size=48), r"is \[32\] in the .* \[48\] by config.json"),
        (lambda folder: change_config(folder, num_hidden_layers=3), r"weights lack bert.encoder.layer.2"),
        (lambda folder: change_config(folder, num_hidden_layers=1), "layer.1.* has no place for"),
        (lambda folder: cut(Path(folder, "model.safetensors")), "weights could not be loaded"),
        (lambda folder: Path(folder, "model.safetensors").write_bytes(b""), "weights could not be loaded"),
        (lambda folder: Path(folder, "model.safetensors").unlink(), "weights could not be loaded"),
        (lambda folder: Path(folder, "tokenizer.json").write_text("{"), "tokenizer could not be loaded"),
        (
            lambda folder: [file.unlink() for file in Path(folder).glob("tokenizer*")],
            "holds no tokenizer",
        ),
    ],
    ids=[
        "no_config", "config_no_json", "config_list", "unknown_type", "no_family", "other_architecture",
        "architecture_number", "no_architecture", "no_number", "activation", "shape", "more_layers", "fewer_layers",
        "cut_weights", "empty_weights", "no_weights", "tokenizer_no_json", "no_tokenizer",
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_read(
    spoil: Callable[[str], object],
    message: str,
    dense: str,
    text: Path,
    tmp_path: Path,
    listing: Callable[[], set[str]],
) -> None:
    spoil(dense)
    before = listing()
    assert re.search(message, fail("convert", dense, tmp_path / "out", "--calibration", text, *TREE))
    assert listing() == before


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"])
def test_weights_that_pytorch_did_not_write(content: bytes, dense: str, tmp_path: Path) -> None:
    Path(dense, "model.safetensors").unlink()
    Path(dense, "pytorch_model.bin").write_bytes(content)
    assert "its weights are not what PyTorch writes; were they cut short" in fail(
        "convert", dense, tmp_path / "out", *TREE
    )


def test_a_mistyped_folder_is_guessed(dense: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(dense)
    monkeypatch.chdir(folder.parent.parent)
    mistyped = f"{folder.parent.name[:-1]}/{folder.name}"  # as a Hub id could be
    assert f"did you mean {folder.relative_to(Path.cwd())}?" in fail("info", mistyped)
    assert f"did you mean {folder}?" in fail("info", f"{dense}s")
    assert "did you mean" not in fail("info", "nobody/nothing")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["intermediate.dense.weight", "attention.self.query.bias"])
def test_weights_that_are_not_finite(
    value: float,
    place: str,
    classifier: BertForSequenceClassification,
    folder_of: Callable[..., str],
    text: Path,
    tmp_path: Path,
) -> None:
    classifier.bert.encoder.layer[1].get_parameter(place).data.view(-1)[3] = value
    line = fail("convert", folder_of(classifier), tmp_path / "out", "--calibration", text)
    assert f"layer.1.{place} holds NaN or infinity" in line
    assert not (tmp_path / "out").exists()


def test_a_model_without_ffns_that_we_know(
    folder_of: Callable[..., str], text: Path, glue: Path, tmp_path: Path
) -> None:
    gpt = folder_of(GPT2Model(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)))
    for command in (
        ["convert", gpt, tmp_path / "out", "--calibration", text],
        ["finetune", gpt, tmp_path / "out", "--task", "sst2", "--data-dir", glue],
        ["info", gpt],
    ):
        assert "model type 'gpt2' is not supported; expected one of bert, roberta" in fail(*command)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fff", "message"),
    [
        ({"depth": 3, "leaf_width": 2}, r"is \[1, 4, 2\] in the weights and \[1, 8, 2\] by config.json"),
        ({"depth": 99, "leaf_width": 2}, "depth is 99"),
        ({"depht": 2, "leaf_width": 2}, "`fff` does not hold the shape of a tree .*depht"),
        (None, "`fff` does not hold the shape of a tree"),
    ],
    ids=["other_shape", "too_deep", "misspelt", "none"],
)
def test_a_checkpoint_that_disagrees_with_its_config(
    fff: object, message: str, student: str, glue: Path
) -> None:
    change_config(student, fff=fff)
    assert re.search(message, fail("evaluate", student, "--task", "sst2", "--data-dir", glue))


def test_a_report_that_is_no_json(student: str) -> None:
    Path(student, "report.json").write_text("{")
    assert "report.json is not what fffconvert wrote there" in fail("info", student)


def test_an_output_that_cannot_be_one(
    dense: str, text: Path, tmp_path: Path, listing: Callable[[], set[str]]
) -> None:
    before = listing()
    more = ["--calibration", text, *TREE]
    assert "exists and is not empty; name a new folder" in fail("convert", dense, dense, *more)
    assert "is a file" in fail("convert", dense, text, *more)
    assert "is a file; expected a folder" in fail("convert", dense, text / "out", *more)
    assert "/proc" in fail("convert", dense, "/proc/out", *more)
    assert "is a directory" in fail("convert", dense, tmp_path / "out", *more, "--json", tmp_path)
    assert "is a file; expected a folder" in fail("finetune", dense, text / "out", "--task", "sst2")
    assert listing() == before
    (tmp_path / "empty").mkdir()
    succeed("convert", dense, tmp_path / "empty", *more)
    succeed("convert", dense, tmp_path / "new" / "folder", *more)


# ---- Bad input: data, heads, pairs, the Hub


def test_text_that_is_none(dense: str, tmp_path: Path) -> None:
    for name, content, message in (
        ("empty.txt", b"", "empty.txt is empty; expected one text per line"),
        ("blank.txt", b"\n \n\t\n", "blank.txt is empty"),
        ("binary.txt", b"\xff\xfe\x00", r"binary.txt is not UTF-8 text \(line 1\)"),
        ("missing.txt", None, "missing.txt is neither a file nor a task"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert re.search(message, fail("convert", dense, tmp_path / "out", "--calibration", tmp_path / name))
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (None, "does not exist"),
        (b"junk", "not readable as Parquet"),
        ({"sentence": ["a"]}, "label"),
        ({"sentence": ["a", None], "label": [0, 1]}, "row 1"),
        ({"sentence": [1, 2], "label": [0, 1]}, "row 0"),
        ({"sentence": ["a", "b"], "label": [0, -1]}, "-1"),
        ({"sentence": ["a", "b"], "label": [0, 7]}, "7"),
        ({"sentence": ["a", "b"], "label": [0, None]}, "row 1 has no label in column 'label'"),
    ],
    ids=["missing", "junk", "no_labels", "null", "numbers", "unlabelled", "other_labels", "null_label"],
)
def test_malformed_data(columns: Any, message: str, dense: str, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "sst2"
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        file = folder / f"{split}.parquet"
        if isinstance(columns, bytes):
            file.write_bytes(columns)
        elif columns is not None:
            Dataset.from_dict(columns).to_parquet(file)
    data = ["--task", "sst2", "--data-dir", tmp_path / "data"]
    assert message in fail("evaluate", dense, *data)
    assert message in fail("finetune", dense, tmp_path / "out", *data, *QUICK)
    assert not list(tmp_path.glob("out*"))


def test_a_task_that_does_not_fit_the_head(
    dense: str, glue: Path, text: Path, folder_of: Callable[..., str]
) -> None:
    encoder, masked = folder_of(BertModel(tiny_config()), "e"), folder_of(BertForMaskedLM(tiny_config()), "m")
    data = ["--data-dir", glue]
    assert "task 'sst3' is unknown" in fail("evaluate", dense, "--task", "sst3", *data)
    assert "has 2 outputs; task mnli expects 3" in fail("evaluate", dense, "--task", "mnli", *data)
    assert "has 2 outputs; task stsb expects 1" in fail("evaluate", dense, "--task", "stsb", *data)
    named = tiny_config(id2label={0: "bad", 1: "good"})
    result = call("evaluate", folder_of(BertForSequenceClassification(named), "n"), "--task", "sst2", *data)
    assert "bad, good, are taken for negative, positive, in that order" in " ".join(result.stderr.split())
    for model in (encoder, masked):
        assert "expects a ...ForSequenceClassification" in fail("evaluate", model, "--task", "sst2", *data)
    assert "task and text are named" in fail("evaluate", dense, "--task", "sst2", "--text", text)
    assert "--teacher" in fail("evaluate", encoder, "--text", text)


def test_a_pair_that_does_not_fit(
    dense: str, student: str, text: Path, glue: Path, folder_of: Callable[..., str], tmp_path: Path
) -> None:
    small = folder_of(BertForSequenceClassification(tiny_config(hidden_size=8)), "small")
    encoder = folder_of(BertModel(tiny_config()), "encoder")
    out, more = tmp_path / "out", ["--text", text, *QUICK]
    assert "hidden_size is 16 in the student and 8 in" in fail(
        "distill", student, out, "--teacher", small, *more
    )
    assert "expected the same head" in fail("distill", student, out, "--teacher", encoder, *more)
    assert "is dense; expected a converted" in fail("distill", dense, out, "--teacher", dense, *more)
    assert "converted already; expected a dense" in fail("convert", student, out, "--calibration", text)
    assert "converted already; expected a dense" in fail(
        "finetune", student, out, "--task", "sst2", "--data-dir", glue
    )
    assert "is dense; expected a converted model" in fail("benchmark", dense)
    assert "expected the same" in fail("benchmark", student, "--against", small)
    assert "is dense; expected a converted" in fail("push", dense, "user/name")
    assert not list(tmp_path.glob("out*"))


def test_no_hub(dense: str, student: str, text: Path, tmp_path: Path) -> None:
    """The tests run offline, so this is what a machine without a network says."""
    assert "access to the Hub" in fail("convert", "nobody/nothing", tmp_path / "out", "--calibration", text)
    line = fail("evaluate", dense, "--task", "sst2")
    assert "could not be had from the Hub" in line
    assert "--data-dir" in line
    assert "is the Hub reachable" in fail("push", student, "user/name")
    assert "cannot name a repository" in fail("push", student, "no good name", "--dry-run")


# ---- A full disk and Ctrl-C, in processes of their own


@in_processes
@pytest.mark.slow
def test_a_full_disk(
    dense: str, student: str, text: Path, tmp_path: Path, listing: Callable[[], set[str]]
) -> None:
    before = listing()
    for number, command in enumerate(
        (
            ["convert", dense, str(tmp_path / "out"), "--calibration", str(text), *TREE],
            ["distill", student, str(tmp_path / "out"), "--teacher", dense, "--text", str(text), *QUICK],
        )
    ):
        stderr = tmp_path / f"stderr-{number}"
        assert finish(start_command(command, stderr, file_size_limit=4096)) == 1
        assert "could not be" in the_error_in(stderr.read_text())
        stderr.unlink()
        assert listing() == before


def test_a_dry_run_refuses_what_the_run_would(dense: str, glue: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"model: {dense}\ntask: sst2\nfinetune: {{epochs: 1}}\n", encoding="utf-8")
    there = tmp_path / "there-teacher"
    there.mkdir()
    (there / "mine.txt").touch()
    asked = ["run", recipe, "--data-dir", glue, "--dry-run", "--output"]
    assert "there-teacher exists and is not empty" in fail(*asked, tmp_path / "there")
    assert f"{dense} exists and is not empty" in fail(*asked, dense)
    assert "tracker 'nosuch' is unknown" in fail(*asked, tmp_path / "out", "--log-with", "nosuch")
    short = ["convert", dense, tmp_path / "out", *TREE, "--dry-run"]
    assert "max_length is 2; expected at least" in fail(*short, "--max-length", 2)
    Path(dense, "tokenizer.json").unlink()
    Path(dense, "tokenizer_config.json").unlink()
    assert "holds no tokenizer" in fail(*short)


def test_two_trainings_into_one_output(
    dense: str, student: str, glue: Path, tmp_path: Path, listing: Callable[[], set[str]]
) -> None:
    data = ["--task", "sst2", "--data-dir", str(glue), *QUICK]
    with locked(tmp_path / "out.checkpoints"):
        for command in (["finetune", dense], ["distill", student, "--teacher", dense]):
            assert "another run is at work in" in fail(*command, *data, tmp_path / "out")
    before = listing()
    assert "out.checkpoints" not in before
    succeed("distill", student, "--teacher", dense, *data, tmp_path / "out")
    assert "out.checkpoints" not in listing()


@in_processes
def test_ctrl_c(dense: str, glue: Path, tmp_path: Path, listing: Callable[[], set[str]]) -> None:
    data = ["--task", "sst2", "--data-dir", str(glue), "--epochs", "100000", "--batch-size", "8"]
    before, stderr = listing(), tmp_path / "stderr"
    process = start_command(["finetune", dense, str(tmp_path / "out"), *data], stderr)
    wait_until(lambda: stderr.exists() and "Fine-tuning" in stderr.read_text(), process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 130
    line = the_error_in(stderr.read_text().replace("\r", "\n"))
    assert line.startswith("error: interrupted")
    left = {path for path in listing() - before if not path.startswith("out.checkpoints")}
    assert left == {"stderr"}, "checkpoints apart, nothing is left"
