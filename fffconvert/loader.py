"""Which rows come when: the batches of an epoch follow from the seed and the epoch's number alone."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from accelerate import skip_first_batches
from accelerate.data_loader import DataLoaderShard
from datasets import Dataset, List
from torch.utils.data import BatchSampler, DataLoader, Sampler
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from fffconvert.batch import Batch
from fffconvert.errors import UserError
from fffconvert.labels import IGNORED


class EpochSampler(Sampler[int]):
    """Rows in batches of similar lengths, which come in a random order; the epoch and the seed decide it.

    `LengthGroupedSampler` alone goes from long rows to short ones, again and again, and ends on short ones: the
    optimizer follows, at the cost of what is learned (`benchmarks/notes.md` has the figures).
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch; Accelerate calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        size, n_over = self.batch_size, len(self) % self.batch_size
        # what fills no batch is drawn from all rows: of sorted ones it would be the shortest
        order = torch.randperm(len(self), generator=generator).tolist() if n_over else list(range(len(self)))
        over, kept = order[:n_over], order[n_over:]
        if kept:
            lengths = [self.lengths[row] for row in kept]
            grouped = [
                kept[place] for place in LengthGroupedSampler(size, lengths=lengths, generator=generator)
            ]
            for batch in torch.randperm(len(kept) // size, generator=generator).tolist():
                yield from grouped[batch * size : (batch + 1) * size]
        yield from over

    def __len__(self) -> int:
        return len(self.lengths)


def loader_of(rows: Dataset, tokenizer: PreTrainedTokenizerBase, batches: BatchSampler) -> DataLoader[Batch]:
    """Padded batches of tokenized rows; labels of tokens, which are whole numbers in a list, are padded too."""
    collate = DataCollatorForTokenClassification if labels_tokens(rows) else DataCollatorWithPadding
    return DataLoader(
        rows.remove_columns("length"),
        batch_sampler=batches,
        collate_fn=collate(tokenizer),
        generator=torch.Generator(),  # its own, so that starting an epoch draws nothing from dropout's
    )


def check_tokenized(rows: Any) -> None:
    """Raises a `UserError` for rows that no model can read."""
    if not isinstance(rows, Dataset) or "length" not in rows.column_names:
        raise UserError(
            f"the rows are {reprlib.repr(rows)}; expected a Dataset of tokenized ones, such as `read_data(...).rows`"
        )


def labels_tokens(rows: Dataset) -> bool:
    """Whether rows have a label for each token."""
    labels = rows.features.get("labels")
    return isinstance(labels, List) and "int" in labels.feature.dtype


def with_counted_labels(rows: Dataset) -> Dataset:
    """The rows that have a label which counts: a batch of others, which are alike in length, has no loss."""
    rows = rows.with_format(None)
    if not labels_tokens(rows):
        return rows
    return rows.select([number for number, labels in enumerate(rows["labels"]) if {*labels} - {IGNORED}])


def shared_batch_size(asked: int, n_rows: int, n_processes: int) -> int:
    """Rows in a batch: those asked for, or with fewer rows as many as make equal shares.

    A batch that is short of its shares Accelerate would fill with rows that were in it already.

    Raises:
        UserError: For a batch that the processes cannot share out, or fewer rows than processes.
    """
    if asked % n_processes:
        raise UserError(f"batch_size is {asked}; expected a multiple of the {n_processes} processes")
    if n_rows < n_processes:
        raise UserError(
            f"there are {n_rows or 'no'} rows to train on; expected at least {n_processes}, one for each process"
        )
    return min(asked, n_rows // n_processes * n_processes)


def steps_from(loader: DataLoaderShard, done: int, n_steps: int, together: int) -> Iterator[list[Batch]]:
    """The batches of each step of a run, which follow from the step's number.

    Args:
        loader: The batches of an epoch, which follow from its number.
        done: Steps that were made before.
        n_steps: Steps of the run.
        together: Batches that make a step; the last of an epoch may have fewer.
    """
    steps_per_epoch = -(-len(loader) // together)
    while done < n_steps:
        epoch, made = divmod(done, steps_per_epoch)
        loader.set_epoch(epoch)
        rest = skip_first_batches(loader, made * together)
        rest.set_epoch(epoch)  # Accelerate before 1.15 forgets it there
        batches = iter(rest)
        while parts := list(islice(batches, together)):
            yield parts
        done = (epoch + 1) * steps_per_epoch
