"""Models of a converted one's size, which latency is compared with."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fffconvert.configuration import is_int8, shape_of
from fffconvert.families import Family, family_of, layers_of, replace_projections
from fffconvert.modeling import config_with, counterpart, dense_class_of
from fffconvert.onednn import ONEDNN, OneDNNLinear
from fffconvert.quantization import quantize
from fffconvert.tree import REMOVED, TreeShape, narrow

LIMIT = "FFNs removed"


def models_beside(
    model: PreTrainedModel, dense: PreTrainedModel, family: Family
) -> dict[str, PreTrainedModel]:
    """A converted model and what it is compared with, by name; all but int8 in its dtype."""
    if dense.dtype != model.dtype:  # training is in float32, whatever the original was in
        dense = deepcopy(dense).to(model.dtype)  # type: ignore[arg-type]
    models = {"dense": dense, "converted": model, LIMIT: without_ffns(model)}
    shape = shape_of(model.config)
    if shape.depth > 0:
        models["narrow"] = untrained_twin(model, narrow(shape))
    if model.dtype == torch.float32 and ONEDNN:
        models["dense oneDNN"] = by_onednn(dense, family)
    if not is_int8(model.config) and model.dtype == torch.float32:  # which is what int8 is made from
        models["converted int8"] = quantize(model)
    return models


@torch.random.fork_rng(devices=[])
def untrained_twin(model: PreTrainedModel, shape: TreeShape | None = None) -> PreTrainedModel:
    """An untrained model of the same size and head: converted to another shape, or dense."""
    cls: Any = type(model) if shape is not None else dense_class_of(type(model))
    kept: dict[str, Any] = {}
    if shape is not None:
        kept = {"fff": shape.to_dict(), "int8_projections": is_int8(model.config)}
    return counterpart(model, cls, config_with(model.config, cls.config_class, **kept))


def by_onednn(dense: PreTrainedModel, family: Family) -> PreTrainedModel:
    """A dense model with the same weights, whose linear layers use oneDNN, as a converted one's do."""
    twin = deepcopy(dense, {id(parameter): parameter for parameter in dense.parameters()})
    replace_projections(twin, family, OneDNNLinear.from_linear)
    return twin


def without_ffns(model: PreTrainedModel) -> PreTrainedModel:
    """The limit: an untrained model of the same size where an FFN gives back its input."""
    family = family_of(model.config)
    twin = untrained_twin(model, REMOVED)
    for layer in layers_of(twin, family):
        layer.set_submodule(family.place, nn.Identity())
    return twin
