"""Turn a trained BERT-family model into the same model with fast feedforward trees for FFNs.

    import fffconvert
    from transformers import pipeline

    classify = pipeline("text-classification", "folder-of-a-converted-model")

Importing this package makes the Auto classes of `transformers` know converted models. The public verbs
below are imported when they are first used, so that the import itself is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fffconvert.registration import register_when_imported

if TYPE_CHECKING:
    from fffconvert.conversion import Conversion as Conversion
    from fffconvert.conversion import LayerFit as LayerFit
    from fffconvert.conversion import convert as convert
    from fffconvert.errors import UserError as UserError
    from fffconvert.fff import FFF as FFF
    from fffconvert.tree import TreeShape as TreeShape

__version__ = "0.1.0"

_HOME = {
    "Conversion": "conversion",
    "FFF": "fff",
    "LayerFit": "conversion",
    "TreeShape": "tree",
    "UserError": "errors",
    "convert": "conversion",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


register_when_imported()
