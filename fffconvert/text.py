"""Texts as a model takes them: how long they may be, and their token ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from fffconvert.display import say
from fffconvert.errors import UserError
from fffconvert.families import longest_text
from fffconvert.recipe import MAX_LENGTH

Text = str | tuple[str, str]
"""A text, or a pair of them for a model that reads two."""

FEW_CUT = 0.01  # of the texts: of fewer that are cut nobody needs to hear


def readable_length(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig | None, max_length: int
) -> int:
    """`max_length`, or the model's own limit where that is lower; one line says so to a caller who asked for more.

    Raises:
        UserError: For a length that holds no word, or a tokenizer that cannot pad.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(f"tokenizer is {tokenizer!r}; expected one of transformers")
    if tokenizer.pad_token is None:
        raise UserError("the tokenizer has no padding token; expected one: set `pad_token` and save it")
    limit = min(tokenizer.model_max_length, longest_text(config) if config else max_length)
    least = tokenizer.num_special_tokens_to_add(pair=True) + 1
    readable = min(limit, max_length)
    if readable < least:
        name = "max_length" if max_length == readable else "the model's own limit"
        raise UserError(f"{name} is {readable}; expected at least {least}, as the tokenizer adds {least - 1}")
    if limit < max_length != MAX_LENGTH:
        say(f"Texts are cut at {limit} tokens: the model reads no more")
    return readable


def say_if_cut(what: str, lengths: Iterable[int], limit: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """One line where more than a few texts have as many tokens as they may: what follows was not read."""
    cut = [length >= limit for length in lengths]
    if sum(cut) > FEW_CUT * len(cut):
        say(
            f"{what}: {sum(cut):,} of {len(cut):,} texts have {limit} tokens or more, of which no more are read"
            + how_to_read_further(tokenizer, limit)
        )


def how_to_read_further(tokenizer: PreTrainedTokenizerBase, limit: int) -> str:
    """The end of a line about what was cut at a limit; empty where the model reads no more."""
    further = "; --max-length (in a recipe: max_length) reads further, as far as the model can"
    return further if limit < tokenizer.model_max_length else ""


def is_text(value: Any) -> bool:
    """Whether it is a text, or a pair of texts."""
    if isinstance(value, tuple | list):
        return len(value) == 2 and all(isinstance(part, str) for part in value)
    return isinstance(value, str)


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[Text], max_length: int
) -> dict[str, list[list[int]]]:
    """Texts or pairs as a model takes them, not padded yet."""
    firsts = [text if isinstance(text, str) else text[0] for text in texts]
    seconds = None if isinstance(texts[0], str) else [text[1] for text in texts]
    return dict(tokenizer(firsts, seconds, truncation=True, max_length=max_length))
