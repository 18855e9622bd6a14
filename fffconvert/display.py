"""What people see while they wait and when it is done: progress on stderr, tables on stdout."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

T = TypeVar("T")

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def is_main_process() -> bool:
    """Whether this is the process that speaks: of several under `accelerate launch`, the first."""
    return os.environ.get("RANK", "0") == "0"


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yields `items` under a progress bar; `total` where it cannot be read off them."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=err, disable=not is_main_process()) as progress:
        if total is None and hasattr(items, "__len__"):
            total = len(items)
        task = progress.add_task(description, total=total, note="")
        for item in items:
            yield item
            progress.advance(task)


def say(message: str) -> None:
    """One line about what happens next, on stderr."""
    if is_main_process():
        err.print(message)


def table(title: str, columns: list[str], rows: Iterable[Iterable[object]]) -> None:
    """Prints a table on stdout: text to the left, numbers to the right."""
    rows = [[_cell(value) for value in row] for row in rows]
    drawn = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        numeric = all(_is_number(row[number]) for row in rows)
        drawn.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        drawn.add_row(*row)
    if is_main_process():
        out.print(drawn)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    return text == "–" or text.rstrip("%x").replace(".", "", 1).replace("-", "", 1).replace("e", "", 1).isdigit()
