"""Making a teacher of a model with a head."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fffconvert.batch import TRUTH, Batch
from fffconvert.errors import UserError
from fffconvert.loader import check_tokenized, with_counted_labels
from fffconvert.modeling import check_is_model
from fffconvert.recipe import FINETUNE, Training
from fffconvert.training import train


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    settings: Training = FINETUNE,
    *,
    seed: int = 0,
    checkpoints: Path | str | None = None,
    log_with: str | None = None,
) -> None:
    """Trains a model with a head on labelled rows, in place, to make a teacher: float32, on the CPU when it is done.

    The generators of PyTorch, NumPy and Python are seeded anew. A loss over tokens is the mean of its batch: with
    gradient accumulation or several processes the means count alike, however many tokens each is of.

    Args:
        model: A model whose forward computes a loss from `labels`.
        tokenizer: Pads the rows.
        rows: Tokenized rows with `labels` and `length` (see `fffconvert.encoding.tokenized`). Of rows with a label
            for each token those are left out in which none counts.
        settings: Epochs, learning rate and so on.
        seed: Decides the order of the rows and dropout.
        checkpoints: Folder for checkpoints; the newest in it is resumed. Delete it when the model is saved.
        log_with: A tracker that Accelerate knows.

    Raises:
        UserError: For rows without labels.
        UserError, NotWritten: As `fffconvert.training.train` does.
    """
    check_is_model(model)
    check_tokenized(rows)
    if not set(TRUTH) & set(rows.column_names):
        raise UserError(
            "the rows have no labels; expected a column `labels`, or `start_positions` and `end_positions`"
        )

    def loss(wrapped: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        value: Tensor = wrapped(**batch, return_dict=True).loss
        return value, {"loss": value}

    train(
        model,
        with_counted_labels(rows),
        tokenizer,
        loss,
        settings,
        description="Fine-tuning the teacher",
        seed=seed,
        checkpoints=checkpoints,
        log_with=log_with,
    )
