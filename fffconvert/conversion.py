"""A dense model in, the same model with trees for FFNs out: closed form, no training."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fffconvert.calibration import MAX_LENGTH, Text, calibrate, encode, evaluating, readable_length
from fffconvert.dense import DenseFFN
from fffconvert.display import track
from fffconvert.errors import UserError
from fffconvert.families import base_of, family_of, ffn_inputs_of, read_ffns, replace_projections
from fffconvert.fff import FFF
from fffconvert.fit import Init, fit_layer
from fffconvert.int8 import Int8Linear
from fffconvert.modeling import config_class, config_with, converted_family, is_converted, model_class
from fffconvert.tree import TreeShape

DEFAULT_TREE = TreeShape(depth=7, leaf_width=12)
"""About 1% of MiniLM's 1,536 neurons, 0.5% of BERT-base's 3,072."""

CALIBRATION_TOKENS = 65_536
TEXTS_TO_COMPARE = 64
HELD_OUT = 0.1  # of the calibration tokens, to judge the fit on


@dataclass(frozen=True)
class LayerFit:
    """How well one layer was fitted.

    Attributes:
        layer: Its number, from 0.
        error: Squared error of its output on held-out tokens, relative to that of the mean output (so the
            control without an FFN has 1). On inputs of the dense model: errors of layers below are not in it.
        smallest_leaf: Share of the calibration tokens in the leaf with the fewest.
        largest_leaf: Share in the leaf with the most. Balanced leaves have `1 / n_leaves` each.
    """

    layer: int
    error: float
    smallest_leaf: float
    largest_leaf: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `report.json` holds them."""
        return asdict(self)


@dataclass(frozen=True)
class Conversion:
    """A converted model, and how well each of its layers was fitted."""

    model: PreTrainedModel
    layers: list[LayerFit]


def convert(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Text],
    tree: TreeShape = DEFAULT_TREE,
    init: Init = "inputs",
    calibration_tokens: int = CALIBRATION_TOKENS,
    seed: int = 0,
    max_length: int = MAX_LENGTH,
) -> Conversion:
    """Replaces every FFN of a dense model by a tree grown from its weights and from text.

    Args:
        model: A dense model of a known family, any head. Left as it was.
        tokenizer: Its tokenizer.
        texts: Calibration text, like what the model will read; labels are not needed.
        tree: The shape of every layer.
        init: What is clustered to grow the trees: the FFNs' `inputs`, their `neurons`, or nothing (`random`).
        calibration_tokens: Tokens of `texts` to use; sets the memory (see `calibrate`).
        seed: Decides every draw; the same seed gives the same model.
        max_length: Tokens that a text is cut at.

    Returns:
        A new model, in the dtype and on the device of `model`, with the fit of each layer.

    Raises:
        UserError: For a model that cannot be converted, no text, or a shape that the model cannot fill.
    """
    refuse_converted(model)
    inputs = calibrate(model, tokenizer, texts, calibration_tokens, seed, max_length)
    return build(model, inputs, tree, init, seed)


def build(model: PreTrainedModel, inputs: list[Tensor], tree: TreeShape, init: Init, seed: int) -> Conversion:
    """As `convert`, from the FFN inputs that `calibrate` collected, one tensor per layer."""
    refuse_converted(model)
    family = family_of(model.config)
    layers, fits = [], []
    described = track(list(zip(read_ffns(model, family), inputs, strict=True)), "Growing trees")
    for number, (ffn, x) in enumerate(described):
        n_held_out = max(1, int(HELD_OUT * len(x)))
        held_out, fitted = x[:n_held_out], x[n_held_out:] if len(x) > 1 else x
        layers.append(fit_layer(ffn, fitted, tree, init, seed + number))
        fits.append(measure(number, ffn, layers[-1], fitted, held_out))
    config = config_with(model.config, config_class(family), fff=tree.to_dict())
    student = model_class(type(model))(config)  # type: ignore[arg-type]
    keys = student.load_state_dict(model.state_dict(), strict=False)
    for place, layer in zip(ffn_inputs_of(student, family), layers, strict=True):
        place.load_state_dict(layer.state_dict())
    expected = {key for key in student.state_dict() if key.rsplit(".", 1)[-1] in layers[0].parameter_shapes()}
    if set(keys.missing_keys) - expected:
        raise UserError(f"{type(model).__name__} lacks weights that its class has: {keys.missing_keys}")
    student.to(model.device, model.dtype)  # type: ignore[arg-type]
    return Conversion(student.eval(), fits)


def quantize(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a converted model for inference on a CPU, the attention's projections stored in int8.

    Every `nn.Linear` inside the layers is one of these projections. Trees, embeddings, LayerNorm, pooler and
    head stay as they are.

    Args:
        model: A converted model, trained if it is to be: int8 models cannot be.

    Raises:
        UserError: For a model that is not converted, is int8 already, or is not in float32 on the CPU.
    """
    if not is_converted(model.config):
        raise UserError(f"{model.config.model_type}: this model is dense; expected a converted one")
    if model.config.int8_projections:
        raise UserError("this model's projections are int8 already")
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise UserError(
            f"int8 is made from float32 on the CPU; this model is {model.dtype} on {model.device.type}"
        )
    quantized = deepcopy(model).eval()
    quantized.config.int8_projections = True
    replace_projections(quantized, converted_family(model.config), Int8Linear.from_linear)
    return quantized


@torch.no_grad()
def rounding_error(
    model: PreTrainedModel,
    quantized: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Text],
) -> float:
    """How far int8 moves the last hidden states on a few texts: relative error, 0 for not at all."""
    length = readable_length(tokenizer, model.config, MAX_LENGTH)
    inputs = encode(tokenizer, list(islice(texts, TEXTS_TO_COMPARE)), length)
    real = inputs["attention_mask"].bool()  # (n_texts, n_tokens)
    with evaluating(model), evaluating(quantized):
        exact, rounded = (base_of(each)(**inputs)[0][real] for each in (model, quantized))
    return float((rounded - exact).norm() / exact.norm())


def refuse_converted(model: PreTrainedModel) -> None:
    """Raises a `UserError` for a model that has trees already."""
    if is_converted(model.config):
        raise UserError(f"{model.config.model_type}: this model is converted already; expected a dense one")


@torch.no_grad()
def measure(number: int, ffn: DenseFFN, layer: FFF, fitted: Tensor, held_out: Tensor) -> LayerFit:
    """The error of a fitted layer on held-out inputs, and how evenly its leaves are used."""
    target = ffn(held_out)  # (n_held_out, d_model)
    spread = (target - target.mean(0)).square().sum().clamp_min(torch.finfo(target.dtype).tiny)
    leaves = layer.leaf_of(fitted)  # (n_tokens, n_trees)
    shares = torch.stack([torch.bincount(leaf, minlength=layer.shape.n_leaves) for leaf in leaves.T]) / len(
        fitted
    )
    return LayerFit(
        layer=number,
        error=float((layer(held_out) - target).square().sum() / spread),
        smallest_leaf=float(shares.min()),
        largest_leaf=float(shares.max()),
    )
