"""The training loop: accumulation, exact resume after SIGKILL, several processes."""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, tracking
from accelerate.tracking import GeneralTracker
from conftest import sentences, tiny_model
from datasets import Dataset
from processes import finish, in_processes, start, wait_until
from torch import Tensor, nn
from transformers import BertForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

import fffconvert
from fffconvert import checkpoint, training
from fffconvert.accelerator import make_accelerator
from fffconvert.batch import Batch
from fffconvert.columns import unlabelled
from fffconvert.conversion import convert
from fffconvert.data import read_data, read_validations
from fffconvert.distillation import distill
from fffconvert.encoding import tokenized
from fffconvert.errors import UserError
from fffconvert.evaluation import evaluate
from fffconvert.finetuning import finetune
from fffconvert.loader import EpochSampler
from fffconvert.recipe import Training
from fffconvert.resumption import checkpoints_in, delete_checkpoints, digest_of_rows
from fffconvert.tasks import TASKS, Task
from fffconvert.training import parameter_groups, train
from fffconvert.tree import TreeShape

TREE = TreeShape(depth=2, leaf_width=2)
SETTINGS = Training(epochs=4, learning_rate=1e-3, batch_size=8, checkpoint_every=5)
HOLD_AT = 17  # past the checkpoint of step 15, before that of step 20


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Bitwise."""
    assert list(ours) == list(theirs)
    differing = [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
    assert not differing


def assert_close_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Within rounding, but for the keys' biases: softmax does not see them, so their gradient is noise."""
    for name in ours.keys() - {name for name in ours if name.endswith("key.bias")}:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def rows_for(tokenizer: PreTrainedTokenizerFast, n: int = 92) -> Dataset:
    texts = sentences(n)
    task, rows = unlabelled("text", ("text",), None), Dataset.from_dict({"text": texts})
    return tokenized(task, rows, tokenizer).add_column("labels", [int("good" in text) for text in texts])


def student_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return convert(model, tokenizer, sentences(100), TREE, calibration_tokens=500).model


# ---- Steps


def test_two_accumulated_batches_are_one_of_twice_the_size(
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = rows_for(tokenizer, 96)
    monkeypatch.setattr(EpochSampler, "__iter__", lambda _: iter(range(96)))  # else their orders differ
    ends = []
    for size, accumulation in ((16, 1), (8, 2)):
        student = student_of(classifier, tokenizer)
        settings = replace(SETTINGS, epochs=1, batch_size=size, gradient_accumulation=accumulation)
        distill(student, classifier, tokenizer, rows, settings)
        ends.append(weights_of(student))
    assert_close_weights(*ends)


def test_what_is_logged_of_a_step_is_of_all_its_batches(
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logged: list[dict[str, float]] = []
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "log", lambda _, values, step, **__: logged.append(values))
    monkeypatch.setattr(EpochSampler, "__iter__", lambda _: iter(range(16)))
    for size, accumulation in ((16, 1), (4, 4)):
        settings = replace(SETTINGS, epochs=1, batch_size=size, gradient_accumulation=accumulation)
        student = student_of(classifier, tokenizer)
        distill(student, classifier, tokenizer, rows_for(tokenizer, 16), settings, log_with="recorder")
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


def test_the_last_batches_of_an_epoch_count_as_much_as_others(
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    norms: list[float] = []

    def clip(_: Accelerator, parameters: Any, most: float) -> None:
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, most)))

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clip)
    rows = rows_for(tokenizer, 8).select([0] * 40)  # five like batches: a step of four, and one of one
    settings = replace(SETTINGS, epochs=1, gradient_accumulation=4, learning_rate=1e-12)
    distill(student_of(classifier, tokenizer), classifier, tokenizer, rows, settings)
    first, last = norms
    assert last == pytest.approx(first, rel=1e-3)


def test_every_epoch_has_an_order_of_its_own(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    seen: list[list[int]] = []

    def loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(batch["input_ids"].flatten().tolist())
        value = model(**batch).loss
        return value, {"loss": value}

    settings = replace(SETTINGS, epochs=2)
    training.train(classifier, rows_for(tokenizer, 32), tokenizer, loss, settings, description="")
    assert len(seen) == 8
    assert seen[:4] != seen[4:]


@pytest.mark.parametrize("accumulation", [1, 2, 5], ids="accumulate_{}".format)
def test_number_of_steps(
    accumulation: int,
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[int] = []
    monkeypatch.setattr(training, "log_step", lambda _a, _f, step, *_, **__: steps.append(step))
    settings = replace(SETTINGS, epochs=2, gradient_accumulation=accumulation)
    finetune(classifier, tokenizer, rows_for(tokenizer), settings)
    per_epoch = -(-11 // accumulation)  # 92 rows make 11 whole batches of 8
    assert steps == list(range(1, 2 * per_epoch + 1))


def test_training_is_deterministic(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    start_weights, ends = weights_of(classifier), []
    for seed in (0, 0, 1):
        classifier.load_state_dict(start_weights)
        finetune(classifier, tokenizer, rows_for(tokenizer), replace(SETTINGS, epochs=1), seed=seed)
        ends.append(weights_of(classifier))
    assert_same_weights(ends[0], ends[1])
    assert not torch.equal(ends[0]["classifier.weight"], ends[2]["classifier.weight"])


def test_a_model_in_half_precision_is_trained_in_float32(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    classifier.bfloat16()
    before = weights_of(classifier)
    finetune(classifier, tokenizer, rows_for(tokenizer), replace(SETTINGS, epochs=1, learning_rate=1e-5))
    assert classifier.dtype == torch.float32
    name = "bert.encoder.layer.0.output.LayerNorm.weight"
    assert not torch.equal(before[name].float(), classifier.get_parameter(name))


def test_fewer_rows_than_a_batch(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = weights_of(classifier)
    finetune(classifier, tokenizer, rows_for(tokenizer, 3), replace(SETTINGS, epochs=1))
    assert not torch.equal(before["classifier.weight"], classifier.classifier.weight)


def test_no_rows_are_refused(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match="there are no rows to train on"):
        finetune(classifier, tokenizer, rows_for(tokenizer).select([]), SETTINGS)


def test_what_cannot_be_trained_with_is_refused(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = rows_for(tokenizer)
    for seed in (-1, 2**40, 1.5):
        with pytest.raises(UserError, match=f"seed is {seed}; expected a whole number from 0"):
            finetune(classifier, tokenizer, rows, SETTINGS, seed=seed)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the rows have no labels; expected a column `labels`, or"):
        finetune(classifier, tokenizer, rows.remove_columns("labels"), SETTINGS)
    (tmp_path / "file").touch()
    before = weights_of(classifier)
    with pytest.raises(UserError, match=f"{tmp_path}/file is a file; expected a folder for checkpoints"):
        finetune(classifier, tokenizer, rows, SETTINGS, checkpoints=tmp_path / "file")
    assert_same_weights(weights_of(classifier), before)


def test_a_loss_that_is_not_finite_ends_the_run(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    with torch.no_grad():
        classifier.classifier.bias.fill_(float("nan"))
    with pytest.raises(UserError, match=r"not finite at step 1: .* lower the learning_rate"):
        finetune(classifier, tokenizer, rows_for(tokenizer), SETTINGS)


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_is_in_a_checkpoint(
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two batches that make a step, the first one: what is logged is the second one's."""
    seen = []

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(1)
        value = model(**batch).loss * (float("nan") if len(seen) == 3 else 1.0)
        return value, {"loss": value}

    settings = replace(SETTINGS, batch_size=2, gradient_accumulation=2, checkpoint_every=1)
    with pytest.raises(UserError, match=r"its gradient is not finite at step 2: training diverged"):
        train(
            classifier,
            rows_for(tokenizer),
            tokenizer,
            loss,
            settings,
            description="Testing",
            checkpoints=tmp_path / "c",
        )
    assert [path.name for path in (tmp_path / "c").glob("step-*")] == ["step-1"]
    assert all(parameter.isfinite().all() for parameter in classifier.parameters())


def test_gradients_from_before_do_not_count(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Such as those of a run that diverged."""
    other, rows = deepcopy(classifier), rows_for(tokenizer, 16)
    for parameter in classifier.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    for model in (classifier, other):
        finetune(model, tokenizer, rows, SETTINGS)
    assert_same_weights(classifier.state_dict(), other.state_dict())


def test_rows_without_a_label_that_counts_are_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    """Rows of like length share a batch, and one of empty rows alone has no loss."""
    words = [text.split() if number % 3 else [] for number, text in enumerate(sentences(96))]
    tags = [[int(word == "good") for word in row] for row in words]
    task = Task("own", ("tokens",), ("O", "X"), kind="tokens", label="tags")
    rows = tokenized(task, Dataset.from_dict({"tokens": words, "tags": tags}), tokenizer)
    some = rows.select([number for number in range(96) if number % 3])
    ends = []
    for given in (rows, some, rows.with_format("torch")):
        model = tiny_model("bert", "AutoModelForTokenClassification", num_labels=2)
        finetune(model, tokenizer, given, SETTINGS)
        ends.append(model.state_dict())
    assert_same_weights(*ends[:2])
    assert_same_weights(*ends[1:])
    with pytest.raises(UserError, match="there are no rows to train on"):
        finetune(model, tokenizer, rows.select([0, 3]), SETTINGS)


def test_a_model_that_is_frozen_is_refused(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    classifier.requires_grad_(False)
    with pytest.raises(UserError, match="no parameter of the model requires a gradient"):
        finetune(classifier, tokenizer, rows_for(tokenizer), SETTINGS)


class Recorder(GeneralTracker):
    """A tracker that keeps what it gets."""

    name, requires_logging_directory, tracker = "recorder", False, None
    config: dict[str, object]
    steps: list[tuple[int, list[str]]]
    ended: bool

    def __init__(self, run_name: str) -> None:
        super().__init__()
        Recorder.steps, Recorder.ended = [], False
        self.run_name = run_name

    def store_init_configuration(self, values: dict[str, object]) -> None:
        Recorder.config = values

    def log(self, values: dict[str, float], step: int, **_: object) -> None:
        self.steps.append((step, sorted(values)))

    def finish(self) -> None:
        Recorder.ended = True


def test_a_tracker_gets_settings_and_every_step(
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    settings = replace(SETTINGS, epochs=1)
    student = student_of(classifier, tokenizer)
    distill(student, classifier, tokenizer, rows_for(tokenizer), settings, log_with="recorder")
    assert Recorder.config == asdict(settings)
    assert Recorder.steps == [(step, ["ffn_inputs", "hidden", "logits"]) for step in range(1, 12)]
    assert Recorder.ended


def test_a_tracker_is_closed_where_training_fails(
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    classifier.classifier.bias.data[0] = torch.nan
    with pytest.raises(UserError, match="not finite at step 1"):
        finetune(classifier, tokenizer, rows_for(tokenizer), SETTINGS, log_with="recorder")
    assert Recorder.ended


@pytest.mark.parametrize(("name", "problem"), [("wanbd", "unknown"), ("clearml", "not installed")])
def test_a_tracker_that_cannot_serve_is_refused(
    name: str,
    problem: str,
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(UserError, match=rf"tracker '{name}' is {problem}"):
        finetune(classifier, tokenizer, rows_for(tokenizer), SETTINGS, log_with=name)


# ---- Checkpoints


def train_and_hold(kind: str, folder: str, teacher: str, checkpoints: Path, settings: Training) -> None:
    """Trains in a process of its own, and stands still between two checkpoints until it is killed."""
    log_step = training.log_step

    def log_and_hold(accelerator: object, figures: object, step: int, *rest, **more) -> None:
        log_step(accelerator, figures, step, *rest, **more)
        if step == HOLD_AT:
            (checkpoints / "holding").touch()
            time.sleep(600)

    training.log_step = log_and_hold
    train_in_full(kind, folder, teacher, checkpoints, settings)


def train_in_full(
    kind: str, folder: str, teacher: str, checkpoints: Path | None, settings: Training
) -> dict[str, Tensor]:
    loaded = checkpoint.load(folder)
    rows = rows_for(loaded.tokenizer)
    if kind == "finetune":
        finetune(loaded.model, loaded.tokenizer, rows, settings, checkpoints=checkpoints)
    else:
        dense = checkpoint.load(teacher).model
        distill(loaded.model, dense, loaded.tokenizer, rows, settings, checkpoints=checkpoints)
    return weights_of(loaded.model)


@in_processes
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param("finetune", SETTINGS, id="finetune_with_dropout"),
        pytest.param("distill", replace(SETTINGS, gradient_accumulation=2), id="distill_accumulating"),
    ],
)
def test_a_killed_run_that_is_resumed_ends_with_the_same_weights(
    kind: str,
    settings: Training,
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    folder_of: Callable[..., str],
    tmp_path: Path,
) -> None:
    teacher = folder_of(classifier)
    folder = teacher if kind == "finetune" else folder_of(student_of(classifier, tokenizer), "student")
    assert classifier.config.hidden_dropout_prob > 0
    whole = train_in_full(kind, folder, teacher, None, settings)

    checkpoints = tmp_path / "checkpoints"
    process = start(train_and_hold, kind, folder, teacher, checkpoints, settings)
    wait_until((checkpoints / "holding").exists, process)
    process.kill()
    assert finish(process) == -signal.SIGKILL
    assert checkpoints_in(checkpoints) == [15]

    torch.manual_seed(123)  # must not matter
    resumed = train_in_full(kind, folder, teacher, checkpoints, settings)
    assert_same_weights(resumed, whole)
    assert checkpoints_in(checkpoints), "they are the caller's to delete, once the model is saved"


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends the next training run after some steps, as Ctrl-C does."""
    log_step = training.log_step

    def log_and_interrupt(accelerator: object, figures: object, now: int, *rest, **more) -> None:
        log_step(accelerator, figures, now, *rest, **more)
        if now == step:
            monkeypatch.setattr(training, "log_step", log_step)
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "log_step", log_and_interrupt)


@pytest.fixture
def interrupted(
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The checkpoints of a run that was interrupted at step 7."""
    interrupt_at(7, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        finetune(
            deepcopy(classifier),
            tokenizer,
            rows_for(tokenizer),
            SETTINGS,
            checkpoints=tmp_path / "checkpoints",
        )
    return tmp_path / "checkpoints"


def test_only_the_newest_checkpoint_is_kept(interrupted: Path) -> None:
    assert sorted(path.name for path in interrupted.iterdir()) == ["settings.json", "step-5"]
    settings = json.loads((interrupted / "settings.json").read_text())
    known = {**asdict(SETTINGS), "seed": 0, "rows": 92, "teacher": None}
    assert settings == {**known, "data": settings["data"], "model": settings["model"]}


@pytest.mark.parametrize(
    ("settings", "seed"),
    [(replace(SETTINGS, learning_rate=2e-3), 0), (SETTINGS, 1)],
    ids=["other_learning_rate", "other_seed"],
)
def test_checkpoints_of_other_settings_are_refused(
    settings: Training,
    seed: int,
    interrupted: Path,
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(
        UserError, match=r"run with another (learning_rate|seed); resume with that, or delete it"
    ):
        finetune(classifier, tokenizer, rows_for(tokenizer), settings, seed=seed, checkpoints=interrupted)
    assert checkpoints_in(interrupted) == [5]


def test_checkpoints_of_another_model_or_other_data_are_refused(
    interrupted: Path, classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = rows_for(tokenizer)
    other_rows = rows.map(lambda row: {"labels": 1 - row["labels"]})
    with pytest.raises(UserError, match=r"run with another data; resume with that, or delete it"):
        finetune(classifier, tokenizer, other_rows, SETTINGS, checkpoints=interrupted)
    classifier.classifier.bias.data += 0.1
    with pytest.raises(UserError, match=r"run with another model; resume with that, or delete it"):
        finetune(classifier, tokenizer, rows, SETTINGS, checkpoints=interrupted)
    assert checkpoints_in(interrupted) == [5]


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
def test_data_that_differs_in_the_middle_is_other_data(form: str | None) -> None:
    ids = [[number] * 8 for number in range(1000)]
    other = [*ids[:450], *([0] * 8 for _ in range(100)), *ids[550:]]
    digests = {digest_of_rows(Dataset.from_dict({"input_ids": x}).with_format(form)) for x in (ids, other)}
    assert len(digests) == 2


def test_checkpoints_of_another_teacher_are_refused(
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, rows = student_of(classifier, tokenizer), rows_for(tokenizer)
    interrupt_at(7, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        distill(deepcopy(student), classifier, tokenizer, rows, SETTINGS, checkpoints=tmp_path / "kept")
    classifier.classifier.bias.data += 0.1
    with pytest.raises(UserError, match=r"run with another teacher; resume with that, or delete it"):
        distill(student, classifier, tokenizer, rows, SETTINGS, checkpoints=tmp_path / "kept")


def test_a_checkpoint_that_was_not_written_whole_is_ignored(
    interrupted: Path, classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    (interrupted / "partial").mkdir()
    (interrupted / "partial" / "model.safetensors").write_bytes(b"cut sho")
    assert checkpoints_in(interrupted) == [5]
    finetune(classifier, tokenizer, rows_for(tokenizer), SETTINGS, checkpoints=interrupted)
    assert checkpoints_in(interrupted) != [5]


def test_deleting_takes_what_was_not_written_whole_too(interrupted: Path) -> None:
    (interrupted / "partial").mkdir()
    delete_checkpoints(interrupted)
    assert not interrupted.exists()


def test_a_first_checkpoint_that_cannot_be_written_leaves_nothing_but_what_was_there(
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Accelerator, "save_state", full)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    for name, left in (("there", ["mine.txt"]), ("new", None)):
        folder = tmp_path / name
        with pytest.raises(UserError, match=r"step-5 could not be written .*No space left"):
            finetune(classifier, tokenizer, rows_for(tokenizer), SETTINGS, checkpoints=folder)
        assert (sorted(path.name for path in folder.iterdir()) if folder.exists() else None) == left


@pytest.mark.parametrize(
    ("damage", "file"),
    [("", "settings.json"), ("{", "settings.json"), ("[1]", "settings.json"), ("half", "step-5")],
)
def test_a_checkpoint_that_is_damaged_is_named(
    damage: str,
    file: str,
    interrupted: Path,
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    damaged = interrupted / file
    damaged = damaged / "model.safetensors" if damaged.is_dir() else damaged
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2] if damage == "half" else damage.encode())
    with pytest.raises(UserError, match=f"{file} could not be read .* delete {interrupted} to start anew"):
        finetune(classifier, tokenizer, rows_for(tokenizer), SETTINGS, checkpoints=interrupted)


def test_what_somebody_else_put_beside_the_checkpoints_stays(interrupted: Path) -> None:
    (interrupted / "mine.txt").write_text("mine")
    delete_checkpoints(interrupted)
    assert [path.name for path in interrupted.iterdir()] == ["mine.txt"]
    (interrupted / "mine.txt").unlink()
    delete_checkpoints(interrupted)
    assert not interrupted.exists()
    delete_checkpoints(interrupted)


# ---- Manners


def test_a_teacher_is_left_as_it_was(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    student, teacher = student_of(classifier, tokenizer), deepcopy(classifier).train()
    distill(student, teacher, tokenizer, rows_for(tokenizer), replace(SETTINGS, epochs=1))
    assert teacher.training
    assert_same_weights(weights_of(teacher), weights_of(classifier))


def test_the_precision_of_a_process_that_has_trained_before_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    before = make_accelerator().mixed_precision
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16" if before == "bf16" else "bf16")
    assert make_accelerator().mixed_precision == before


def tune_in_mixed_precision(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    os.environ |= {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"}
    finetune(model, tokenizer, rows_for(tokenizer), replace(SETTINGS, epochs=1))
    again = deepcopy(model)
    again.__dict__.pop("forward", None)
    ids = torch.arange(2, 8)[None]
    assert torch.equal(model(ids, return_dict=True).logits, again(ids).logits)
    assert torch.equal(model(ids, return_dict=False)[0], again(ids).logits)


@in_processes
def test_a_model_trained_in_mixed_precision_computes_in_its_own_afterwards(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert finish(start(tune_in_mixed_precision, classifier, tokenizer)) == 0


def test_an_accelerator_of_ones_own_goes_on_accumulating(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    own, before = Accelerator(gradient_accumulation_steps=4), weights_of(classifier)
    with own.accumulate(nn.Linear(1, 1)):  # the first batch of four: no optimizer of its own would move
        finetune(classifier, tokenizer, rows_for(tokenizer), replace(SETTINGS, epochs=1))
        assert not own.sync_gradients
    assert own.gradient_accumulation_steps == 4
    assert not torch.equal(before["classifier.weight"], classifier.classifier.weight)


def choose_a_precision_after_evaluating(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = rows_for(tokenizer)
    evaluate(model, tokenizer, TASKS["sst2"], {"validation": rows})
    assert Accelerator(mixed_precision="bf16", cpu=True).mixed_precision == "bf16"


@in_processes
def test_a_process_that_has_evaluated_may_choose_its_precision(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert finish(start(choose_a_precision_after_evaluating, classifier, tokenizer)) == 0


# ---- Two processes

TWO = """
import sys
from pathlib import Path
import torch
from accelerate import PartialState
from fffconvert.cli import main

folder = sys.argv[1]
data = ["--task", "sst2", "--data-dir", f"{folder}/glue"]
teacher = ["--teacher", f"{folder}/dense"]
settings = ["--epochs", "2", "--batch-size", "8"]
for arguments in (
    ["distill", f"{folder}/student", f"{folder}/two", *data, *teacher, *settings],
    ["distill", f"{folder}/student", f"{folder}/few", *data, *teacher, *settings, "--train-rows", "5"],
    ["evaluate", f"{folder}/student", *data, *teacher, "--json", f"{folder}/two.json"],
):
    main(arguments, standalone_mode=False)
state = PartialState()
Path(folder, f"seed-{state.process_index}").write_text(str(torch.initial_seed()))
Path(folder, f"process-{state.process_index}-of-{state.num_processes}").touch()
"""


CPU_PROCESS = {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def fork_two_processes(script: Path, folder: str) -> None:
    """Runs a script in two CPU processes, on loopback, as `accelerate launch` does, but at once."""
    port = free_port()
    both = [start(run_as_one_of_two, rank, port, script, folder) for rank in ("0", "1")]
    assert [finish(process) for process in both] == [0, 0]


def run_as_one_of_two(rank: str, port: str, script: Path, folder: str) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {**CPU_PROCESS, **where, "RANK": rank, "LOCAL_RANK": rank}
    sys.argv = [str(script), folder]
    runpy.run_path(str(script))


def launch_two_processes(script: Path, folder: str) -> None:
    """Runs a script in two CPU processes by `accelerate launch`, on loopback.

    Without an MPI, `accelerate launch --cpu` starts one process whatever number it is told; the launcher
    named after GPUs starts as many as it is told, and `ACCELERATE_USE_CPU` puts them on the CPU.
    """
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    more = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    where = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    done = subprocess.run(
        [*launch, *more, *where, str(script), folder],
        env={**os.environ, **CPU_PROCESS, "PYTHONPATH": str(Path(fffconvert.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@in_processes
@pytest.mark.parametrize(
    "run_in_two", [fork_two_processes, pytest.param(launch_two_processes, marks=pytest.mark.slow)]
)
def test_two_processes_give_what_one_gives(
    run_in_two: Callable[[Path, str], None],
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    glue: Path,
    folder_of: Callable[..., str],
    tmp_path: Path,
) -> None:
    """One launch for all claims, because `accelerate` takes seconds: torch is imported three times."""
    folder_of(classifier)
    folder_of(student_of(classifier, tokenizer), "student")
    script = tmp_path / "two.py"
    script.write_text(TWO, encoding="utf-8")
    run_in_two(script, str(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("process-*")) == ["process-0-of-2", "process-1-of-2"]

    assert len({(tmp_path / f"seed-{number}").read_text() for number in range(2)}) == 2, "of dropout, say"

    # evaluation: 37 rows over two processes, none counted twice
    task = TASKS["sst2"]
    student, teacher = checkpoint.load(tmp_path / "student"), checkpoint.load(tmp_path / "dense")
    task, validations = read_validations(task, tokenizer, None, data_dir=glue)
    assert len(validations["validation"]) == 37
    scores = evaluate(student.model, tokenizer, task, validations, teacher.model)
    found = json.loads((tmp_path / "two.json").read_text())
    assert found == {**found, **scores.to_dict(), "rows": {"validation": 37}}

    # training: each batch is shared out, so the steps are the same; of five rows each process has two
    before = weights_of(student.model)
    for made, n_rows, batch_size, least in (("two", None, 8, 1e-3), ("few", 5, 4, 1e-4)):
        rows = read_data(task, tokenizer, None, data_dir=glue, train_rows=n_rows).rows
        student.model.load_state_dict(before)
        distill(student.model, teacher.model, tokenizer, rows, Training(epochs=2, batch_size=batch_size))
        found = weights_of(checkpoint.load(tmp_path / made).model)
        assert max(float((tensor - before[name]).abs().max()) for name, tensor in found.items()) > least
        assert_close_weights(found, weights_of(student.model))


def test_a_batch_that_processes_cannot_share_is_refused(
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with pytest.raises(UserError, match="batch_size is 8; expected a multiple of the 3 processes"):
        finetune(classifier, tokenizer, rows_for(tokenizer), SETTINGS)
    with pytest.raises(UserError, match="there are 2 rows to train on; expected at least 3, one for each"):
        finetune(classifier, tokenizer, rows_for(tokenizer, 2), replace(SETTINGS, batch_size=9))


def test_a_step_is_what_the_settings_say(
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """AdamW's weight decay, the clipped norm, and the rate over the steps: warmed up, then falling to 0."""
    norms, groups = [], []
    clip, step = Accelerator.clip_grad_norm_, torch.optim.AdamW.step

    def clipping(self: Accelerator, parameters: Any, norm: float) -> Any:
        norms.append(norm)
        assert classifier.training, "dropout is on"
        return clip(self, parameters, norm)

    def stepping(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        groups.append((self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clipping)
    monkeypatch.setattr(torch.optim.AdamW, "step", stepping)
    settings = Training(
        epochs=1, learning_rate=0.4, batch_size=2, warmup=0.5, weight_decay=0.3, max_grad_norm=0.7
    )
    finetune(classifier, tokenizer, rows_for(tokenizer).select(range(8)), settings)
    assert norms == [0.7] * 4
    assert not classifier.training
    assert groups == [(pytest.approx(rate), 0.3) for rate in (0.0, 0.2, 0.4, 0.2)]


def test_leaves_learn_slower_by_the_root_of_their_number(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    student = convert(classifier, tokenizer, sentences(30), TreeShape(2, 3)).model
    rates = {id(p): group["lr"] for group in parameter_groups(student, 0.4) for p in group["params"]}
    trained = {name: rates.pop(id(p)) for name, p in student.named_parameters() if p.requires_grad}
    assert {rate for name, rate in trained.items() if ".leaf_" in name} == {0.2}
    assert {rate for name, rate in trained.items() if ".leaf_" not in name} == {0.4}
    assert not rates
