"""Folders that appear whole or not at all, and in which one run works at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fffconvert.display import is_main_process
from fffconvert.errors import UserError

LOCK = "lock"  # of the run that is at work in a folder
LONGEST_NAME = 255 - len("..writing")
"""In bytes: most file systems take 255, and a folder is written beside its name."""


def refuse_existing(folder: Path) -> None:
    """Raises a `UserError` for an output folder that has something in it already, or cannot be one."""
    if folder.name in ("", ".."):
        raise UserError(f"{folder} is a folder that is there; name a new one")
    if len(os.fsencode(folder.name)) > LONGEST_NAME:
        raise UserError(f"{folder} has too long a name; expected at most {LONGEST_NAME} bytes")
    if folder.is_symlink():
        raise UserError(f"{folder} is a link; name the folder itself")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; expected a folder")
    if folder.is_mount():
        raise UserError(f"{folder} is a mount point; name a folder in it")
    existing = next(path for path in folder.absolute().parents if os.path.lexists(path))
    if not existing.exists():
        raise UserError(f"{existing} is a link to nothing; expected a folder to write {folder} in")
    if not existing.is_dir():
        raise UserError(f"{existing} is a file; expected a folder to write {folder} in")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{existing} cannot be written to; name an output folder elsewhere")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not empty; name a new folder or delete it")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to fill; it gets its name when all is written, and is deleted if anything fails.

    Raises:
        UserError: For a folder that is not empty, or that another run is writing.
    """
    refuse_existing(folder)
    beside = folder.with_name(f".{folder.name}.writing")
    with locked(beside):
        whole = beside / "whole"
        shutil.rmtree(whole, ignore_errors=True)  # of a run that was killed
        whole.mkdir()
        try:
            yield whole
            refuse_existing(folder)
            if folder.exists():
                folder.rmdir()
            whole.rename(folder)
        finally:
            shutil.rmtree(whole, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets no other run work in a folder for a while; one that is killed keeps nobody out.

    The folder is made where it is not there, and deleted where nothing is left in it.

    Raises:
        UserError: Where another one does.
    """
    if not is_main_process():
        yield
        return
    lock = FileLock(folder / LOCK)
    for last in (False, False, True):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            break
        except Timeout as error:
            raise UserError(
                f"another run is at work in {folder}; wait for it, or name another output"
            ) from error
        except (FileNotFoundError, FileExistsError):  # whoever was here before deletes it just now
            if last:
                raise
    try:
        yield
    finally:
        over, windows = {path.name for path in folder.iterdir()} <= {LOCK}, os.name == "nt"
        if over and not windows:
            (folder / LOCK).unlink()  # while it is held: later somebody else may have it
        lock.release()
        if over:
            with suppress(OSError):  # somebody else has come
                if windows:  # which deletes no file that is open
                    (folder / LOCK).unlink()
                folder.rmdir()


def write_whole(file: Path, text: str) -> None:
    """Writes a file whole or not at all: after a kill the old one or the new one is there, never a part."""
    beside = file.with_name(f"{file.name}.writing")
    try:
        beside.write_text(text, encoding="utf-8")
    except OSError:  # a full disk
        beside.unlink(missing_ok=True)
        raise
    beside.replace(file)
