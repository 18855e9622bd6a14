"""Latency side by side: what is compared is timed in turn within one run, and medians are kept."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fffconvert.calibration import evaluating, listening
from fffconvert.display import track
from fffconvert.errors import UserError
from fffconvert.families import Family, ffn_inputs_of, layers_of
from fffconvert.kernels import ACTIVATIONS
from fffconvert.modeling import config_with, converted_family, dense_class_of, is_converted
from fffconvert.tree import REMOVED, TreeShape

LAYER_TOKENS = (1, 16, 128, 1024)
MODEL_SIZES = ((1, 16), (1, 128), (8, 128))  # batch, length
SECONDS_PER_ROW = 2.0
FEWEST_ROUNDS, MOST_ROUNDS = 5, 200
WIDE_SPREAD = 0.25  # interquartile range over median, past which a machine was busy with something else


@dataclass(frozen=True)
class Timing:
    """One row of the table; times are medians in milliseconds.

    Attributes:
        what: What was run, and on how much.
        threads: PyTorch's threads.
        dense: The dense FFN or model.
        converted: The FFF layer or converted model.
        removed: The model with its FFNs removed, which is the limit; none for a layer.
        spread: The widest interquartile range among them, over its median.
        steady: Whether the machine was quiet enough for the medians to mean something.
    """

    what: str
    threads: int
    dense: float
    converted: float
    removed: float | None
    spread: float
    steady: bool


@dataclass(frozen=True)
class Latency:
    """A table of timings and the machine that they were taken on."""

    machine: str
    rows: list[Timing]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `--json` and `report.json` hold them."""
        return asdict(self)


def benchmark(
    model: PreTrainedModel,
    dense: PreTrainedModel | None = None,
    *,
    sizes: Sequence[tuple[int, int]] = MODEL_SIZES,
    layer_tokens: Sequence[int] = LAYER_TOKENS,
    seconds_per_row: float = SECONDS_PER_ROW,
) -> Latency:
    """Times one layer, and the whole model, beside the dense original and the model with FFNs removed.

    Args:
        model: A converted model, on the CPU.
        dense: Its original. Latency does not depend on the weights of a dense model, so without one an
            untrained model of the same size stands in.
        sizes: Batch and length of the inputs to the whole models.
        layer_tokens: Tokens in the inputs to a layer.
        seconds_per_row: Time to spend on a row.

    Returns:
        Medians for one thread and for all of PyTorch's.

    Raises:
        UserError: For a model that is not converted, or an original of another family or size.
    """
    if not is_converted(model.config):
        raise UserError(f"model type {model.config.model_type!r} is not that of a converted model")
    family = converted_family(model.config)
    dense = dense or untrained_twin(model)
    check_original(model, dense)
    removed = untrained_twin(model, REMOVED)
    all_threads = torch.get_num_threads()
    cases: list[tuple[str, int, tuple[Callable[[], object], ...]]] = []
    with evaluating(model), evaluating(dense), evaluating(removed), torch.inference_mode():
        layer_inputs = inputs_of_middle_layer(model, family, max(layer_tokens))
        for threads in sorted({1, all_threads}):
            for n_tokens in layer_tokens:
                run = layer_runs(model, dense, family, layer_inputs[:n_tokens])
                cases.append((f"layer, {n_tokens} tokens", threads, run))
            for batch, length in sizes:
                ids = random_ids(model.config, batch, length)
                runs = tuple(_call(m, input_ids=ids) for m in (dense, model, removed))
                cases.append((f"model, {batch} x {length} tokens", threads, runs))
        rows = []
        for what, threads, runs in track(cases, "Measuring latency"):
            with using_threads(threads):
                rows.append(make_timing(what, threads, time_in_turn(runs, seconds_per_row)))
    return Latency(machine_name(), rows)


def untrained_twin(model: PreTrainedModel, shape: TreeShape | None = None) -> PreTrainedModel:
    """An untrained model of the same size and head: converted to another shape, or dense."""
    if shape is not None:
        twin = type(model)(config_with(model.config, type(model.config), fff=shape.to_dict()))
    else:
        dense_class = dense_class_of(type(model))
        twin = dense_class(config_with(model.config, dense_class.config_class))
    return cast(PreTrainedModel, cast(nn.Module, twin).to(model.dtype))


def check_original(model: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Raises a `UserError` for a dense model that cannot be the converted one's original."""
    family = converted_family(model.config)
    if dense.config.model_type != family.model_type:
        raise UserError(
            f"the dense model is of type {dense.config.model_type!r}; expected {family.model_type!r}"
        )
    for name in (family.d_model, family.n_neurons, "num_hidden_layers", "vocab_size"):
        ours, theirs = getattr(model.config, name), getattr(dense.config, name)
        if ours != theirs:
            raise UserError(
                f"{name} is {ours} in the converted model and {theirs} in the dense one; expected the same"
            )


def random_ids(config: PreTrainedConfig, batch: int, length: int) -> Tensor:
    """Token ids `(batch, length)`, the same in every run."""
    return torch.randint(5, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


def inputs_of_middle_layer(model: PreTrainedModel, family: Family, n_tokens: int) -> Tensor:
    """What the FFF in the middle of the model really gets: `(n_tokens, d_model)`."""
    places = ffn_inputs_of(model, family)
    length = min(64, model.config.max_position_embeddings - 2)
    with listening(places[len(places) // 2 :][:1]) as heard:
        model(input_ids=random_ids(model.config, -(-n_tokens // length), length))
    return heard[0].flatten(0, 1)[:n_tokens]


def layer_runs(
    model: PreTrainedModel, dense: PreTrainedModel, family: Family, x: Tensor
) -> tuple[Callable[[], object], ...]:
    """The dense FFN and the FFF in the middle of the model, ready to be timed on `x`."""
    layers = layers_of(dense, family)
    middle = len(layers) // 2
    up, down = (layers[middle].get_submodule(path) for path in (family.up, family.down))
    activation = ACTIVATIONS[getattr(model.config, family.activation)]
    return (lambda: down(activation(up(x)))), _call(ffn_inputs_of(model, family)[middle], x)


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Callable[[], object]:
    return lambda: module(*args, **kwargs)


@contextmanager
def using_threads(threads: int) -> Iterator[None]:
    """Sets PyTorch's number of threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_in_turn(runs: Sequence[Callable[[], object]], seconds: float) -> list[list[float]]:
    """Times each of `runs` in turn, round after round, until `seconds` are over; milliseconds."""
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds
    while len(times[0]) < FEWEST_ROUNDS or (time.perf_counter() < end and len(times[0]) < MOST_ROUNDS):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            taken.append(1000 * (time.perf_counter() - start))
    return times


def make_timing(what: str, threads: int, times: list[list[float]]) -> Timing:
    """Medians and spread of what `time_in_turn` gave for dense, converted and, for a model, removed."""
    medians = [float(np.median(taken)) for taken in times]
    spreads = [
        float(np.subtract(*np.percentile(t, [75, 25]))) / m for t, m in zip(times, medians, strict=True)
    ]
    removed = medians[2] if len(medians) > 2 else None
    return Timing(what, threads, medians[0], medians[1], removed, max(spreads), max(spreads) < WIDE_SPREAD)


def machine_name() -> str:
    """Processor and cores, as a reader of the table needs them."""
    return (
        f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
