"""Making a teacher, and teaching a student what the teacher does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.generic import ModelOutput

from fffconvert.accelerator import process_state
from fffconvert.activations import recording_inputs
from fffconvert.batch import TRUTH, Batch, without_truth
from fffconvert.errors import UserError
from fffconvert.families import PREFIX, family_of, ffn_inputs_of
from fffconvert.fff import FFF
from fffconvert.heads import TOKEN_LOGITS, as_saved, check_judgeable, class_name, labels_of, reordered
from fffconvert.modeling import is_int8, refuse_converted, refuse_dense
from fffconvert.modes import evaluating, moved
from fffconvert.recipe import DISTILL, FINETUNE, Training
from fffconvert.sentence import embeddings
from fffconvert.training import Loss, train

EMBEDDING_WEIGHT = 60.0
"""How often an embedding's error counts: hidden states serve it, and errors of many layers would drown it out."""


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
        rows: Tokenized rows with `labels` and `length` (see `fffconvert.encoding.tokenized`).
        settings: Epochs, learning rate and so on.
        seed: Decides the order of the rows and dropout.
        checkpoints: Folder for checkpoints; the newest in it is resumed. Delete it when the model is saved.
        log_with: A tracker that Accelerate knows.

    Raises:
        UserError: For rows without labels.
        UserError, NotWritten: As `fffconvert.training.train` does.
    """
    if not set(TRUTH) & set(rows.column_names):
        raise UserError(
            "the rows have no labels; expected a column `labels`, or `start_positions` and `end_positions`"
        )

    def loss(wrapped: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        value: Tensor = wrapped(**batch, return_dict=True).loss
        return value, {"loss": value}

    train(
        model,
        rows,
        tokenizer,
        loss,
        settings,
        description="Fine-tuning the teacher",
        seed=seed,
        checkpoints=checkpoints,
        log_with=log_with,
    )


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
    refuse_dense(student.config)
    refuse_converted(teacher.config)
    check_judgeable(as_saved(student), "the student")
    check_pair(student, teacher)
    if is_int8(student.config):
        raise UserError("an int8 student cannot be trained; distil the float32 model, then quantize it")
    if not any(isinstance(module, FFF) for module in student.modules()):
        raise UserError(
            "the student has no tree of fffconvert's own; expected a converted model, loaded after `import fffconvert` "
            "and without trust_remote_code"
        )


def check_pair(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raises a `UserError` for a student and a teacher whose outputs cannot be compared."""
    our_type, their_type = (model.config.model_type.removeprefix(PREFIX) for model in (student, teacher))
    if our_type != their_type:
        raise UserError(
            f"the student was made of a model of type {our_type} and the teacher's is {their_type}; expected the same"
        )
    for name in ("num_hidden_layers", "hidden_size", "num_labels", "vocab_size", "max_position_embeddings"):
        ours, theirs = getattr(student.config, name, None), getattr(teacher.config, name, None)
        if ours != theirs:
            raise UserError(f"the student's {name} is {ours} and the teacher's {theirs}; expected the same")
    our_labels, their_labels = (labels_of(model.config) for model in (student, teacher))
    if reordered(our_labels, their_labels):
        raise UserError(
            f"the student orders its labels {', '.join(our_labels)} and the teacher {', '.join(their_labels)}; "
            "expected one order"
        )
    ours, theirs = (class_name(model).partition("For")[2] for model in (student, teacher))
    if ours not in ("", theirs):  # a student without a head is taught hidden states alone
        raise UserError(f"the student is made For{ours} and the teacher is not; expected the same head")


@contextmanager
def comparing(
    student: PreTrainedModel, teacher: PreTrainedModel, pooling: nn.Module | None = None
) -> Iterator[Loss]:
    """Yields the loss of a student beside its teacher, which is to be called with the student as it is wrapped."""
    exclusive = student.config.problem_type not in ("regression", "multi_label_classification")
    family = family_of(teacher.config)
    with ExitStack() as stack:
        ours, theirs = (
            [stack.enter_context(recording_inputs(place)) for place in ffn_inputs_of(model, family)]
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


def distillation_loss(
    student: ModelOutput,
    teacher: ModelOutput,
    attention_mask: Tensor,
    exclusive: bool = True,
    pooling: nn.Module | None = None,
    ffn_inputs: Sequence[tuple[Tensor, Tensor]] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of what a student does unlike its teacher, each a mean over the rows.

    That is the logits' error (`logit_error`), that of every layer's hidden states (`hidden_errors`) and of what its
    FFN reads (`relative_error`), and the relative one of sentence embeddings.

    Args:
        student: Output with hidden states, and logits where there is a head.
        teacher: The same.
        attention_mask: `(n_rows, n_tokens)`, 1 for real tokens.
        exclusive: Whether several logits are those of classes of which one is right.
        pooling: Makes sentence embeddings of the last hidden states; without it there are none to compare.
        ffn_inputs: What each FFN reads in the student and in the teacher, `(n_rows, n_tokens, d_model)`: what
            attention made of the hidden states before.

    Returns:
        The loss, and its parts by name.
    """
    real = attention_mask.to(torch.float32)  # (n_rows, n_tokens)
    figures = {"hidden": hidden_errors(student, teacher, real).mean()}
    if ffn_inputs:
        figures["ffn_inputs"] = summed_errors(ffn_inputs, real).mean()
    for name, ours in student.items():
        if name.endswith("logits"):
            figures[name] = logit_error(ours, teacher[name], real, name in TOKEN_LOGITS, exclusive)
    total = torch.stack(list(figures.values())).sum()
    if pooling is not None:
        ours, theirs = (
            embeddings(o["last_hidden_state"], attention_mask, pooling) for o in (student, teacher)
        )
        figures["embedding"] = embedding_error(ours, theirs)
        total = total + EMBEDDING_WEIGHT * figures["embedding"]
    return total, figures


def hidden_errors(student: ModelOutput, teacher: ModelOutput, real: Tensor) -> Tensor:
    """Each row's error in the hidden states, `(n_rows,)`.

    It is `sum(|student - teacher|^2) / sum(|teacher|^2)` over the row's real tokens, summed over the layers.

    Args:
        student: Output with hidden states.
        teacher: The same.
        real: `(n_rows, n_tokens)`, 1.0 for real tokens.
    """
    pairs = zip(student["hidden_states"][1:], teacher["hidden_states"][1:], strict=True)
    return summed_errors(pairs, real)


def summed_errors(pairs: Iterable[tuple[Tensor, Tensor]], real: Tensor) -> Tensor:
    """The relative errors of all layers together, per row, `(n_rows,)`; see `relative_error`."""
    return torch.stack([relative_error(ours, theirs, real) for ours, theirs in pairs]).sum(0)


def relative_error(ours: Tensor, theirs: Tensor, real: Tensor) -> Tensor:
    """Relative squared error per row, `(n_rows,)`, of hidden states `(n_rows, n_tokens, d_model)`; in float32."""
    ours, theirs = ours.float(), theirs.float()  # squares leave float16 early
    error = ((ours - theirs).square().sum(-1) * real).sum(1)
    return error / (theirs.square().sum(-1) * real).sum(1)


def embedding_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean relative squared error of embeddings `(n_rows, d)`: a row's is that of a text of one token."""
    return relative_error(ours[:, None], theirs[:, None], ours.new_ones(len(ours), 1)).mean()


def logit_error(ours: Tensor, theirs: Tensor, real: Tensor, of_tokens: bool, exclusive: bool) -> Tensor:
    """How far logits are from the teacher's: a mean over the rows, and in each over its real tokens.

    Where one class is right, or one token, it is the Kullback-Leibler divergence from the teacher's probabilities
    (Hinton et al., arXiv 1503.02531, at temperature 1), elsewhere the mean squared error.

    Args:
        ours: `(n_rows, n_outputs)` or `(n_rows, n_tokens, n_outputs)`; where `of_tokens`, `(n_rows, n_tokens)`.
        theirs: As `ours`.
        real: `(n_rows, n_tokens)`, 1.0 for real tokens.
        of_tokens: Whether a logit says how likely its token is the one that is sought.
        exclusive: Whether one output of a row or token is right.
    """
    ours, theirs = ours.float(), theirs.float()
    if of_tokens:
        ours, theirs = (
            logits.masked_fill(real == 0, torch.finfo(logits.dtype).min) for logits in (ours, theirs)
        )
    if of_tokens or (exclusive and ours.shape[-1] > 1):
        error = divergence(ours, theirs)
    else:
        error = (ours - theirs).square().mean(-1)
    if error.dim() == 2:  # (n_rows, n_tokens)
        error = (error * real).sum(1) / real.sum(1)
    return error.mean()


def divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the student's probabilities from the teacher's, over the last dimension."""
    logs = ours.log_softmax(-1), theirs.log_softmax(-1)
    return F.kl_div(*logs, reduction="none", log_target=True).sum(-1)
