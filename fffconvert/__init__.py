"""Turn a trained BERT-family model into the same model with fast feedforward trees for FFNs.

    import fffconvert
    from transformers import pipeline

    classify = pipeline("text-classification", "folder-of-a-converted-model")

Importing this package makes the Auto classes of `transformers` know converted models. The public verbs
and types are imported when they are first used, so that the import itself is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fffconvert.registration import register_when_imported

if TYPE_CHECKING:
    from fffconvert.calibration import calibrate as calibrate
    from fffconvert.checkpoint import Loaded as Loaded
    from fffconvert.checkpoint import load as load
    from fffconvert.checkpoint import save as save
    from fffconvert.conversion import Conversion as Conversion
    from fffconvert.conversion import convert as convert
    from fffconvert.data import Data as Data
    from fffconvert.data import read_data as read_data
    from fffconvert.data import read_validations as read_validations
    from fffconvert.distillation import distill as distill
    from fffconvert.errors import UserError as UserError
    from fffconvert.evaluation import evaluate as evaluate
    from fffconvert.export import export_onnx as export_onnx
    from fffconvert.fff import FFF as FFF
    from fffconvert.finetuning import finetune as finetune
    from fffconvert.hub import Push as Push
    from fffconvert.hub import push as push
    from fffconvert.inspection import Info as Info
    from fffconvert.inspection import env as env
    from fffconvert.inspection import info as info
    from fffconvert.latency import Latency as Latency
    from fffconvert.latency import benchmark as benchmark
    from fffconvert.pipeline import Result as Result
    from fffconvert.pipeline import run as run
    from fffconvert.quantization import quantize as quantize
    from fffconvert.recipe import DataSource as DataSource
    from fffconvert.recipe import Recipe as Recipe
    from fffconvert.recipe import Training as Training
    from fffconvert.recipe import load_recipe as load_recipe
    from fffconvert.report import LayerFit as LayerFit
    from fffconvert.scores import Scores as Scores
    from fffconvert.tasks import TASKS as TASKS
    from fffconvert.tasks import Task as Task
    from fffconvert.tree import TreeShape as TreeShape

__version__ = "0.1.0"

_NAMES = {
    "calibration": ("calibrate",),
    "checkpoint": ("Loaded", "load", "save"),
    "conversion": ("Conversion", "convert"),
    "data": ("Data", "read_data", "read_validations"),
    "distillation": ("distill",),
    "errors": ("UserError",),
    "evaluation": ("evaluate",),
    "export": ("export_onnx",),
    "fff": ("FFF",),
    "finetuning": ("finetune",),
    "hub": ("Push", "push"),
    "inspection": ("Info", "env", "info"),
    "latency": ("Latency", "benchmark"),
    "pipeline": ("Result", "run"),
    "quantization": ("quantize",),
    "recipe": ("DataSource", "Recipe", "Training", "load_recipe"),
    "report": ("LayerFit",),
    "scores": ("Scores",),
    "tasks": ("TASKS", "Task"),
    "tree": ("TreeShape",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


register_when_imported()
