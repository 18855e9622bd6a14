"""The folder `OUTPUT.work` for what a run has in progress, by which it is resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

from fffconvert.accelerator import wait_for_everyone
from fffconvert.display import is_main_process
from fffconvert.errors import NotWritten, UserError
from fffconvert.folders import LOCK, locked, refuse_existing
from fffconvert.recipe import RECIPE, Recipe

TEACHER = "teacher"
INPUTS = "inputs.json"  # what tells the teacher and the data of a run from others
BEFORE_DISTILLATION = ".start"  # of the folder with a student as it was before distillation


def open_work(recipe: Recipe, output: Path, resume: bool) -> Path:
    """The folder for work in progress: a new one, or that of the run to resume.

    Raises:
        UserError: For something in the way of the output, no run to resume, or one of another recipe.
    """
    ended = resume and made_by(recipe, output)
    if not ended:
        check_outputs(recipe, output)
    work = output.with_name(f"{output.name}.work")
    saved = work / RECIPE
    if is_main_process():
        if resume and not saved.exists() and not ended:
            raise UserError(f"{work} holds no run to resume; leave --resume out")
        if saved.exists():
            with locked(work):  # which says so where that run is still at work
                if not resume:
                    raise UserError(f"{work} holds a run that did not end; go on with --resume, or delete it")
                if not made_by(recipe, work):
                    raise UserError(
                        f"{saved} is another recipe than this one; resume with that one, or delete {work}"
                    )
        else:
            refuse_existing(work)  # it will be deleted
    wait_for_everyone()
    return work


def check_outputs(recipe: Recipe, output: Path) -> None:
    """Raises a `UserError` where something is in the way of what a run writes."""
    refuse_existing(output)
    if recipe.finetune is not None:
        refuse_existing(teacher_folder(output))


def made_by(recipe: Recipe, folder: Path) -> bool:
    """Whether a folder was made by a recipe."""
    saved = folder / RECIPE
    return saved.is_file() and saved.read_text(encoding="utf-8", errors="replace") == recipe.to_yaml()


def teacher_folder(output: Path) -> Path:
    """Where a fine-tuned teacher is kept."""
    return output.with_name(f"{output.name}-{TEACHER}")


def clear_if_nothing_to_resume(work: Path, error: Exception) -> None:
    """Deletes the folder of a run that failed before anything was trained: what was asked of it was wrong."""
    refused = isinstance(error, UserError) and not isinstance(error, NotWritten)
    kept = {path.name for path in work.iterdir() if not (refused and path.suffix == BEFORE_DISTILLATION)}
    if kept <= {RECIPE, INPUTS, LOCK}:
        clear(work)


def clear(work: Path) -> None:
    """Deletes what was in progress but the lock, and the recipe last: by that a run which is killed here is resumed."""
    for path in sorted(work.iterdir(), key=lambda path: path.name == RECIPE):
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
