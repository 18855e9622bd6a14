"""Inputs and outputs of a model's modules, collected token by token while it reads text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from transformers import PreTrainedModel

from fffconvert.batch import Batch, to_device
from fffconvert.display import track
from fffconvert.errors import UserError
from fffconvert.modes import evaluating
from fffconvert.projection import onednn_on

READING = "Reading calibration text"


def check_finite(found: Tensor) -> None:
    """Raises a `UserError` for what a model should not give inside."""
    if not found.isfinite().all():
        raise UserError(
            "the model's hidden states are NaN or infinite on the calibration text; expected finite numbers: try the "
            "model in float32, and whether its weights are whole"
        )


class Rows:
    """What is collected of the first tokens, batch after batch, in a table of `(n_tokens, ...)`."""

    table: Tensor

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens, self.n_filled = n_tokens, 0

    def add(self, rows: Tensor) -> None:
        """Adds rows `(n_rows, ...)`; none may be wanted of a last, short batch.

        Raises:
            UserError: For rows that are not finite.
        """
        check_finite(rows)
        if self.n_filled == 0:
            self.table = rows.new_empty(self.n_tokens, *rows.shape[1:])
        rows = rows[: self.n_tokens - self.n_filled]
        self.table[self.n_filled : self.n_filled + len(rows)] = rows
        self.n_filled += len(rows)


class PausedForward:
    """Forward passes over batches of text, which pause at the module whose inputs were asked for last.

    Each runs in a coroutine (a greenlet) and later goes on from there: nothing is computed twice, and the modules
    further on may change meanwhile. What is paused takes a few times `n_tokens * d_model` numbers.

    Args:
        model: Any model.
        batches: Padded batches.
        n_tokens: Tokens to keep, from the first.
    """

    def __init__(self, model: PreTrainedModel, batches: list[Batch], n_tokens: int) -> None:
        self.model, self.n_tokens = model, n_tokens
        self.passes = [
            greenlet(partial(model.base_model, **to_device(batch, model.device))) for batch in batches
        ]
        for forward_pass, batch in zip(self.passes, batches, strict=True):
            forward_pass.real = batch["attention_mask"].bool()  # (n_texts, n_tokens)

    def inputs_of(self, place: nn.Module, description: str) -> Tensor:
        """Goes on to a module that the model uses once, and returns its inputs, `(n_tokens, d_model)`."""
        rows = Rows(self.n_tokens)
        with place.register_forward_pre_hook(partial(wait, rows)):
            self.go_on(description)
        return rows.table

    def through(self, starts: list[nn.Module], ends: list[nn.Module]) -> Iterator[tuple[Tensor, Tensor]]:
        """Goes on from part to part of the model, and yields what each is given and gives, `(n_tokens, d_model)`.

        It waits where the part that follows starts: inside one it would have to hold all that is computed there.

        Args:
            starts: The first module of each part, in the model's order.
            ends: The last one.
        """
        inputs = following = self.inputs_of(starts[0], READING)
        for end, start in zip(ends, [*starts[1:], None], strict=True):
            outputs = Rows(self.n_tokens)
            with end.register_forward_hook(partial(keep, outputs)):
                if start is None:
                    self.go_on(READING)
                else:
                    following = self.inputs_of(start, READING)
            yield inputs, outputs.table
            inputs = following

    @torch.no_grad()
    def go_on(self, description: str) -> None:
        """Lets every forward pass go on until it waits, or ends."""
        with evaluating(self.model), onednn_on(self.model.device):
            for forward_pass in track(self.passes, description):
                forward_pass.switch()


@torch.no_grad()
def collect_inputs(
    model: PreTrainedModel, places: list[nn.Module], batches: list[Batch], n_tokens: int
) -> list[Tensor]:
    """The inputs of some modules, each `(n_tokens * n_uses, d_model)`, while a model reads batches of text.

    Args:
        model: Any model.
        places: Modules in it; one may be used several times.
        batches: Padded batches.
        n_tokens: Tokens to keep, from the first; the batches have as many.
    """
    kept = [Rows(n_tokens) for _ in places]  # tables of (n_tokens, n_uses, d_model)
    with evaluating(model), onednn_on(model.device), ExitStack() as stack:
        recorded = [stack.enter_context(recording_inputs(place)) for place in places]
        for batch in track(batches, READING):
            model.base_model(**to_device(batch, model.device))
            real = batch["attention_mask"].bool()  # (n_texts, n_tokens)
            for rows, calls in zip(kept, recorded, strict=True):
                x = torch.cat(calls, 1).to("cpu", torch.float32)  # (n_texts, n_uses * n_tokens, d_model)
                by_token = x.unflatten(1, (-1, real.shape[1])).transpose(1, 2)
                rows.add(by_token[real])  # (n_real, n_uses, d_model)
                calls.clear()
    return [rows.table.flatten(0, 1) for rows in kept]


@contextmanager
def recording_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yields a list to which every call of `module` adds its input."""
    recorded: list[Tensor] = []
    with module.register_forward_pre_hook(lambda _module, args: recorded.append(args[0])):
        yield recorded


def wait(rows: Rows, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
    """A hook: a forward pass in a coroutine adds the input of a module to `rows`, and waits there."""
    rows.add(real_rows(args[0]))
    getcurrent().parent.switch()


def keep(rows: Rows, _module: nn.Module, _args: object, output: Tensor) -> None:
    """A hook: a forward pass in a coroutine adds the output of a module to `rows`."""
    rows.add(real_rows(output))


def real_rows(x: Tensor) -> Tensor:
    """What the coroutine has at tokens that are no padding, `(n_real, d_model)`, float32 on the CPU."""
    real = getcurrent().real  # (n_texts, n_tokens)
    flat = x.to("cpu", torch.float32).reshape(real.numel(), x.shape[-1])
    return flat.index_select(0, real.flatten().nonzero()[:, 0])  # indexing by the mask takes longer
