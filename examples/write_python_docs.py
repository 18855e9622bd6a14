"""Writes the documentation of Python's standard library as text, one sentence per line.

python examples/write_python_docs.py python-docs.txt
"""

import sys
from pathlib import Path

from fffconvert.python_docs import standard_library_sentences


def main(output: str) -> None:
    lines = list(standard_library_sentences())
    Path(output).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{output}: {len(lines)} sentences")


if __name__ == "__main__":
    main(sys.argv[1])
