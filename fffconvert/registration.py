"""Makes `transformers` know converted models when both are imported, in either order, without delay.

Registering needs torch and `transformers`, and `import fffconvert` must stay quick. So it waits until
`AutoConfig` is imported, which every way of loading a model does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

AUTO_CONFIG = "transformers.models.auto.configuration_auto"
MODELING = "transformers.modeling_utils"
AUTO_MODEL = "transformers.models.auto.modeling_auto"

# Modules that may import `AutoConfig` themselves, and what is in them once they are there.
LAST = {MODELING: "PreTrainedModel", AUTO_MODEL: "AutoModel"}


def _register() -> None:
    if all(name not in sys.modules or hasattr(sys.modules[name], last) for name, last in LAST.items()):
        # registers at its end, also where it is what is being imported now
        import_module("fffconvert.modeling")


class _ThenRegister(Loader):
    """Runs a module's own loader, then registers."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()


class _Wait(MetaPathFinder):
    """Steps in once at the import of each of some modules."""

    def __init__(self, *names: str) -> None:
        self.names = set(names)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.names:
            return None
        self.names.remove(fullname)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


def register_when_imported() -> None:
    """Registers now if `AutoConfig` is imported already, else when it is."""
    if AUTO_CONFIG in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Wait(AUTO_CONFIG, *LAST))
