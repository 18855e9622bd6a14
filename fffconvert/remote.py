"""The code of a converted model in one flat file, for `transformers` to load where fffconvert is not installed.

`from_pretrained(folder, trust_remote_code=True)` runs the file that lies beside the weights; it may import
torch and `transformers`, and nothing of ours. So the file is put together from this package's own sources:
every definition that `fffconvert.modeling` needs, word for word, in plain PyTorch. Nothing is written twice.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_ROOT = "fffconvert.modeling"
_WANTED = {"__getattr__", "flat_source"}  # the first makes each class that `auto_map` names
_INSTEAD = {"fffconvert.kernels": "fffconvert.kernels.reference"}  # the plain side of that door

_HEADER = '''\
# Copyright the fffconvert authors. SPDX-License-Identifier: Apache-2.0
"""A converted model's code in plain PyTorch, for `from_pretrained(..., trust_remote_code=True)`.

Put together from the sources of fffconvert {version}. With fffconvert installed and imported, its own classes
serve instead, on a much faster kernel.
"""

from __future__ import annotations
'''
_FLAT_SOURCE = '''\
def flat_source() -> str:
    """The text of this file."""
    return Path(__file__).read_text(encoding="utf-8")
'''


@cache
def flat_source() -> str:
    """The text of the file."""
    from fffconvert import __version__

    imports: dict[str, tuple[str, str]] = {}  # name → the module it is from, and how it is asked for
    definitions = {"flat_source": _FLAT_SOURCE}  # name → source
    for module in _modules(_ROOT):
        _read(_source(module), imports, definitions)
    needed = _needed(_WANTED, definitions)
    header = [_HEADER.format(version=__version__), *_import_lines(imports, needed)]
    kept = dict.fromkeys(text for name, text in definitions.items() if name in needed)
    return "\n\n\n".join(["\n".join(header), *(text.strip("\n") for text in kept)]) + "\n"


def _source(module: str) -> str:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def _modules(module: str, seen: set[str] | None = None) -> Iterator[str]:
    """The module and all of ours that it imports, those it imports first."""
    seen = set() if seen is None else seen
    if module in seen or module == __name__:
        return
    seen.add(module)
    for node in ast.walk(ast.parse(_source(module))):
        if isinstance(node, ast.ImportFrom) and _is_ours(node):
            yield from _modules(_INSTEAD.get(str(node.module), str(node.module)), seen)
    yield module


def _is_ours(node: ast.ImportFrom) -> bool:
    return str(node.module).split(".")[0] == "fffconvert"


def _read(source: str, imports: dict[str, tuple[str, str]], definitions: dict[str, str]) -> None:
    """Adds what one module imports and defines at its top level to what the others do."""
    lines = source.splitlines()
    end, last = 0, ""
    for node in ast.parse(source).body:
        start, end = end, node.end_lineno or 0
        text = "\n".join(lines[start:end])  # with the comment above it
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = "" if isinstance(node, ast.Import) else str(node.module)
            if module != "__future__" and not (isinstance(node, ast.ImportFrom) and _is_ours(node)):
                imports |= {a.asname or a.name: (module, ast.unparse(a)) for a in node.names}
        elif isinstance(node, ast.Expr) and last:  # its docstring, or what an operator is told about itself
            definitions[last] += f"\n{text}"
        for last in _defined(node):
            if last in definitions:
                raise ValueError(f"{last} is defined twice among the modules of the flat file")
            definitions[last] = text


def _defined(node: ast.stmt) -> list[str]:
    """The names that a top-level statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _needed(names: set[str], definitions: dict[str, str]) -> set[str]:
    """The names, all that their definitions use, and so on."""
    found: set[str] = set()
    while new := names - found:
        found |= new
        trees = [ast.parse(definitions[name]) for name in new if name in definitions]
        names = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return found


def _import_lines(imports: dict[str, tuple[str, str]], needed: set[str]) -> list[str]:
    """The imports of what is needed, the standard library's apart and first."""
    by_module: dict[str, list[str]] = {}
    for name, (module, asked_for) in sorted(imports.items()):
        if name in needed:
            by_module.setdefault(module or f"import {asked_for}", []).append(asked_for)
    lines = {
        m if m.startswith("import ") else f"from {m} import {', '.join(n)}" for m, n in by_module.items()
    }
    standard = {line for line in lines if line.split()[1].split(".")[0] in sys.stdlib_module_names}
    return [*sorted(standard), "", *sorted(lines - standard)]
