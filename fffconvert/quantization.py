"""A converted model in; out comes the same with less to read: projections in int8, trees in bfloat16."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from itertools import islice

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fffconvert.configuration import is_int8, refuse_dense
from fffconvert.errors import UserError
from fffconvert.families import family_of, replace_projections
from fffconvert.int8 import Int8Linear
from fffconvert.modeling import check_is_model, trees_to_bfloat16
from fffconvert.modes import evaluating
from fffconvert.recipe import MAX_LENGTH
from fffconvert.text import Text, encode, readable_length

TEXTS_TO_COMPARE = 64


@torch.random.fork_rng(devices=[])
def quantize(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a converted model for inference on a CPU, projections stored in int8 and trees in bfloat16.

    Every `nn.Linear` inside the layers is one of the attention's projections. Embeddings, LayerNorm, pooler and head
    stay as they are. A tree's arithmetic is float32 as before: a token waits for its weights, of which there is half.

    Args:
        model: A converted model, trained if it is to be: int8 models cannot be.

    Raises:
        UserError: For a model that is not converted, is int8 already, or is not in float32 on the CPU.
    """
    check_is_model(model)
    refuse_dense(model.config)
    if is_int8(model.config):
        raise UserError("this model's projections are int8 already")
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise UserError(
            f"int8 is made from float32 on the CPU; this model is {model.dtype} on {model.device.type}"
        )
    quantized = deepcopy(model)
    quantized.config.int8_projections = True
    family = family_of(model.config)
    replace_projections(quantized, family, Int8Linear.from_linear)
    trees_to_bfloat16(quantized)
    return quantized.eval()


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
        exact, rounded = (each.base_model(**inputs)[0][real] for each in (model, quantized))
    return float((rounded - exact).norm() / exact.norm())
