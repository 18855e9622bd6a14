"""Folders that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock

from fffconvert.errors import UserError
from fffconvert.folders import new_folder, refuse_existing


def test_what_cannot_become_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="/proc is a mount point; name a folder in it"):
        refuse_existing(Path("/proc"))
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=f"{tmp_path}/link is a link to nothing; expected a folder to write"):
        refuse_existing(tmp_path / "link" / "new" / "out")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match=f"{tmp_path} cannot be written to; name an output folder elsewhere"):
        refuse_existing(tmp_path / "new" / "out")


def test_a_name_is_as_long_as_can_be_written(tmp_path: Path) -> None:
    with new_folder(tmp_path / ("ü" * 123)) as folder:
        (folder / "weights").touch()
    for longer in ("ü" * 123 + "o", "o" * 300):
        with pytest.raises(UserError, match=f"{longer} has too long a name; expected at most 246 bytes"):
            refuse_existing(tmp_path / longer)


def test_two_that_write_one_folder_do_not_meet(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with new_folder(folder) as first:
        (first / "weights").write_text("first")
        with pytest.raises(UserError, match="another run is at work"), new_folder(folder):
            pytest.fail("both write")
    assert (folder / "weights").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_who_comes_second_does_not_replace_what_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "out"

    def write_after_another() -> None:
        with new_folder(folder):
            folder.mkdir()
            (folder / "weights").write_text("another's")

    with pytest.raises(UserError, match="exists and is not empty"):
        write_after_another()
    assert (folder / "weights").read_text() == "another's"


def test_a_folder_called_as_the_lock_is_written_too(tmp_path: Path) -> None:
    with new_folder(tmp_path / "lock") as folder:
        (folder / "weights").touch()
    assert (tmp_path / "lock" / "weights").exists()


def test_a_folder_that_another_run_deletes_just_now_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire, asked = FileLock.acquire, []

    def late(self: FileLock, **how: float) -> object:
        asked.append(how)
        if len(asked) == 1:
            Path(self.lock_file).parent.rmdir()
            raise FileNotFoundError
        return acquire(self, **how)

    monkeypatch.setattr(FileLock, "acquire", late)
    with new_folder(tmp_path / "out") as folder:
        (folder / "weights").touch()
    assert (tmp_path / "out" / "weights").exists()


def test_what_a_killed_run_left_behind_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / ".out.writing" / "whole"
    left.mkdir(parents=True)
    (left / "half").touch()
    with new_folder(tmp_path / "out") as folder:
        (folder / "weights").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["weights"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
