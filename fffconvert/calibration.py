"""The inputs and outputs of every FFN on a uniform sample of text, and how much the model's outputs depend on them.

However much text there is, the sample takes the same memory.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from random import Random

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fffconvert.activations import PausedForward, collect_inputs
from fffconvert.batch import Batch, first_with, tokens_in
from fffconvert.configuration import refuse_converted
from fffconvert.errors import UserError
from fffconvert.families import family_of, ffn_ends_of, ffn_starts_of, read_ffns, uses_of_ffn
from fffconvert.recipe import MAX_LENGTH
from fffconvert.sensitivity import sensitivities
from fffconvert.text import Text, encode, is_text, readable_length, say_if_cut

BATCH_SIZE = 32
ENCODED_AT_ONCE = 1024
FEWEST_TOKENS_PER_TEXT = 4  # a word between two special tokens, and one to spare


def sample_texts(texts: Iterable[Text], n_texts: int, seed: int) -> list[Text]:
    """A uniform sample of a stream, in random order (Vitter's algorithm R); holds `n_texts` at the most."""
    random = Random(seed)
    kept: list[Text] = []
    for number, text in enumerate(texts):
        if number < n_texts:
            kept.append(text)
        elif (slot := random.randrange(number + 1)) < n_texts:
            kept[slot] = text
    random.shuffle(kept)
    return kept


@dataclass(frozen=True)
class Calibration:
    """Text as a dense model reads it: what a conversion is fitted on.

    Attributes:
        batches: Padded batches of texts of like length, in random order.
        n_tokens: Tokens of the text that are kept, from the first.
        model: The dense model.
        seed: Of what is drawn.
    """

    batches: list[Batch]
    n_tokens: int
    model: PreTrainedModel
    seed: int

    @cached_property
    def sensitivities(self) -> list[Tensor]:
        """Of every FFN, what its errors cost, `(d_model, d_model)`; computed when first asked for."""
        places = ffn_ends_of(self.model, family_of(self.model.config))
        return sensitivities(self.model, places, self.batches, self.seed)

    @property
    def shares_ffns(self) -> bool:
        """Whether layers share an FFN (ALBERT)."""
        return uses_of_ffn(self.model.config) > 1

    def ffns(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What every FFN is given and gives, first layer to last: twice `(n_tokens, d_model)` float32 on the CPU.

        The same tokens in each; padding is never among them. Of an FFN that layers share those of all its uses,
        `(n_tokens * n_uses, d_model)`. The model goes on to a layer when that is asked for, so memory does not
        grow with the number of layers, but with that of an FFN's uses.
        """
        family = family_of(self.model.config)
        places = ffn_starts_of(self.model, family)
        if self.shares_ffns:
            found = collect_inputs(self.model, places, self.batches, self.n_tokens)
            for ffn, inputs in zip(read_ffns(self.model, family), found, strict=True):
                yield inputs, ffn.in_chunks(inputs)
        else:
            yield from self.read_by(self.model).through(places, ffn_ends_of(self.model, family))

    def read_by(self, model: PreTrainedModel) -> PausedForward:
        """A model at the start of the same text."""
        return PausedForward(model, self.batches, self.n_tokens)


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Text],
    n_tokens: int,
    seed: int = 0,
    max_length: int = MAX_LENGTH,
) -> Calibration:
    """Takes a uniform sample of a stream of text for a dense model to read.

    Memory does not grow with the stream: it holds `n_tokens / FEWEST_TOKENS_PER_TEXT` texts.

    Args:
        model: A dense model of a known family. Left as it was.
        tokenizer: Its tokenizer.
        texts: Any number of texts or pairs; read once.
        n_tokens: Tokens to read, fewer if the text has fewer, or its texts fewer than `FEWEST_TOKENS_PER_TEXT` each.
        seed: Which texts are taken.
        max_length: Tokens that a text is cut at.

    Raises:
        UserError: For no text at all, what is no text, single texts among pairs, an unknown family, or a converted
            model.
    """
    refuse_converted(model.config)
    batches = read_batches(model.config, tokenizer, texts, n_tokens, seed, max_length)
    return Calibration(batches, min(n_tokens, sum(map(tokens_in, batches))), model, seed)


def read_batches(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Text],
    n_tokens: int,
    seed: int,
    max_length: int,
) -> list[Batch]:
    """The sample that `calibrate` takes for a model of that configuration; raises what it raises of texts."""
    if isinstance(texts, str):
        raise UserError("the calibration texts are one text; expected a list of them")
    sample = sample_texts(texts, -(-n_tokens // FEWEST_TOKENS_PER_TEXT), seed)
    if not sample:
        raise UserError("the calibration text is empty; expected at least one line of text")
    for text in sample:
        if not is_text(text):
            raise UserError(
                f"a calibration text is {reprlib.repr(text)}; expected text or a pair of texts, as a "
                "column of a Dataset holds"
            )
    if len({isinstance(text, str) for text in sample}) > 1:
        raise UserError("some calibration texts are pairs and some are not; expected the one or the other")
    return batches_of(sample, tokenizer, n_tokens, readable_length(tokenizer, config, max_length), seed)


def batches_of(
    sample: list[Text], tokenizer: PreTrainedTokenizerBase, n_tokens: int, max_length: int, seed: int
) -> list[Batch]:
    """The first texts that have `n_tokens` together, in batches of like length, which need little padding."""
    rows: list[dict[str, list[int]]] = []
    for start in range(0, len(sample), ENCODED_AT_ONCE):
        encoded = encode(tokenizer, sample[start : start + ENCODED_AT_ONCE], max_length)
        rows += [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
        if sum(len(row["input_ids"]) for row in rows) >= n_tokens:
            break
    say_if_cut("Calibration", (len(row["input_ids"]) for row in rows), max_length, tokenizer)
    n_rows = first_with(n_tokens, (len(row["input_ids"]) for row in rows))
    rows = sorted(rows[:n_rows], key=lambda row: len(row["input_ids"]))
    batches = [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
    Random(seed).shuffle(batches)
    return [dict(tokenizer.pad(batch, return_tensors="pt")) for batch in batches]
