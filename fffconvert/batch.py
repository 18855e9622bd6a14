"""A padded batch as a model takes it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from itertools import accumulate

import torch
from torch import Tensor

Batch = dict[str, Tensor]
"""Its tensors by name, each `(n_texts, n_tokens)`, or `(n_texts, ...)` for what is asked of a text as a whole."""

TRUTH = ("labels", "start_positions", "end_positions")
"""The columns that hold the truth."""


def first_with(n_tokens: int, lengths: Iterable[int]) -> int:
    """How many of the first texts or batches have `n_tokens` together, or one more than there are."""
    return bisect_left(list(accumulate(lengths)), n_tokens) + 1


def tokens_in(batch: Batch) -> int:
    """Tokens of a padded batch, padding apart."""
    return int(batch["attention_mask"].sum())


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def parts_of(batch: Batch, n_texts: int) -> list[Batch]:
    """A batch in smaller ones, of so many texts at the most."""
    columns = [tensor.split(n_texts) for tensor in batch.values()]
    return [dict(zip(batch, parts, strict=True)) for parts in zip(*columns, strict=True)]


def without_truth(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model reads of a batch."""
    return {name: tensor for name, tensor in batch.items() if name not in TRUTH}
