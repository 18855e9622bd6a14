"""Text in; out comes what every FFN is given and gives, and how much the model's outputs depend on it.

It is a uniform sample of the text, in memory that the amount of text cannot grow.
"""

from __future__ import annotations

import reprlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from random import Random
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.generic import ModelOutput

from fffconvert.display import say, track
from fffconvert.errors import UserError
from fffconvert.families import (
    base_of,
    family_of,
    ffn_inputs_of,
    ffn_outputs_of,
    longest_text,
    read_ffns,
)
from fffconvert.projection import onednn_on
from fffconvert.recipe import MAX_LENGTH

Text = str | tuple[str, str]
"""A text, or a pair of them for a model that reads two."""

Batch = dict[str, Tensor]
"""A padded batch as a model takes it, each tensor `(n_texts, n_tokens)`."""

TOKEN_LOGITS = ("start_logits", "end_logits")  # one number per token: (n_texts, n_tokens)
READING = "Reading calibration text"
BATCH_SIZE = 32
BATCH_SIZE_OF_WORDS = 4  # where the words of a vocabulary are differentiated
ENCODED_AT_ONCE = 1024
FEWEST_TOKENS_PER_TEXT = 4  # a word between two special tokens, and one to spare
SENSITIVITY_TOKENS = 8192  # what is estimated from them are no more than d_model * d_model numbers


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
    """`max_length`, or what the model can read at the most; who asked for more is told.

    Raises:
        UserError: For a length that holds no word, or a tokenizer that cannot pad.
    """
    if tokenizer.pad_token is None:
        raise UserError("the tokenizer has no padding token; expected one: set `pad_token` and save it")
    least = tokenizer.num_special_tokens_to_add(pair=True) + 1
    if max_length < least:
        raise UserError(
            f"max_length is {max_length}; expected at least {least}, as the tokenizer adds {least - 1}"
        )
    limit = min(tokenizer.model_max_length, longest_text(config) if config else max_length)
    if limit < max_length != MAX_LENGTH:
        say(f"Texts are cut at {limit} tokens: the model reads no more")
    return min(limit, max_length)


@dataclass(frozen=True)
class Calibration:
    """Text as a dense model reads it: what a conversion is fitted on.

    Attributes:
        batches: Padded batches of texts of like length, in random order.
        n_tokens: Tokens of the text that are kept, from the first.
        model: The dense model.
        seed: Of what is drawn.
    """

    batches: list[Batch]
    n_tokens: int
    model: PreTrainedModel
    seed: int

    @cached_property
    def sensitivities(self) -> list[Tensor]:
        """Of every FFN, what its errors cost, `(d_model, d_model)`; computed when first asked for."""
        places = ffn_outputs_of(self.model, family_of(self.model.config))
        return sensitivities(self.model, places, self.batches, self.seed)

    @cached_property
    def shares_ffns(self) -> bool:
        """Whether the model uses an FFN more than once (ALBERT)."""
        places = ffn_inputs_of(self.model, family_of(self.model.config))
        return any(len(inputs) > 1 for inputs in hear(self.model, places, self.batches[:1], 1))

    def ffns(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What every FFN is given and gives, first layer to last: twice `(n_tokens, d_model)` float32 on the CPU.

        The same tokens in each; padding is never among them. Of an FFN that layers share those of all its uses,
        `(n_tokens * n_uses, d_model)`. The model goes on to a layer when that is asked for, so memory does not
        grow with the number of layers, but with that of an FFN's uses.
        """
        family = family_of(self.model.config)
        places = ffn_inputs_of(self.model, family)
        if self.shares_ffns:
            heard = hear(self.model, places, self.batches, self.n_tokens)
            for ffn, inputs in zip(read_ffns(self.model, family), heard, strict=True):
                yield inputs, ffn.in_chunks(inputs)
        else:
            yield from self.read_by(self.model).through(places, ffn_outputs_of(self.model, family))

    def read_by(self, model: PreTrainedModel) -> Reading:
        """A model at the start of the same text."""
        return Reading(model, self.batches, self.n_tokens)


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


class Reading:
    """A model in the midst of a text, which has come as far as the module whose inputs were asked for last.

    The forward pass of every batch waits there, and later goes on from there: nothing is computed twice, and
    what lies further on may change meanwhile. What waits takes a few times `n_tokens * d_model` numbers.

    Args:
        model: Any model.
        batches: Padded batches.
        n_tokens: Tokens to keep, from the first.
    """

    def __init__(self, model: PreTrainedModel, batches: list[Batch], n_tokens: int) -> None:
        self.model, self.n_tokens = model, n_tokens
        self.passes = [greenlet(partial(base_of(model), **on(model.device, batch))) for batch in batches]
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
        with evaluating(self.model), undivided(self.model), onednn_on(self.model.device):
            for forward_pass in track(self.passes, description):
                forward_pass.switch()


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Text],
    n_tokens: int,
    seed: int = 0,
    max_length: int = MAX_LENGTH,
) -> Calibration:
    """Takes a uniform sample of a stream of text for a dense model to read.

    Memory does not grow with the stream: it holds `n_tokens / FEWEST_TOKENS_PER_TEXT` texts.

    Args:
        model: A dense model of a known family. Left as it was.
        tokenizer: Its tokenizer.
        texts: Any number of texts or pairs; read once.
        n_tokens: Tokens to read, fewer if the text has fewer.
        seed: Which texts are taken.
        max_length: Tokens that a text is cut at.

    Raises:
        UserError: For no text at all, what is no text, single texts among pairs, or an unknown family.
    """
    if isinstance(texts, str):
        raise UserError("the calibration texts are one text; expected a list of them")
    sample = sample_texts(texts, -(-n_tokens // FEWEST_TOKENS_PER_TEXT), seed)
    if not sample:
        raise UserError("the calibration text is empty; expected at least one line of text")
    for text in sample:
        if not is_text(text):
            raise UserError(
                f"a calibration text is {reprlib.repr(text)}; expected text or a pair of texts, as a "
                "column of a Dataset holds"
            )
    if len({isinstance(text, str) for text in sample}) > 1:
        raise UserError("some calibration texts are pairs and some are not; expected the one or the other")
    limit = readable_length(tokenizer, model.config, max_length)
    batches = batches_of(sample, tokenizer, n_tokens, limit, seed)
    n_tokens = min(n_tokens, sum(int(batch["attention_mask"].sum()) for batch in batches))
    return Calibration(batches, n_tokens, model, seed)


def is_text(value: Any) -> bool:
    """Whether it is a text, or a pair of texts."""
    if isinstance(value, tuple | list):
        return len(value) == 2 and all(isinstance(part, str) for part in value)
    return isinstance(value, str)


def batches_of(
    sample: list[Text], tokenizer: PreTrainedTokenizerBase, n_tokens: int, max_length: int, seed: int
) -> list[Batch]:
    """The first texts that have `n_tokens` together, in batches of like length, which need little padding."""
    rows: list[dict[str, list[int]]] = []
    for start in range(0, len(sample), ENCODED_AT_ONCE):
        encoded = encode(tokenizer, sample[start : start + ENCODED_AT_ONCE], max_length)
        rows += [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
        if sum(len(row["input_ids"]) for row in rows) >= n_tokens:
            break
    totals = list(accumulate(len(row["input_ids"]) for row in rows))
    rows = sorted(rows[: bisect_left(totals, n_tokens) + 1], key=lambda row: len(row["input_ids"]))
    batches = [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
    Random(seed).shuffle(batches)
    return [dict(tokenizer.pad(batch, return_tensors="pt")) for batch in batches]


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[Text], max_length: int
) -> dict[str, list[list[int]]]:
    """Texts or pairs as a model takes them, not padded yet."""
    firsts = [text if isinstance(text, str) else text[0] for text in texts]
    seconds = None if isinstance(texts[0], str) else [text[1] for text in texts]
    return dict(tokenizer(firsts, seconds, truncation=True, max_length=max_length))


@torch.no_grad()
def hear(
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
    with evaluating(model), undivided(model), onednn_on(model.device), ExitStack() as stack:
        heard = [stack.enter_context(listening(place)) for place in places]
        for batch in track(batches, READING):
            base_of(model)(**on(model.device, batch))
            real = batch["attention_mask"].bool()  # (n_texts, n_tokens)
            for rows, calls in zip(kept, heard, strict=True):
                x = torch.cat(calls, 1).to("cpu", torch.float32)  # (n_texts, n_uses * n_tokens, d_model)
                rows.add(
                    x.unflatten(1, (-1, real.shape[1])).transpose(1, 2)[real]
                )  # (n_real, n_uses, d_model)
                calls.clear()
    return [rows.table.flatten(0, 1) for rows in kept]


def sensitivities(
    model: PreTrainedModel, places: list[nn.Module], batches: list[Batch], seed: int
) -> list[Tensor]:
    """How a model's outputs depend on the outputs of some modules: for each `(d_model, d_model)`, mean diagonal 1.

    For a small error `e` of a module's output at a token, `e @ sensitivity @ e` is in proportion to the squared
    error that it makes in what the model gives: the logits, or the last hidden states where there is no head. It is
    the mean over tokens of `J.T @ J`, `J` the Jacobian: the Gauss-Newton matrix, by one random projection of
    the outputs for each batch (Hutchinson 1989).

    Args:
        model: Any model. Left as it was.
        places: Modules in it; one may be used several times.
        batches: Padded batches; the first are used, some `SENSITIVITY_TOKENS` together.
        seed: Of the projections.

    Raises:
        UserError: For gradients that are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    totals = [torch.zeros(()) for _ in places]
    ends = accumulate(int(batch["attention_mask"].sum()) for batch in batches)
    few = batches[: bisect_left(list(ends), SENSITIVITY_TOKENS) + 1]
    if model.get_output_embeddings() is not None:  # a number for each word of the vocabulary at each place
        few = [part for batch in few for part in parts_of(batch)]
    # a head that chooses among texts reads them in groups
    asked = base_of(model) if type(model).__name__.endswith("ForMultipleChoice") else model
    with (
        evaluating(model),
        frozen(model),
        torch.enable_grad(),
        onednn_on(model.device),
        differentiable(places) as outputs,
    ):
        for batch in track(few, "Differentiating"):
            given = asked(**on(model.device, batch))
            projected = projection(given, batch["attention_mask"], generator)
            flat = [output for of_place in outputs for output in of_place]
            gradients = iter(torch.autograd.grad(projected, flat))
            for number, of_place in enumerate(outputs):
                rows = torch.cat([next(gradients).flatten(0, -2) for _ in of_place]).float().cpu()
                totals[number] = totals[number] + rows.T @ rows
                of_place.clear()
    for total in totals:
        check_finite(total)
    return [total / total.diagonal().mean().clamp_min(torch.finfo(total.dtype).tiny) for total in totals]


def on(device: torch.device, batch: Batch) -> Batch:
    """A batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def parts_of(batch: Batch) -> list[Batch]:
    """A batch in smaller ones."""
    columns = [tensor.split(BATCH_SIZE_OF_WORDS) for tensor in batch.values()]
    return [dict(zip(batch, parts, strict=True)) for parts in zip(*columns, strict=True)]


def projection(given: ModelOutput, attention_mask: Tensor, generator: torch.Generator) -> Tensor:
    """A random projection, a scalar, of a model's logits, or of its last hidden states at real tokens."""
    outputs = {name: value for name, value in given.items() if name.endswith("logits")} or {"": given[0]}
    total = given[0].new_zeros(())
    for name, output in outputs.items():
        weights = torch.randn(output.shape, generator=generator).to(output)
        real = attention_mask.to(output)  # (n_texts, n_tokens)
        if name in TOKEN_LOGITS:
            weights *= real
        elif output.dim() == 3:  # (n_texts, n_tokens, n_outputs)
            weights *= real[..., None]
        total = total + (weights * output).sum()
    return total


@contextmanager
def differentiable(modules: list[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """Yields a list per module, to which every call of it adds its output, from which a gradient can be asked.

    The graph begins at the first of them, whether the model's parameters require gradients or not.
    """
    outputs: list[list[Tensor]] = [[] for _ in modules]

    def listen(of_module: list[Tensor], output: Tensor) -> Tensor:
        if not any(outputs):
            output = output.detach().requires_grad_()
        of_module.append(output)
        return output

    hooks = [
        module.register_forward_hook(lambda _module, _args, output, own=own: listen(own, output))
        for module, own in zip(modules, outputs, strict=True)
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def listening(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yields a list to which every call of `module` adds its input."""
    heard: list[Tensor] = []
    with module.register_forward_pre_hook(lambda _module, args: heard.append(args[0])):
        yield heard


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


@contextmanager
def undivided(model: nn.Module) -> Iterator[None]:
    """Gives every FFN all tokens at once for a while, where a configuration says a few at a time."""
    name = "chunk_size_feed_forward"
    chunks = {module: getattr(module, name) for module in model.modules() if hasattr(module, name)}
    for module in chunks:
        setattr(module, name, 0)
    try:
        yield
    finally:
        for module, chunk in chunks.items():
            setattr(module, name, chunk)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Lets no parameter require a gradient for a while: a backward pass would compute what nobody asked for."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switches dropout off for a while."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
