"""Files of rows: tables, and text files with one text per line."""

from __future__ import annotations

import csv
import glob
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TextIO

import pandas
from datasets import Dataset, load_dataset

from fffconvert.errors import UserError

READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
MISSING = {"keep_default_na": False, "na_values": [""]}  # cells of a CSV file: "N/A" may be text, or a class
LONGEST_CELL = 2**31 - 1  # characters; Python's own limit is for its reader alone, not for pandas'
EXPECTED_CONTENT = {
    "csv": "a line with the names of the columns, then one for each row, in UTF-8",
    "json": "one object for each row, in UTF-8",
    "parquet": "a whole Parquet file",
}
"""What a file must hold by its reader."""


def refuse_table(file: Path) -> None:
    """Raises a `UserError` for a table where a text file is expected."""
    if file.suffix.lower() in READERS:
        raise UserError(f"{file} is no text file but a table; give it as --data (in a recipe: data.path)")


def read_file(file: Path) -> Dataset:
    """A table or a text file."""
    reader = READERS.get(file.suffix.lower(), "text")
    if reader in ("text", "csv"):
        return read_tables([file])
    return load_dataset(reader, data_files=glob.escape(str(file)), split="train")


def read_tables(files: list[Path]) -> Dataset:
    """CSV, TSV and text files, whole: `datasets` would tell a column's type from the first 10,000 rows."""
    tables = [
        pandas.DataFrame({"text": list(read_lines(file))})
        if file.suffix.lower() == ".txt"
        else pandas.read_csv(file, **dialect(file), **MISSING, low_memory=False)
        for file in files
    ]
    table = pandas.concat(tables, ignore_index=True)
    if table.empty:
        raise ValueError("it has no rows")
    for name, column in table.items():  # Arrow has no whole numbers past 64 bits
        if column.dtype == object and any(type(value) is int and abs(value) >= 2**63 for value in column):
            table[name] = column.map(str, na_action="ignore")
    return Dataset.from_pandas(table, preserve_index=False)


def dialect(file: Path) -> dict[str, Any]:
    """How a CSV or TSV file is written, in pandas' words: what stands between columns, and whether cells are quoted.

    Quotes in a TSV file mean something where they part it into rows of one length (see `is_quoted`); elsewhere they
    are text.

    Raises:
        UserError: As `check_header` does.
    """
    tabs = file.suffix.lower() == ".tsv"
    separator = "\t" if tabs else ","
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        longest = csv.field_size_limit(LONGEST_CELL)
        try:
            quoting: Literal[0, 3] = csv.QUOTE_NONE if tabs and not is_quoted(lines) else csv.QUOTE_MINIMAL
            lines.seek(0)
            rows = csv.reader(lines, delimiter=separator, quoting=quoting)
            written = (row for row in rows if row)
            names, first = next(written, []), next(written, [])
        finally:
            csv.field_size_limit(longest)
    check_header(file, names, first, separator)
    return {"sep": separator, "quoting": quoting}


def is_quoted(lines: TextIO) -> bool:
    """Whether quotes in a file with tabs mean something: every line closes those that it opens, or every row does.

    A cell with a line break and a tab in it is rather two rows that have a quote each; so is any with a line break
    where there is but one column.
    """
    if not any(line.count('"') % 2 for line in lines):
        return True
    lines.seek(0)
    try:
        rows = [row for row in csv.reader(lines, delimiter="\t", strict=True) if row]
    except csv.Error:
        return False
    cells = (cell for row in rows for cell in row)
    widths = {len(row) for row in rows}
    return len(widths) == 1 and widths != {1} and not any("\t" in cell and "\n" in cell for cell in cells)


def check_header(file: Path, names: list[str], first: list[str], separator: str) -> None:
    """Raises a `UserError` for a file that is no UTF-8, a name that comes twice, another separator, or too few columns.

    Args:
        file: The table.
        names: Its first line, cut at the separator.
        first: Its first row, likewise; nothing where it has no row.
        separator: A comma, or in a `.tsv` a tab.
    """
    if any("\0" in name or "\ufffd" in name for name in names):
        raise UserError(f"{file} is no text in UTF-8; expected {EXPECTED_CONTENT['csv']}")
    if twice := sorted(name for name, times in Counter(names).items() if name and times > 1):
        raise UserError(f"{file} names the column {twice[0]} more than once; expected each name once")
    tabs = separator == "\t"
    expected = "tabs" if tabs else "commas, or tabs in a .tsv"
    for other, what in ((";", "semicolons"), ("|", "bars"), ("\t", "tabs"), (",", "commas")):
        parts = names[0].count(other) if len(names) == 1 and other != separator else 0
        # there may be commas in the name of a lone column
        if parts and (not tabs or (first and first[0].count(other) == parts)):
            raise UserError(f"{file} has {what} between its columns; expected {expected}")
    if len(first) > len(names):
        raise UserError(
            f"{file} names {len(names)} columns and its first row has {len(first)}; expected as many, and quotes "
            "around a text with commas"
        )


def read_lines(file: Path) -> Iterator[str]:
    """The non-empty lines of a text file, one text each, read as they are asked for.

    Raises:
        UserError: For a file that is missing, is a table, is not UTF-8, or has no text in it.
    """
    refuse_table(file)
    empty, number = True, 0
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007
                for part in line.decode("utf-8-sig").split("\r"):
                    if text := part.strip():
                        empty = False
                        yield text
    except OSError as error:
        raise UserError(f"{file} could not be read ({error.strerror}); expected a text file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (line {number}); expected one text per line") from error
    if empty:
        raise UserError(f"{file} is empty; expected one text per line")
