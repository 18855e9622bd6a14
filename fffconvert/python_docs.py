"""Text that every Python has: the documentation in its standard library's docstrings."""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
FEWEST_WORDS, MOST_WORDS = 5, 60
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def standard_library_sentences() -> Iterator[str]:
    """Sentences of the standard library's docstrings, each once, in the order of its files.

    The text is English about programming, of the Python version that runs: more than 10,000 sentences.
    """
    seen: set[str] = set()
    for docstring in docstrings(Path(sysconfig.get_path("stdlib"))):
        for paragraph in re.split(r"\n\s*\n", docstring):
            if ">>>" in paragraph:
                continue  # an example session is not prose
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
                if FEWEST_WORDS <= len(sentence.split()) <= MOST_WORDS and sentence not in seen:
                    seen.add(sentence)
                    yield sentence


def docstrings(folder: Path) -> Iterator[str]:
    """Every docstring in the Python files below a folder."""
    for file in sorted(folder.rglob("*.py")):
        if SKIPPED.intersection(file.relative_to(folder).parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in other people's strings
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"))
            except (OSError, SyntaxError, ValueError):  # a link to nowhere, other people's encodings
                continue
        for node in ast.walk(tree):
            if isinstance(node, Documented) and (docstring := ast.get_docstring(node)):
                yield docstring
