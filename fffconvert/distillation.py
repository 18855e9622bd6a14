"""Teaching a student what its teacher does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fffconvert.accelerator import process_state
from fffconvert.activations import recording_inputs
from fffconvert.batch import Batch, without_truth
from fffconvert.configuration import is_int8, refuse_converted, refuse_dense
from fffconvert.errors import UserError
from fffconvert.families import family_of, ffn_starts_of
from fffconvert.fff import fffs_of
from fffconvert.heads import as_saved, check_judgeable
from fffconvert.loss import distillation_loss
from fffconvert.modeling import check_is_model
from fffconvert.modes import evaluating, moved
from fffconvert.pair import check_pair
from fffconvert.recipe import DISTILL, Training
from fffconvert.training import Loss, train


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    settings: Training = DISTILL,
    *,
    seed: int = 0,
    checkpoints: Path | str | None = None,
    log_with: str | None = None,
    pooling: nn.Module | None = None,
) -> None:
    """Trains a student, in place, to give the teacher's logits and hidden states. Labels are not used.

    It is float32 and on the CPU when it is done, and the generators of PyTorch, NumPy and Python are seeded anew.
    Dropout stays off: the teacher is a fixed function, and noise in the student only hides how far it is.

    Args:
        student: A converted model.
        teacher: A model with the same head and the same hidden states. Left as it was.
        tokenizer: Pads the rows.
        rows: Tokenized rows with `length`; `labels` are ignored.
        settings: Epochs, learning rate and so on.
        seed: Decides the order of the rows.
        checkpoints: Folder for checkpoints; the newest in it is resumed. Delete it when the model is saved.
        log_with: A tracker that Accelerate knows.
        pooling: How the teacher makes sentence embeddings; the student is then taught these as well.

    Raises:
        UserError: If student and teacher do not fit each other, for a student without trees or in int8, and for a
            teacher that has them.
        UserError, NotWritten: As `fffconvert.training.train` does.
    """
    check_distillable(student, teacher)
    with (
        evaluating(teacher),
        moved(teacher, process_state().device),
        comparing(student, teacher, pooling) as loss,
    ):
        train(
            student,
            rows,
            tokenizer,
            loss,
            settings,
            description="Distilling",
            seed=seed,
            dropout=False,
            teacher=teacher,
            checkpoints=checkpoints,
            log_with=log_with,
        )


def check_distillable(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raises a `UserError` for a student that cannot be trained, or a teacher that is not dense or not its own."""
    for model in (student, teacher):
        check_is_model(model)
    refuse_dense(student.config)
    refuse_converted(teacher.config)
    check_judgeable(as_saved(student), "the student")
    check_pair(student, teacher)
    if is_int8(student.config):
        raise UserError("an int8 student cannot be trained; distil the float32 model, then quantize it")
    if not fffs_of(student):
        raise UserError(
            "the student has no tree of fffconvert's own; expected a converted model, loaded after `import fffconvert` "
            "and without trust_remote_code"
        )


@contextmanager
def comparing(
    student: PreTrainedModel, teacher: PreTrainedModel, pooling: nn.Module | None = None
) -> Iterator[Loss]:
    """Yields the loss of a student beside its teacher, which is to be called with the student as it is wrapped."""
    exclusive = student.config.problem_type not in ("regression", "multi_label_classification")
    family = family_of(teacher.config)
    with ExitStack() as stack:
        ours, theirs = (
            [stack.enter_context(recording_inputs(place)) for place in ffn_starts_of(model, family)]
            for model in (student, teacher)
        )

        def loss(wrapped: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            inputs = without_truth(batch)
            for calls in (*ours, *theirs):
                calls.clear()
            with torch.no_grad():
                target = teacher(**inputs, output_hidden_states=True, return_dict=True)
            output = wrapped(**inputs, output_hidden_states=True, return_dict=True)
            read = [*zip(chain.from_iterable(ours), chain.from_iterable(theirs), strict=True)]
            return distillation_loss(output, target, inputs["attention_mask"], exclusive, pooling, read)

        yield loss
