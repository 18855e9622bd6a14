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
from fffconvert.onednn import onednn_on

READING = "Reading calibration text"


def check_finite(found: Tensor) -> None:
    """Raises a `UserError` for what a model should not give inside."""
    if not found.isfinite().all():
        raise UserError(
            "the model's hidden states are NaN or infinite on the calibration text; expected finite numbers: try the "
            "model in float32, and whether its weights are whole"
        )


class FirstTokens:
    """What is collected of the first tokens, batch after batch, in a table of `(n_tokens, ...)`."""

    table: Tensor

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens, self.n_filled = n_tokens, 0

    def add(self, tokens: Tensor) -> None:
        """Adds what a batch has, `(n_tokens, ...)`; of a last, short one nothing may be wanted.

        Raises:
            UserError: For what is not finite.
        """
        check_finite(tokens)
        if self.n_filled == 0:
            self.table = tokens.new_empty(self.n_tokens, *tokens.shape[1:])
        tokens = tokens[: self.n_tokens - self.n_filled]
        self.table[self.n_filled : self.n_filled + len(tokens)] = tokens
        self.n_filled += len(tokens)


class ForwardPass(greenlet):  # type: ignore[misc]
    """A forward pass over one padded batch, in a coroutine that can pause and knows which tokens are real."""

    def __init__(self, model: PreTrainedModel, batch: Batch) -> None:
        super().__init__(partial(model.base_model, **to_device(batch, model.device)))
        self.real = batch["attention_mask"].bool()  # (n_texts, n_tokens)


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
        self.passes = [ForwardPass(model, batch) for batch in batches]

    def inputs_of(self, place: nn.Module, description: str) -> Tensor:
        """Goes on to a module that the model uses once, and returns its inputs, `(n_tokens, d_model)`."""
        inputs = FirstTokens(self.n_tokens)
        with place.register_forward_pre_hook(partial(add_input_and_pause, inputs)):
            self.go_on(description)
        return inputs.table

    def through(self, starts: list[nn.Module], ends: list[nn.Module]) -> Iterator[tuple[Tensor, Tensor]]:
        """Goes on from part to part of the model, and yields what each is given and gives, `(n_tokens, d_model)`.

        It waits where the part that follows starts: inside one it would have to hold all that is computed there.

        Args:
            starts: The first module of each part, in the model's order.
            ends: The last one.
        """
        inputs = following = self.inputs_of(starts[0], READING)
        for end, start in zip(ends, [*starts[1:], None], strict=True):
            outputs = FirstTokens(self.n_tokens)
            with end.register_forward_hook(partial(add_output, outputs)):
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
    kept = [FirstTokens(n_tokens) for _ in places]  # tables of (n_tokens, n_uses, d_model)
    with evaluating(model), onednn_on(model.device), ExitStack() as stack:
        recorded = [stack.enter_context(recording_inputs(place)) for place in places]
        for batch in track(batches, READING):
            model.base_model(**to_device(batch, model.device))
            real = batch["attention_mask"].bool()  # (n_texts, n_tokens)
            for tokens, calls in zip(kept, recorded, strict=True):
                x = torch.cat(calls, 1).to("cpu", torch.float32)  # (n_texts, n_uses * n_tokens, d_model)
                by_token = x.unflatten(1, (-1, real.shape[1])).transpose(1, 2)
                tokens.add(by_token[real])  # (n_real, n_uses, d_model)
                calls.clear()
    return [tokens.table.flatten(0, 1) for tokens in kept]


@contextmanager
def recording_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yields a list to which every call of `module` adds its input."""
    recorded: list[Tensor] = []
    with module.register_forward_pre_hook(lambda _module, args: recorded.append(args[0])):
        yield recorded


def add_input_and_pause(inputs: FirstTokens, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
    """A hook: adds what a module is given in a `ForwardPass`, which pauses there."""
    inputs.add(real_tokens(args[0]))
    getcurrent().parent.switch()


def add_output(outputs: FirstTokens, _module: nn.Module, _args: object, output: Tensor) -> None:
    """A hook: adds what a module gives in a `ForwardPass`."""
    outputs.add(real_tokens(output))


def real_tokens(x: Tensor) -> Tensor:
    """What the `ForwardPass` that runs has at tokens that are no padding, `(n_real, d_model)`, float32 on the CPU."""
    real = getcurrent().real  # (n_texts, n_tokens)
    flat = x.to("cpu", torch.float32).reshape(real.numel(), x.shape[-1])
    return flat.index_select(0, real.flatten().nonzero()[:, 0])  # indexing by the mask takes longer
