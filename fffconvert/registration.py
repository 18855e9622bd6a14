"""Makes `transformers` know converted models when both are imported, in either order, without delay.

Registering needs torch and `transformers`, and `import fffconvert` must stay quick. So it waits until
the Auto classes are imported, which every way of loading a model does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

AUTO_CLASSES = "transformers.models.auto.modeling_auto"


def _register() -> None:
    from fffconvert.modeling import register

    register()


class _ThenRegister(Loader):
    """Runs a module's own loader, then registers."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()


class _WaitForAutoClasses(MetaPathFinder):
    """Steps in once, at the import of the Auto classes."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AUTO_CLASSES:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


def register_when_imported() -> None:
    """Registers now if the Auto classes are imported already, else when they are."""
    if AUTO_CLASSES in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WaitForAutoClasses())
