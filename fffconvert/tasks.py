"""GLUE: its tasks, official metrics and data, and any text file as data without labels.

Tasks and metrics are those of Wang et al. (arXiv 1804.07461). The data comes from the Hub
(`nyu-mll/glue`), or from a folder `DATA_DIR/TASK/` of Parquet files named after the splits.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset, DatasetDict, disable_progress_bars, load_dataset
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from fffconvert.calibration import MAX_LENGTH, Text
from fffconvert.errors import UserError

HUB_DATASET = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """One GLUE task.

    Attributes:
        name: Its name on the Hub.
        columns: The one or two columns that hold the text.
        labels: Names of the classes in the order of their codes; empty for regression.
        metrics: Its official metrics; the first is the score.
        validations: Its validation splits; the first is the one that counts.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    validations: tuple[str, ...] = ("validation",)

    @property
    def is_regression(self) -> bool:
        """Whether the task asks for a number instead of a class."""
        return not self.labels

    @property
    def n_outputs(self) -> int:
        """Numbers that a head for this task gives."""
        return len(self.labels) or 1


_ENTAILMENT = ("entailment", "not_entailment")
_PARAPHRASE = ("accuracy", "f1")

TASKS = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
        Task("sst2", ("sentence",), ("negative", "positive")),
        Task("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), _PARAPHRASE),
        Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), _PARAPHRASE),
        Task("stsb", ("sentence1", "sentence2"), (), ("pearson", "spearman")),
        Task(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            validations=("validation_matched", "validation_mismatched"),
        ),
        Task("qnli", ("question", "sentence"), _ENTAILMENT),
        Task("rte", ("sentence1", "sentence2"), _ENTAILMENT),
        Task("wnli", ("sentence1", "sentence2"), ("not_entailment", "entailment")),
    )
}

_METRICS = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews_correlation": matthews_corrcoef,
    "pearson": lambda labels, predictions: pearsonr(labels, predictions).statistic,
    "spearman": lambda labels, predictions: spearmanr(labels, predictions).statistic,
}


def task_named(name: str) -> Task:
    """The task of that name.

    Raises:
        UserError: For a name that is not a GLUE task's.
    """
    if name not in TASKS:
        raise UserError(f"task {name!r} is unknown; expected one of {', '.join(TASKS)}")
    return TASKS[name]


def predictions(task: Task, logits: NDArray[np.float32]) -> NDArray[Any]:
    """Classes `(n_rows,)`, or the regressed numbers, from logits `(n_rows, n_outputs)`."""
    return logits[:, 0] if task.is_regression else logits.argmax(1)


def compute_metrics(task: Task, logits: NDArray[np.float32], labels: NDArray[Any]) -> dict[str, float]:
    """The task's official metrics.

    Args:
        task: The task.
        logits: `(n_rows, n_outputs)`.
        labels: `(n_rows,)`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a constant prediction has no correlation: that is 0 below
        values = {name: float(_METRICS[name](labels, predictions(task, logits))) for name in task.metrics}
    return {name: value if np.isfinite(value) else 0.0 for name, value in values.items()}


def load_task(task: Task, data_dir: Path | None, splits: tuple[str, ...]) -> DatasetDict:
    """Splits of a task, with the columns and label codes of `nyu-mll/glue`.

    Args:
        task: The task.
        splits: Some of `train` and the task's validation splits.
        data_dir: A folder with `TASK/SPLIT.parquet`; a `train_partial.parquet` serves, with a warning,
            where there is no `train.parquet`. Without a folder the data comes from the Hub.

    Raises:
        UserError: For data that is missing, cannot be read, or lacks a column.
    """
    if data_dir is None:
        found = _load_from_hub(task)
    else:
        files = {split: str(_file(data_dir / task.name, split)) for split in splits}
        disable_progress_bars()
        try:
            found = load_dataset("parquet", data_files=files)
        except Exception as error:
            raise UserError(
                f"{data_dir / task.name}: not readable as Parquet ({_first_line(error)})"
            ) from error
    for split in splits:
        missing = {*task.columns, "label"} - set(found[split].column_names)
        if missing:
            raise UserError(
                f"{task.name}, {split}: no column {', '.join(sorted(missing))}; "
                f"expected {', '.join((*task.columns, 'label'))}"
            )
        check_rows(task, split, found[split])
    return DatasetDict({split: found[split] for split in splits})


def check_rows(task: Task, split: str, rows: Dataset) -> None:
    """Raises a `UserError` that names the first row whose text or label is not what the task asks for."""
    for name in task.columns:
        for number, text in enumerate(rows[name]):
            if not isinstance(text, str):
                raise UserError(f"{task.name}, {split}: row {number} has {name} {text!r}; expected text")
    for number, label in enumerate(rows["label"]):
        if task.is_regression:
            fits, expected = isinstance(label, int | float) and np.isfinite(label), "a number"
        else:
            fits, expected = label in range(task.n_outputs), f"0 to {task.n_outputs - 1}"
        if not fits:
            raise UserError(f"{task.name}, {split}: row {number} has label {label!r}; expected {expected}")


def _load_from_hub(task: Task) -> DatasetDict:
    try:
        return load_dataset(HUB_DATASET, task.name)
    except Exception as error:
        raise UserError(
            f"{HUB_DATASET}/{task.name} could not be had from the Hub ({_first_line(error)}). "
            f"Name a folder that holds {task.name}/train.parquet with --data-dir."
        ) from error


def _file(folder: Path, split: str) -> Path:
    whole, partial = folder / f"{split}.parquet", folder / f"{split}_partial.parquet"
    if whole.is_file():
        return whole
    if partial.is_file():
        warnings.warn(f"{partial}: only a part of the split, so scores are not GLUE's own", stacklevel=2)
        return partial
    raise UserError(f"{whole} does not exist; expected the {split} split as Parquet")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_lines(file: Path) -> Iterator[str]:
    """The non-empty lines of a text file, one text each, read as they are asked for.

    Raises:
        UserError: For a file that is missing, is not UTF-8, or has no text in it.
    """
    empty = True
    try:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                if text := line.strip():
                    empty = False
                    yield text
    except OSError as error:
        raise UserError(f"{file} could not be read ({error.strerror}); expected a text file") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 text (byte {error.start}); expected one text per line"
        ) from error
    if empty:
        raise UserError(f"{file} is empty; expected one text per line")


def texts_of(task: Task, rows: Dataset) -> list[Text]:
    """The texts, or pairs of texts, of a split."""
    columns = [list(rows[name]) for name in task.columns]
    return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))


def tokenized(task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """A split as a model takes it, with `labels` and the number of tokens as `length`."""

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [batch[name] for name in task.columns]
        encoded = dict(tokenizer(*texts, truncation=True, max_length=MAX_LENGTH))
        number = float if task.is_regression else int
        return {
            **encoded,
            "labels": [number(label) for label in batch["label"]],
            "length": [len(ids) for ids in encoded["input_ids"]],
        }

    return rows.map(encode, batched=True, remove_columns=rows.column_names)


def tokenized_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Texts without labels as a model takes them, with the number of tokens as `length`."""

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        encoded = dict(tokenizer(batch["text"], truncation=True, max_length=MAX_LENGTH))
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

    return Dataset.from_dict({"text": texts}).map(encode, batched=True, remove_columns=["text"])


@dataclass(frozen=True)
class Data:
    """What to train and to evaluate on.

    Attributes:
        task: The task; none for plain text.
        texts: The training texts.
        rows: The same, tokenized.
        validations: Tokenized rows to evaluate on, by split.
    """

    task: Task | None
    texts: list[Text]
    rows: Dataset
    validations: dict[str, Dataset]


def read_data(
    task: Task | None,
    text: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data_dir: Path | None = None,
    train_rows: int | None = None,
    held_out: int = 0,
    seed: int = 0,
) -> Data:
    """Reads a task, or a text file without labels, and draws the rows to train on.

    Args:
        task: The task; either this or `text`.
        text: A file with one text per line.
        tokenizer: The model's.
        data_dir: As for `load_task`.
        train_rows: Rows to train on, drawn at random; all of them if not given.
        held_out: Lines of `text` to evaluate on; they are never trained on.
        seed: Decides what is drawn.

    Raises:
        UserError: For data that is missing or malformed, or fewer lines than are to be held out.
    """
    _refuse_both(task, text)
    random = np.random.default_rng(seed)
    if task is not None:
        train = load_task(task, data_dir, ("train",))["train"]
        if train_rows is not None:
            train = train.select(random.permutation(len(train))[:train_rows])
        validations = read_validations(task, None, tokenizer, data_dir) if held_out else {}
        return Data(task, texts_of(task, train), tokenized(task, train, tokenizer), validations)
    lines = list(read_lines(cast(Path, text)))
    if len(lines) <= held_out:
        raise UserError(f"{text} has {len(lines)} lines; expected more than the {held_out} to hold out")
    drawn = [lines[i] for i in random.permutation(len(lines))]
    texts = drawn[held_out:][:train_rows]
    validations = {"held_out": tokenized_texts(drawn[:held_out], tokenizer)} if held_out else {}
    return Data(None, list(texts), tokenized_texts(texts, tokenizer), validations)


def read_validations(
    task: Task | None, text: Path | None, tokenizer: PreTrainedTokenizerBase, data_dir: Path | None = None
) -> dict[str, Dataset]:
    """The tokenized rows to evaluate on, by split: a task's validation splits, or all lines of a file.

    Raises:
        UserError: For data that is missing or malformed.
    """
    _refuse_both(task, text)
    if task is not None:
        splits = load_task(task, data_dir, task.validations)
        return {name: tokenized(task, rows, tokenizer) for name, rows in splits.items()}
    return {"text": tokenized_texts(list(read_lines(cast(Path, text))), tokenizer)}


def _refuse_both(task: Task | None, text: Path | None) -> None:
    if (task is None) == (text is None):
        raise UserError("name either a task or a text file, and not both")


def check_head(task: Task | None, config: PreTrainedConfig, name: str) -> None:
    """Refuses a model whose head does not fit the task; text without a task asks for an encoder without a head.

    Raises:
        UserError: For a model that is no sequence classifier, or has another number of outputs; for text,
            one that has a head.
    """
    heads = config.architectures or ["no head"]
    if task is None:
        if any("For" in head for head in heads):
            raise UserError(
                f"{name} is {', '.join(heads)}; text without labels expects an encoder without a head. "
                "Name a task instead."
            )
        return
    if not any(head.endswith("ForSequenceClassification") for head in heads):
        raise UserError(
            f"{name} is {', '.join(heads)}; task {task.name} expects a ...ForSequenceClassification. "
            f"Fine-tune one first: fffconvert finetune {name} OUTPUT --task {task.name}"
        )
    ours = tuple(label.lower() for _, label in sorted((config.id2label or {}).items()))
    if ours != task.labels and sorted(ours) == sorted(task.labels):
        raise UserError(
            f"{name} orders its labels {', '.join(ours)}; task {task.name} expects {', '.join(task.labels)}"
        )
    if config.num_labels != task.n_outputs:
        raise UserError(
            f"{name} has {config.num_labels} outputs; task {task.name} expects {task.n_outputs}. "
            f"Is it fine-tuned for another task?"
        )
