"""How far what a student gives is from what its teacher gives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils.generic import ModelOutput

from fffconvert.heads import TOKEN_LOGITS
from fffconvert.sentence import embeddings

EMBEDDING_WEIGHT = 60.0
"""How often an embedding's error counts: hidden states serve it, and errors of many layers would drown it out."""


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
