"""What people see while they wait and when it is done: progress on stderr, tables on stdout."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

T = TypeVar("T")

SECONDS_PER_LINE = 15.0  # of progress, where stderr is not a terminal

out = Console(highlight=False, width=None if sys.stdout is not None and sys.stdout.isatty() else 140)
err = Console(stderr=True, highlight=False)


def is_main_process() -> bool:
    """Whether this is the process that speaks: of several under `accelerate launch`, the first.

    A rank alone, as clusters set it for a job's machines, makes no process one of several; nor does it for Accelerate.
    """
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


@contextmanager
def progress_bar(description: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """A progress bar; yields what moves it on by one, with a note to show behind it.

    Where stderr is a file, a log of a long run say, it is a line now and then instead.
    """
    if not err.is_terminal:
        yield _progress_lines(description, total, done)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=err, disable=not is_main_process()) as progress:
        task = progress.add_task(description, total=total, completed=done, note="")
        yield lambda note: progress.update(task, advance=1, note=note)


def _progress_lines(description: str, total: int, done: int) -> Callable[[str], None]:
    """What prints a line every `SECONDS_PER_LINE`, and at the end."""
    finished, next_line = done, time.monotonic() + SECONDS_PER_LINE

    def advance(note: str) -> None:
        nonlocal finished, next_line
        finished += 1
        if time.monotonic() >= next_line or finished == total:
            say(f"{description} {finished}/{total}  {note}")
            next_line = time.monotonic() + SECONDS_PER_LINE

    return advance


def track(items: Sequence[T], description: str) -> Iterator[T]:
    """Yields `items` under a progress bar."""
    with progress_bar(description, len(items)) as advance:
        for item in items:
            yield item
            advance("")


def say(message: str, style: str | None = None) -> None:
    """One line about what happens next, on stderr. What stands in brackets stays: paths and extras may have them."""
    if is_main_process():
        err.print(message, style=style, markup=False, soft_wrap=True)  # a log keeps its paths whole


def table(title: str, columns: list[str], rows: Iterable[Iterable[object]]) -> None:
    """Prints a table on stdout: text to the left, numbers to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    drawn = Table(title=Text(title), title_justify="left")
    for number, column in enumerate(columns):
        numeric = all(_is_number(row[number]) for row in cells)
        drawn.add_column(Text(column), justify="right" if numeric else "left", no_wrap=True)
    for row in cells:
        drawn.add_row(*map(Text, row))
    if is_main_process():
        out.print(drawn)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    try:
        float(text.rstrip("%x"))
    except ValueError:
        return text == "–"
    return True
