"""What lets a training run go on after a kill: its checkpoints, and what tells it from other runs.

A checkpoint appears under its name only when it is whole, and holds dropout's draws too.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors import SafetensorError
from torch import nn

from fffconvert.display import is_main_process, say
from fffconvert.errors import NotWritten, UserError, first_line
from fffconvert.folders import write_whole
from fffconvert.recipe import Training

FINGERPRINT = "settings.json"  # in the folder of a run's checkpoints
DAMAGED = (SafetensorError, UnpicklingError)


def fingerprint_of(
    settings: Training, seed: int, rows: Dataset, model: nn.Module, teacher: nn.Module | None
) -> dict[str, Any]:
    """What tells one training run from another: its settings and the digests of all that it reads."""
    return {
        **asdict(settings),
        "seed": seed,
        "rows": len(rows),
        "data": digest_of_rows(rows),
        "model": digest_of_weights(model),
        "teacher": digest_of_weights(teacher) if teacher is not None else None,
    }


def digest_of_rows(rows: Dataset) -> str:
    """The SHA-256 of tokenized rows."""
    plain = rows.with_format(None)  # the text of a long array leaves out its middle
    return digest_of(repr(batch).encode() for batch in plain.iter(1000))


def digest_of_weights(model: nn.Module) -> str:
    """The SHA-256 of a model's weights."""
    return digest_of(
        tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for tensor in model.state_dict().values()
    )


def digest_of(parts: Iterable[bytes]) -> str:
    """The SHA-256 of what comes in parts."""
    digest = sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, fingerprint: dict[str, Any]) -> None:
    """Writes `folder/step-N` beside its name first, then removes the older ones.

    The run's fingerprint lies beside it, so that no other run resumes it.

    Raises:
        NotWritten: For a checkpoint that cannot be written, as to a full disk.
    """
    partial, whole = folder / "partial", folder / f"step-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_whole(folder / FINGERPRINT, json.dumps(fingerprint, indent=2))
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not checkpoints_in(folder):
            delete_checkpoints(folder)
        raise NotWritten(
            f"{whole} could not be written ({first_line(error)}); the checkpoints before it are kept"
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        partial.rename(whole)
        for older in checkpoints_in(folder)[:-1]:
            shutil.rmtree(folder / f"step-{older}")


def resume(accelerator: Accelerator, folder: Path | None, fingerprint: dict[str, Any]) -> int:
    """Loads the newest checkpoint, if there is one; returns the step that it was taken at.

    Raises:
        UserError: For checkpoints of a run with other settings, another model or other data, or that are damaged, and
            for a file where they are to be.
    """
    if folder is not None and folder.is_file():
        raise UserError(f"{folder} is a file; expected a folder for checkpoints")
    if folder is None or not checkpoints_in(folder):
        return 0
    refuse_another(folder / FINGERPRINT, fingerprint)
    step = checkpoints_in(folder)[-1]
    say(f"Resuming from step {step}")
    with reading_back(folder / f"step-{step}", folder):
        accelerator.load_state(str(folder / f"step-{step}"))
    return step


def refuse_another(file: Path, found: dict[str, Any]) -> None:
    """Raises a `UserError` where the run that left a file in its folder was told or given something else."""
    with reading_back(file, file.parent):
        theirs = dict(json.loads(file.read_text(encoding="utf-8")))
    if other := [name for name in found if theirs.get(name) != found[name]]:
        raise UserError(
            f"{file.parent} holds a run with another {' and '.join(other)}; resume with that, or delete it"
        )


@contextmanager
def reading_back(file: Path, folder: Path) -> Iterator[None]:
    """Turns a failure to read back a run's files into one line that says which, and what to do.

    Raises:
        UserError: Where reading a file, or a folder of files, in the `folder` of a run fails.
    """
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, EOFError, *DAMAGED) as error:
        raise UserError(
            f"{file} could not be read ({first_line(error)}); if it is damaged, delete {folder} to start anew"
        ) from error


def checkpoints_in(folder: Path) -> list[int]:
    """The steps of the whole checkpoints in a folder, oldest first."""
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def delete_checkpoints(folder: Path) -> None:
    """Deletes a run's checkpoints, once what they led to is saved; anything else in the folder stays."""
    if not is_main_process():
        return
    for step in checkpoints_in(folder):
        shutil.rmtree(folder / f"step-{step}")
    shutil.rmtree(folder / "partial", ignore_errors=True)
    (folder / FINGERPRINT).unlink(missing_ok=True)
    with suppress(OSError):  # it is not there, or there is something else in it
        folder.rmdir()
