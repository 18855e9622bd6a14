"""The house rules that hold the package together: imports go downwards only, and come late where they are slow."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import fffconvert

PACKAGE = Path(fffconvert.__file__).parent

# From the bottom up: a module imports only what stands on a line above its own.
LAYERS = """
batch clock errors display machine modes python_docs remote
files folders heads sentence tree
cluster kernels loss onednn recipe tasks
accelerator dense fff glue labels metrics options
families fit int8 loader resumption
activations configuration report text
modeling
encoding export sensitivity training
calibration onnx_runtime
card conversion estimate finetuning pair quantization registration
distillation inference scores sources twins
checkpoint columns evaluation latency
hub inspection workspace
comparison data tables
students
pipeline
dry_run
cli
""".strip().splitlines()

RANK = {module: number for number, line in enumerate(LAYERS) for module in line.split()}
OUTSIDE = {"__init__", "__main__"}  # the door: hands out names, and imports them when they are asked for

# Libraries that stay behind the modules that are about them.
HOME_OF = {
    "click": {"cli", "options"},
    "rich": {"display"},
    "accelerate": {"accelerator", "loader", "resumption", "training"},
    "yaml": {"recipe"},
    "pandas": {"files"},
    "sklearn": {"cluster", "metrics"},
}


def name_of(file: Path) -> str:
    """A file's module below `fffconvert`: of a sub-package, the sub-package."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def sources() -> list[tuple[str, ast.Module]]:
    """Every module of the package and what is written in it."""
    return [
        (name_of(file), ast.parse(file.read_text(encoding="utf-8"))) for file in sorted(PACKAGE.rglob("*.py"))
    ]


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of all that is imported anywhere in a module, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only, so that this test can read them"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def edges() -> set[tuple[str, str]]:
    """Pairs of a module and another one of the package that it imports."""
    found = {
        (module, name.split(".")[1])
        for module, tree in sources()
        for name in imported(tree)
        if name.startswith("fffconvert.")
    }
    return {(module, other) for module, other in found if module != other and other in RANK}


def test_every_module_has_its_layer() -> None:
    assert {module for module, _ in sources()} - OUTSIDE == set(RANK)


def test_imports_go_downwards_only() -> None:
    upwards = {
        (module, other) for module, other in edges() if module not in OUTSIDE and RANK[other] >= RANK[module]
    }
    assert not upwards


def test_libraries_stay_behind_their_modules() -> None:
    found = {
        library: {
            module for module, tree in sources() for name in imported(tree) if name.split(".")[0] == library
        }
        for library in HOME_OF
    }
    assert found == HOME_OF


def test_kernels_know_only_the_tree() -> None:
    assert {other for module, other in edges() if module == "kernels"} == {"errors", "tree"}


# ---- What comes late


def python(code: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import fffconvert",
        "import fffconvert.cli",
        "from fffconvert.cli import main; main(['--help'], standalone_mode=False)",
        "import fffconvert; fffconvert.TreeShape, fffconvert.Recipe, fffconvert.UserError",
    ],
    ids=["package", "cli", "help", "light_names"],
)
def test_no_torch(code: str) -> None:
    slow = "torch transformers datasets accelerate sklearn scipy numpy pandas".split()  # noqa: SIM905
    assert python(f"{code}\nimport sys\nprint([x for x in {slow} if x in sys.modules])").endswith("[]\n")


def test_every_public_name_is_there_and_typed() -> None:
    """The lazy table, the names for type checkers, and the modules say the same."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    assert typed == set(fffconvert.__all__) - {"__version__"}
    for name in fffconvert.__all__:
        assert getattr(fffconvert, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'convrt'"):
        _ = fffconvert.convrt
