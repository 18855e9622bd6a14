"""Latency side by side: what is compared is timed in turn within one run, and medians are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from fffconvert import onnx_runtime
from fffconvert.activations import recording_inputs
from fffconvert.clock import Run, thread_counts, time_in_turn, using_threads
from fffconvert.configuration import refuse_dense
from fffconvert.display import say, track
from fffconvert.errors import first_line
from fffconvert.families import (
    Family,
    family_of,
    ffn_starts_of,
    layers_of,
    longest_text,
    random_ids,
)
from fffconvert.fff import FFF, fffs_of
from fffconvert.kernels import reference
from fffconvert.machine import machine_name
from fffconvert.modeling import check_is_model
from fffconvert.modes import evaluating
from fffconvert.pair import check_original
from fffconvert.twins import LIMIT, models_beside, untrained_twin

Layer = Callable[[Tensor], object]

COMPILED = ("dense", "converted")  # the models that are also timed under `torch.compile`
LAYER_TOKENS = (1, 16, 128)
FULL_LAYER_TOKENS = (1, 16, 128, 1024, 4096)
MODEL_SIZES = ((1, 16), (1, 128), (8, 128))  # batch, length
FULL_MODEL_SIZES = tuple((batch, length) for batch in (1, 8, 32) for length in (16, 128, 384))
SECONDS_PER_ROW = 3.0
FEWEST_INPUTS = 128  # tokens that a layer is timed on, few at a time or all at once
WIDE_SPREAD = 0.25  # interquartile range over median, past which a machine was busy with something else


@dataclass(frozen=True)
class Timing:
    """One row of the table.

    Attributes:
        what: `layer` or `model`.
        size: Tokens for a layer, `batch x length` for a model.
        threads: PyTorch's threads, and ONNX Runtime's.
        medians: Milliseconds, by what was run.
        spreads: Interquartile range over median, by what was run.
        steady: Whether the machine was quiet enough for every median to mean something.
        to_limit: Of a model: the converted one's time over that of the same without FFNs, which was timed in the same
            round; the median over the rounds.
    """

    what: str
    size: str
    threads: int
    medians: dict[str, float]
    spreads: dict[str, float]
    steady: bool
    to_limit: float | None


@dataclass(frozen=True)
class Latency:
    """Timings, the machine that they were taken on, and why something was not timed, by its name."""

    machine: str
    rows: list[Timing]
    absent: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `--json` and `report.json` hold them."""
        return asdict(self)


def benchmark(
    model: PreTrainedModel,
    dense: PreTrainedModel | None = None,
    *,
    sizes: Sequence[tuple[int, int]] = MODEL_SIZES,
    layer_tokens: Sequence[int] = LAYER_TOKENS,
    others: bool = True,
    seconds_per_row: float = SECONDS_PER_ROW,
) -> Latency:
    """Times the layers, and the whole model, beside the dense original and the controls: FFNs narrow, or removed.

    Layers are called one after the other, each on what it gets in the model, and then again on other tokens: what a
    call computes with comes from memory, as in a model, unless the caches hold all of its layers.

    Args:
        model: A converted model, on the CPU.
        dense: Its original, which is timed in the dtype of `model`. Latency does not depend on the weights of a
            dense model, so without one an untrained model of the same size stands in.
        sizes: Batch and length of the inputs to the whole models; lengths are cut to what the model can read.
        layer_tokens: Tokens in the inputs to a layer.
        others: Also what takes a while to prepare: both models and the dense layer under `torch.compile`, and
            ONNX Runtime: the dense model in float32 and dynamic int8, the converted one in float32.
        seconds_per_row: Time to spend on a row, preparation apart.

    Returns:
        Medians for one thread and for all of PyTorch's.

    Raises:
        UserError: For a model that is not converted, or an original of another family or size.
    """
    check_is_model(model)
    refuse_dense(model.config)
    family = family_of(model.config)
    dense = dense or untrained_twin(model)
    check_original(model, dense)
    models = models_beside(model, dense, family)
    sizes = sizes_that_fit(sizes, longest_text(model.config))
    absent: dict[str, str] = {}
    graphs: list[str] = []
    with ExitStack() as stack:
        for each in models.values():
            stack.enter_context(evaluating(each))
        folder = Path(stack.enter_context(TemporaryDirectory()))
        if others and sizes:
            graphs, absent = onnx_runtime.prepare(models["dense"], model, random_ids(model, 2, 16), folder)
        stack.enter_context(torch.inference_mode())
        rows = time_layers(models, family, layer_tokens, others, seconds_per_row, absent)
        rows += time_models(models, graphs, folder, sizes, others, seconds_per_row, absent)
    return Latency(machine_name(), rows, absent)


def sizes_that_fit(sizes: Sequence[tuple[int, int]], longest: int) -> list[tuple[int, int]]:
    """Batches and lengths, each once, with lengths that a model can read; says so where they were longer."""
    cut = dict.fromkeys((batch, min(length, longest)) for batch, length in sizes)
    if any(length > longest for _, length in sizes):
        say(f"Texts are timed at {longest} tokens where more were asked for: the model reads no more")
    return list(cut)


def time_layers(
    models: Mapping[str, PreTrainedModel],
    family: Family,
    numbers_of_tokens: Sequence[int],
    others: bool,
    seconds: float,
    absent: dict[str, str],
) -> list[Timing]:
    """A row for each number of threads and of tokens: the models' FFNs, each on what it gets in its model."""
    if not numbers_of_tokens:
        return []
    layers = layers_beside(models, family)
    inputs = inputs_of_layers(models["converted"], max(*numbers_of_tokens, FEWEST_INPUTS))
    rows = []
    for threads, n_tokens in track([*product(thread_counts(), numbers_of_tokens)], "Timing layers"):
        with using_threads(threads):
            runs = runs_of(layers, in_pieces(inputs, n_tokens), ("dense",) if others else (), absent)
            rows.append(time_row("layer", f"{n_tokens}", threads, runs, seconds))
    return rows


def time_models(
    models: Mapping[str, PreTrainedModel],
    graphs: Sequence[str],
    folder: Path,
    sizes: Sequence[tuple[int, int]],
    others: bool,
    seconds: float,
    absent: dict[str, str],
) -> list[Timing]:
    """A row for each number of threads and size: the whole models, and the `graphs` of them in `folder`."""
    whole = {name: [each] for name, each in models.items()}
    rows = []
    for threads, (batch, length) in track([*product(thread_counts(), sizes)], "Timing models"):
        with using_threads(threads):
            ids = random_ids(models["converted"], batch, length)
            runs = runs_of(whole, [[ids]], COMPILED if others else (), absent)
            runs |= {name: onnx_runtime.runner(folder, name, ids, threads) for name in graphs}
            rows.append(time_row("model", f"{batch} x {length}", threads, runs, seconds))
    return rows


# ---- What is compared


def layers_beside(models: Mapping[str, PreTrainedModel], family: Family) -> dict[str, Sequence[Layer]]:
    """The FFNs of these models, first layer to last, and those of the converted one in plain PyTorch too."""
    layers = with_reference(dense_ffns(models["dense"], family), fffs_of(models["converted"]))
    if "dense oneDNN" in models:
        layers["dense oneDNN"] = dense_ffns(models["dense oneDNN"], family)
    if "narrow" in models:
        layers["narrow"] = fffs_of(models["narrow"])
    return layers


def inputs_of_layers(model: PreTrainedModel, n_tokens: int) -> list[Tensor]:
    """What each FFF really gets, `(n_tokens, d_model)`; of one that layers share, in the middle one of these."""
    length = min(64, longest_text(model.config))
    with ExitStack() as stack:
        recorded = [stack.enter_context(recording_inputs(fff)) for fff in fffs_of(model)]
        model(input_ids=random_ids(model, -(-n_tokens // length), length))
    return [inputs[len(inputs) // 2].flatten(0, 1)[:n_tokens] for inputs in recorded]


def in_pieces(inputs: Sequence[Tensor], n_tokens: int) -> list[Sequence[Tensor]]:
    """Each layer's inputs, `n_tokens` at a time."""
    return [x[: len(x) // n_tokens * n_tokens].split(n_tokens) for x in inputs]


def dense_ffns(dense: PreTrainedModel, family: Family) -> list[nn.Module]:
    """The FFNs of a dense model as modules of their own, first layer to last."""
    if not family.bypassed:  # the place is the whole FFN
        return ffn_starts_of(dense, family)
    activation = ACT2FN[getattr(dense.config, family.activation)]
    return [
        nn.Sequential(layer.get_submodule(family.up), activation, layer.get_submodule(family.down))
        for layer in layers_of(dense, family)
    ]


def with_reference(dense: Sequence[nn.Module], fffs: Sequence[FFF]) -> dict[str, Sequence[Layer]]:
    """Dense FFNs and FFFs by name, and the same FFFs in plain PyTorch."""

    def plain(fff: FFF, x: Tensor) -> Tensor:
        return reference.fff_forward(x, fff.weights, fff.activation)

    return {"dense": dense, "converted": fffs, "reference": [partial(plain, fff) for fff in fffs]}


def in_turn(functions: Sequence[Layer], inputs: Sequence[Sequence[Tensor]]) -> Run:
    """Whatever is called next: one function after the other, each on its own inputs in turn."""
    turns = zip(*inputs, strict=True)
    calls = [partial(function, x) for turn in turns for function, x in zip(functions, turn, strict=True)]
    coming = cycle(calls)
    return lambda: next(coming)()


def runs_of(
    functions: Mapping[str, Sequence[Layer]],
    inputs: Sequence[Sequence[Tensor]],
    also_compiled: Sequence[str],
    absent: dict[str, str],
) -> dict[str, Run]:
    """Layers, or a model alone, some of them compiled as well, ready to be timed.

    Args:
        functions: By name, one for each layer.
        inputs: For each layer, what it is called on in turn: tensors of one shape, `(n_tokens, d_model)` or token ids.
        also_compiled: The names of those to compile.
        absent: Gets the reason why something cannot be compiled, and is left out.
    """
    runs = {name: in_turn(each, inputs) for name, each in functions.items()}
    if also_compiled:
        torch._dynamo.reset()  # each size and each number of threads is compiled for itself, past no limit
    for name in also_compiled:
        compiled = [torch.compile(each, fullgraph=True, dynamic=False) for each in functions[name]]
        run = in_turn(compiled, inputs)
        try:
            for _ in compiled:  # layers share what the first one was compiled to
                run()
        except Exception as error:  # noqa: BLE001 - Dynamo, Inductor and the C++ compiler raise what they like
            absent[f"{name} compiled"] = f"not compiled: {type(error).__name__} {first_line(error)}"
        else:
            runs[f"{name} compiled"] = run
    return runs


# ---- Rows of the table


def time_row(what: str, size: str, threads: int, runs: dict[str, Run], seconds: float) -> Timing:
    """One row: medians and spreads of what `time_in_turn` gives."""
    times = dict(zip(runs, time_in_turn(list(runs.values()), seconds), strict=True))
    medians = {name: float(np.median(taken)) for name, taken in times.items()}
    spreads = {
        name: float(np.subtract(*np.percentile(taken, [75, 25]))) / medians[name]
        for name, taken in times.items()
    }
    to_limit = float(np.median(np.divide(times["converted"], times[LIMIT]))) if LIMIT in times else None
    return Timing(what, size, threads, medians, spreads, max(spreads.values()) < WIDE_SPREAD, to_limit)
