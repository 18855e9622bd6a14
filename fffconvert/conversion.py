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

from fffconvert.calibration import (
    MAX_LENGTH,
    Calibration,
    Text,
    calibrate,
    encode,
    evaluating,
    readable_length,
)
from fffconvert.display import say
from fffconvert.errors import UserError
from fffconvert.families import Family, base_of, family_of, ffn_inputs_of, read_ffns, replace_projections
from fffconvert.fff import FFF
from fffconvert.fit import FEWEST_TOKENS, Init, fit_layer
from fffconvert.int8 import Int8Linear
from fffconvert.kernels import FFFWeights
from fffconvert.modeling import (
    config_class,
    config_with,
    converted_family,
    counterpart,
    is_converted,
    model_class,
    refuse_converted,
)
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
        layer: Its number, from 0; layers that share one FFN (ALBERT) count once.
        error: Squared error of its output on held-out tokens, relative to that of the mean output (so the
            control without an FFN has about 1). What is asked of a layer includes mending the errors of those below.
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
    refuse_converted(model.config)
    check_leaves(tree, init, calibration_tokens)
    calibration = calibrate(model, tokenizer, texts, calibration_tokens, seed, max_length)
    return build(model, calibration, tree, init, seed)


def check_leaves(tree: TreeShape, init: Init, n_tokens: int) -> None:
    """Raises a `UserError` for more leaves than tokens to calibrate on; random trees are grown on nothing."""
    if init != "random" and tree.n_leaves > n_tokens:
        raise UserError(
            f"a tree of depth {tree.depth} has {tree.n_leaves:,} leaves and there are {n_tokens:,} tokens to "
            f"calibrate on; expected a depth of at most {max(1, n_tokens // FEWEST_TOKENS).bit_length() - 1}, "
            "or more calibration tokens"
        )


def build(
    model: PreTrainedModel, calibration: Calibration, tree: TreeShape, init: Init, seed: int
) -> Conversion:
    """As `convert`, from what `calibrate` collected.

    Layers are fitted from the first to the last, each on what the converted layers below really give it. An
    FFN that layers share would be asked to feed itself, so it is fitted on what the dense model gives it.
    """
    refuse_converted(model.config)
    family = family_of(model.config)
    ffns = read_ffns(model, family)
    tree = family.tree_for(model.config, tree)
    check_leaves(tree, init, calibration.n_tokens)
    if init != "random" and tree.n_leaves * FEWEST_TOKENS > calibration.n_tokens:
        say(
            f"Of {tree.n_leaves:,} leaves most will have fewer than {FEWEST_TOKENS} of the {calibration.n_tokens:,} "
            "calibration tokens, and are fitted on their neighbours' too"
        )
    student = untrained_student(model, family, tree)
    weighted = tree.linear and init != "random"  # else nobody asks, and they take a backward pass
    sensitivities = calibration.sensitivities if weighted else [None] * len(ffns)
    fits = []
    for number, (ffn, place, theirs, sensitivity) in enumerate(
        zip(ffns, ffn_inputs_of(student, family), calibration.inputs, sensitivities, strict=True)
    ):
        target, ours = ffn.in_chunks(theirs), theirs
        if len(theirs) == calibration.n_tokens:
            ours = calibration.heard_in(student, place, f"Fitting layer {number + 1} of {len(ffns)}")
        if not family.pre_norm:
            target = target + (theirs - ours)  # the residual sum is with the FFN's own input
        n_held_out = max(2, int(HELD_OUT * len(ours)))  # one token has no spread
        fitted = slice(n_held_out, None) if len(ours) > n_held_out else slice(None)
        layer = fit_layer(ffn, ours[fitted], tree, init, seed + number, target[fitted], sensitivity)
        place.load_state_dict(layer.state_dict())
        fits.append(measure(number, layer, ours, target, n_held_out))
    return Conversion(student, fits)


def untrained_student(model: PreTrainedModel, family: Family, tree: TreeShape) -> PreTrainedModel:
    """The converted counterpart of a dense model, with its weights and FFF layers that are not fitted yet."""
    config = config_with(model.config, config_class(family), fff=tree.to_dict())
    student = counterpart(model, model_class(type(model)), config)  # type: ignore[arg-type]
    keys = student.load_state_dict(model.state_dict(), strict=False)
    ours = set(FFFWeights._fields)
    missing = [key for key in keys.missing_keys if key.rsplit(".", 1)[-1] not in ours]
    if missing:
        raise UserError(f"{type(model).__name__} lacks weights that its class has: {missing}")
    return student.to(model.device).eval()  # type: ignore[arg-type]


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
    encoded = encode(tokenizer, list(islice(texts, TEXTS_TO_COMPARE)), length)
    inputs = dict(tokenizer.pad(encoded, return_tensors="pt"))
    real = inputs["attention_mask"].bool()  # (n_texts, n_tokens)
    with evaluating(model), evaluating(quantized):
        exact, rounded = (base_of(each)(**inputs)[0][real] for each in (model, quantized))
    return float((rounded - exact).norm() / exact.norm())


@torch.no_grad()
def measure(number: int, layer: FFF, inputs: Tensor, target: Tensor, n_held_out: int) -> LayerFit:
    """The error of a fitted layer on the first, held-out inputs, and how evenly its leaves are used."""
    held_out = target[:n_held_out]  # (n_held_out, d_model)
    spread = (held_out - held_out.mean(0)).square().sum().clamp_min(torch.finfo(target.dtype).tiny)
    leaves = layer.leaf_of(inputs)  # (n_tokens, n_trees)
    counts = torch.stack([torch.bincount(leaf, minlength=layer.shape.n_leaves) for leaf in leaves.T])
    return LayerFit(
        layer=number,
        error=float((layer(inputs[:n_held_out]) - held_out).square().sum() / spread),
        smallest_leaf=float(counts.min() / len(inputs)),
        largest_leaf=float(counts.max() / len(inputs)),
    )
