"""Text in, the inputs of every FFN out: a uniform sample, in memory that the amount of text cannot grow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from random import Random

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fffconvert.display import say, track
from fffconvert.errors import UserError
from fffconvert.families import family_of, ffn_inputs_of

Text = str | tuple[str, str]
"""A text, or a pair of them for a model that reads two."""

BATCH_SIZE = 32
MAX_LENGTH = 128
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


def readable_length(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig | None, max_length: int
) -> int:
    """`max_length`, or what the model can read at the most; who asked for more is told."""
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or max_length)
    if limit < max_length != MAX_LENGTH:
        say(f"Texts are cut at {limit} tokens: the model reads no more")
    return min(limit, max_length)


def encode(tokenizer: PreTrainedTokenizerBase, batch: list[Text], max_length: int) -> dict[str, Tensor]:
    """A padded batch of texts or pairs as a model takes it, each tensor `(n_texts, n_tokens)`."""
    firsts = [text if isinstance(text, str) else text[0] for text in batch]
    seconds = None if isinstance(batch[0], str) else [text[1] for text in batch]
    return dict(
        tokenizer(firsts, seconds, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    )


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Text],
    n_tokens: int,
    seed: int = 0,
    max_length: int = MAX_LENGTH,
) -> list[Tensor]:
    """Collects the inputs of every FFN of a dense model over a uniform sample of a stream of text.

    Memory does not grow with the stream: it holds `n_tokens / FEWEST_TOKENS_PER_TEXT` texts, then
    `n_layers * n_tokens * d_model` float32 numbers (twice, while they are put together).

    Args:
        model: A dense model of a known family. Left as it was.
        tokenizer: Its tokenizer.
        texts: Any number of texts or pairs; read once.
        n_tokens: Tokens to collect, fewer if the text has fewer; padding is never among them.
        seed: Which texts are taken.
        max_length: Tokens that a text is cut at.

    Returns:
        One `(n_kept, d_model)` float32 tensor on the CPU for each layer, the same tokens in each.

    Raises:
        UserError: For no text at all.
    """
    sample = sample_texts(texts, -(-n_tokens // FEWEST_TOKENS_PER_TEXT), seed)
    if not sample:
        raise UserError("the calibration text is empty; expected at least one line of text")
    batches = [sample[start : start + BATCH_SIZE] for start in range(0, len(sample), BATCH_SIZE)]
    limit = readable_length(tokenizer, model.config, max_length)
    places = ffn_inputs_of(model, family_of(model.config))
    kept: list[list[Tensor]] = [[] for _ in places]  # per layer, per batch (n_real, d_model)
    n_kept = 0
    with evaluating(model), listening(places) as heard:
        for batch in track(batches, "Reading calibration text"):
            inputs = {k: v.to(model.device) for k, v in encode(tokenizer, batch, limit).items()}
            model(**inputs)
            real = inputs["attention_mask"].bool()  # (n_texts, n_tokens)
            for rows, x in zip(kept, heard, strict=True):
                rows.append(x[real].to("cpu", torch.float32))
            heard.clear()
            n_kept += int(real.sum())
            if n_kept >= n_tokens:
                break
    return [torch.cat(rows)[:n_tokens] for rows in kept]


@contextmanager
def listening(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Yields a list to which every call of one of `modules` adds its input."""
    heard: list[Tensor] = []

    def hear(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        heard.append(args[0])

    hooks = [module.register_forward_pre_hook(hear) for module in modules]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switches dropout off for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
