"""What people see, and that only one process of several says it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fffconvert import display


def test_a_log_keeps_a_line_whole(capsys):
    display.say("word " * 60)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_without_stdout_there_is_still_a_program():
    code = "import sys; sys.stdout = None; import fffconvert.display"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_log_gets_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(display.time, "monotonic", iter([0.0, 1.0, 16.0, 16.5, 17.0, 18.0, 19.0]).__next__)
    with display.progress_bar("Working", total=4) as advance:
        for step in range(4):
            advance(f"step {step}")
    assert capsys.readouterr().err.splitlines() == ["Working 2/4  step 1", "Working 4/4  step 3"]


def test_track_gives_all_items(capsys):
    assert list(display.track("abc", "Reading")) == ["a", "b", "c"]
    assert "Reading 3/3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ranks", "speaks"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "1", "LOCAL_RANK": "1"}, False),
        ({"RANK": "1"}, True),  # as a cluster numbers its machines
    ],
)
def test_the_first_process_speaks(ranks, speaks, capsys, monkeypatch):
    for name, rank in ranks.items():
        monkeypatch.setenv(name, rank)
    display.say("hello")
    display.table("title", ["a"], [[1]])
    out, err = capsys.readouterr()
    assert (bool(out), bool(err)) == (speaks, speaks)


def test_what_stands_in_brackets_is_shown(capsys):
    display.say("pip install 'fffconvert[onnx]' into [/old]", style="bold")
    display.table("a [/old]", ["[a]"], [["[red]wide enough"]])
    out, err = capsys.readouterr()
    assert "'fffconvert[onnx]' into [/old]" in err
    assert all(text in out for text in ("a [/old]", "[a]", "[red]wide"))


def test_a_table_shows_numbers_short_and_nothing_as_a_dash(capsys):
    display.table("Scores", ["name", "score"], [("one", 0.123456), ("two", None), ("three", "12.5%")])
    out = capsys.readouterr().out
    assert "0.1235" in out
    assert "–" in out
    row = next(line for line in out.splitlines() if "three" in line)
    assert row.rstrip().endswith("12.5% │"), "numbers stand to the right"
