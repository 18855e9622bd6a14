"""The tasks of GLUE: from the Hub (`nyu-mll/glue`), or from a folder `DATA_DIR/TASK/` of Parquet files, one a split."""

from __future__ import annotations

from pathlib import Path

from datasets import DatasetDict, load_dataset

from fffconvert.display import say
from fffconvert.errors import UserError, first_line
from fffconvert.tasks import GLUE, Task


def load_task(task: Task, data_dir: Path | str | None, splits: tuple[str, ...]) -> DatasetDict:
    """Splits of a task, with the columns and label codes of `nyu-mll/glue`.

    Args:
        task: The task.
        data_dir: A folder with `TASK/SPLIT.parquet`; a `train_partial.parquet` serves, and one line says so,
            where there is no `train.parquet`. Without a folder the data comes from the Hub.
        splits: Some of `train` and the task's validation splits.

    Raises:
        UserError: For data that is missing, cannot be read, or lacks a column.
    """
    if data_dir is None:
        found = _load_from_hub(task)
    else:
        data_dir = Path(data_dir)
        files = {split: str(_file(data_dir / task.name, split)) for split in splits}
        try:
            found = load_dataset("parquet", data_files=files)
        except Exception as error:
            raise UserError(
                f"{data_dir / task.name}: not readable as Parquet ({first_line(error)})"
            ) from error
    for split in splits:
        missing = {*task.columns, "label"} - set(found[split].column_names)
        if missing:
            raise UserError(
                f"{task.name}, {split}: no column {', '.join(sorted(missing))}; "
                f"expected {', '.join((*task.columns, 'label'))}"
            )
    return DatasetDict({split: found[split] for split in splits})


def _load_from_hub(task: Task) -> DatasetDict:
    try:
        return load_dataset(GLUE, task.name)
    except Exception as error:
        raise UserError(
            f"{GLUE}/{task.name} could not be had from the Hub ({first_line(error)}). "
            f"Name a folder that holds {task.name}/train.parquet with --data-dir."
        ) from error


def _file(folder: Path, split: str) -> Path:
    whole, partial = folder / f"{split}.parquet", folder / f"{split}_partial.parquet"
    if whole.is_file():
        return whole
    if partial.is_file():
        say(f"{partial}: only a part of the split, so scores are not GLUE's own")
        return partial
    raise UserError(f"{whole} does not exist; expected the {split} split as Parquet")
