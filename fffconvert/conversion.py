"""A dense model in, the same model with trees for FFNs out: closed form, no training."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fffconvert.calibration import Calibration, calibrate
from fffconvert.configuration import refuse_converted
from fffconvert.display import say
from fffconvert.errors import UserError
from fffconvert.families import Family, family_of, read_ffns
from fffconvert.fff import FFF, fffs_of
from fffconvert.fit import FEWEST_TOKENS, check_width, fit_layer
from fffconvert.kernels import FFFWeights
from fffconvert.modeling import (
    check_is_model,
    config_class,
    config_with,
    counterpart,
    dense_class_of,
    model_class,
    refuse_inference,
)
from fffconvert.modes import pytorch_defaults
from fffconvert.recipe import CALIBRATION_TOKENS, MAX_LENGTH, Init, check_init, check_seed, check_whole
from fffconvert.report import LayerFit
from fffconvert.text import Text
from fffconvert.tree import DEFAULT_TREE, TreeShape

HELD_OUT = 0.1  # of the calibration tokens, to judge the fit on


@dataclass(frozen=True)
class Conversion:
    """A converted model, and how well each of its layers was fitted."""

    model: PreTrainedModel
    layers: list[LayerFit]


@pytorch_defaults()
@torch.inference_mode(mode=False)  # the caller may have it on, and then nothing can be differentiated
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
    """Replaces every FFN of a dense model by a tree that is grown and fitted on what it does to text.

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
        UserError: For a model that cannot be converted, no text, a shape that the model cannot fill, or a seed out
            of range.
    """
    check_is_model(model)
    refuse_converted(model.config)
    refuse_own_class(type(model))
    refuse_inference(model)
    check_whole("calibration_tokens", calibration_tokens, 1)
    check_tree(tree, init, calibration_tokens)
    check_seed(seed)
    half = model.device.type == "cpu" and model.dtype in (torch.bfloat16, torch.float16)
    fast = deepcopy(model).float() if half else model  # most CPUs are many times slower in half precision
    calibration = calibrate(fast, tokenizer, texts, calibration_tokens, seed, max_length)
    made = build(calibration, tree, init)
    if not half:
        return made
    student = counterpart(model, type(made.model), made.model.config)
    student.load_state_dict(made.model.state_dict())
    return replace(made, model=student.eval())


def check_tree(tree: TreeShape, init: Init, n_tokens: int) -> None:
    """Raises a `UserError` for what no tree is grown from, or more leaves than tokens; random ones need none."""
    if not isinstance(tree, TreeShape):
        raise UserError(f"tree is {tree!r}; expected a TreeShape")
    check_init(init)
    if init != "random" and tree.n_leaves > n_tokens:
        deepest = max(1, n_tokens // FEWEST_TOKENS).bit_length() - 1
        instead = f"a depth of at most {deepest}, or " if deepest else ""
        raise UserError(
            f"a tree of depth {tree.depth} has {tree.n_leaves:,} leaves and there are {n_tokens:,} tokens to "
            f"calibrate on; expected {instead}more calibration tokens"
        )


def build(calibration: Calibration, tree: TreeShape, init: Init) -> Conversion:
    """As `convert`, from what `calibrate` collected.

    Layers are fitted from the first to the last, each on what the converted layers below really give it. An
    FFN that layers share would be asked to feed itself, so it is fitted on what the dense model gives it.
    """
    model = calibration.model
    family = family_of(model.config)
    ffns = read_ffns(model, family)
    tree = family.shape_for(model.config, tree)
    check_tree(tree, init, calibration.n_tokens)
    check_width(tree, init, ffns[0])
    say_if_unwise(tree, init, calibration.n_tokens, ffns[0].n_neurons)
    student = untrained_student(model, family, tree)
    weighted = tree.linear and init != "random"  # else nobody asks, and they take a backward pass
    sensitivities = calibration.sensitivities if weighted else [None] * len(ffns)
    forward_pass = calibration.read_by(student)
    fits = []
    for number, (ffn, place, (theirs, target), sensitivity) in enumerate(
        zip(ffns, fffs_of(student), calibration.ffns(), sensitivities, strict=True)
    ):
        description = f"Fitting layer {number + 1} of {len(ffns)}"
        ours = theirs if calibration.shares_ffns else forward_pass.inputs_of(place, description)
        if not family.pre_norm:
            target.add_(theirs).sub_(ours)  # the residual sum is with the FFN's own input
        n_held_out = max(2, int(HELD_OUT * len(ours)))  # one token has no spread
        first = n_held_out if n_held_out < len(ours) else 0
        seed = calibration.seed + number
        layer = fit_layer(ffn, ours[first:], tree, init, seed, target[first:], sensitivity)
        place.load_state_dict(layer.state_dict())
        fits.append(measure(number, layer, ours, target, n_held_out))
    return Conversion(student, fits)


def say_if_unwise(tree: TreeShape, init: Init, n_tokens: int, n_neurons: int) -> None:
    """One line where leaves will have few tokens each, and one where the tree is no smaller than the dense FFN."""
    if init != "random" and tree.n_leaves * FEWEST_TOKENS > n_tokens:
        say(
            f"Of {tree.n_leaves:,} leaves most will have fewer than {FEWEST_TOKENS} of the {n_tokens:,} "
            "calibration tokens, and are fitted on their neighbours' too"
        )
    if tree.active_neurons >= n_neurons:
        say(
            f"Every token will use {tree.active_neurons:g} neurons and the dense FFN has {n_neurons}: "
            "the model will be slower than it was"
        )


def refuse_own_class(dense_class: type[PreTrainedModel]) -> None:
    """Raises a `UserError` for a class that is not transformers' own: nobody could load what it is converted to."""
    known = dense_class_of(dense_class)
    if known is None:
        raise UserError(
            f"{dense_class.__name__} is no model of transformers; expected one, out of what it is wrapped in"
        )
    if known is not dense_class:
        raise UserError(
            f"{dense_class.__name__} is a class of your own; expected one of transformers', such as {known.__name__}"
        )


def untrained_student(model: PreTrainedModel, family: Family, tree: TreeShape) -> PreTrainedModel:
    """The converted counterpart of a dense model, with its weights and FFF layers that are not fitted yet.

    Raises:
        UserError: For a model with more or fewer weights than its class has, such as one with adapters.
    """
    config = config_with(model.config, config_class(family), fff=tree.to_dict())
    student = counterpart(model, model_class(type(model)), config)  # type: ignore[arg-type]
    student.config.architectures = [type(student).__name__]
    with torch.device("meta"):
        known = type(model)(model.config).state_dict().keys()
    if more := [name for name, _ in model.named_parameters() if name not in known]:
        raise UserError(
            f"{type(model).__name__} has weights that its class has not: {', '.join(more[:3])}; merge adapters "
            "into the model first, or remove them"
        )
    keys = student.load_state_dict(model.state_dict(), strict=False)
    ours = set(FFFWeights._fields)
    missing = [key for key in keys.missing_keys if key.rsplit(".", 1)[-1] not in ours]
    if missing:
        raise UserError(f"{type(model).__name__} lacks weights that its class has: {missing}")
    return student.to(model.device).eval()  # type: ignore[arg-type]


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
