"""One layer of the shapes that the kernel has goals for: dense, compiled, the reference and the kernel.

    python -m benchmarks.layer [--case NAME] [--threads N] [--seconds S] [--json FILE]

`fffconvert benchmark` times the layers of a model of yours; here the shapes are fixed and the weights random. Several
layers are called one after the other, each on other tokens at every call, so weights come from memory as in a model.
Medians in microseconds, taken in turn. `of GEMM` is the share of the rate at which a large matrix product
multiplies in the same run, counting routers, leaf and trunk.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn

from fffconvert import display
from fffconvert.clock import Run
from fffconvert.fff import FFF
from fffconvert.kernels import reference, status
from fffconvert.latency import (
    FEWEST_INPUTS,
    Timing,
    in_pieces,
    runs_of,
    time_row,
    with_reference,
)
from fffconvert.machine import machine_name
from fffconvert.onednn import ONEDNN, OneDNNLinear, product
from fffconvert.tables import show_absent, show_timings
from fffconvert.tree import TreeShape


@dataclass(frozen=True)
class Case:
    """A dense layer, the tree that stands for it, how many of each, and what to time them on."""

    d_model: int
    n_neurons: int
    shape: TreeShape
    n_layers: int
    tokens: tuple[int, ...] = (1, 16, 128, 1024, 4096)
    trained_on: tuple[int, ...] = (640, 4096)
    dtype: torch.dtype = torch.float32

    @property
    def bytes_needed(self) -> int:
        """The weights of both, and as much again as the largest of them takes while it is drawn."""
        dense = 2 * self.n_neurons * self.d_model
        trees = self.shape.n_parameters(self.d_model)
        return self.dtype.itemsize * (self.n_layers * (dense + trees) + dense)


CASES = {
    "minilm": Case(384, 1536, TreeShape(depth=7, leaf_width=12), n_layers=6),
    "bert": Case(768, 3072, TreeShape(depth=7, leaf_width=12), n_layers=12),
    "paper": Case(768, 4095, TreeShape(depth=11, leaf_width=1, emitting=True), n_layers=12),
    "gpt3": Case(
        12_288,
        49_152,
        TreeShape(depth=15, leaf_width=1, emitting=True),
        n_layers=1,  # no cache holds it
        tokens=(1,),
        trained_on=(),
        dtype=torch.bfloat16,
    ),
}


def build(case: Case) -> tuple[list[nn.Sequential], list[FFF]]:
    """The dense layers and the trees, with random weights, in the case's dtype from the start."""
    d_model, n_neurons = case.d_model, case.n_neurons
    torch.set_default_dtype(case.dtype)
    try:
        dense = [
            nn.Sequential(nn.Linear(d_model, n_neurons), nn.GELU(), nn.Linear(n_neurons, d_model))
            for _ in range(case.n_layers)
        ]
        return dense, [FFF(case.shape, d_model, "gelu") for _ in range(case.n_layers)]
    finally:
        torch.set_default_dtype(torch.float32)


def by_onednn(dense: nn.Sequential) -> nn.Sequential:
    """The same layer with oneDNN for MKL."""
    up, activation, down = dense
    return nn.Sequential(
        OneDNNLinear.from_linear(cast(nn.Linear, up)),
        activation,
        OneDNNLinear.from_linear(cast(nn.Linear, down)),
    )


def training_runs(dense: nn.Module, fff: FFF, x: Tensor) -> dict[str, Run]:
    """Forward and backward of each on `x` `(n_tokens, d_model)`, and the kernel's forward alone, the yardstick."""
    grad = torch.randn_like(x)
    tracked = x.clone().requires_grad_()

    def backward(y: Tensor, module: nn.Module) -> object:
        return torch.autograd.grad(y, [tracked, *module.parameters()], grad, allow_unused=True)

    def forward() -> object:
        with torch.inference_mode():
            return fff(x)

    return {
        "dense": lambda: backward(dense(tracked), dense),
        "converted": lambda: backward(fff(tracked), fff),
        "reference": lambda: backward(reference.fff_forward(tracked, fff.weights, "gelu"), fff),
        "converted, forward alone": forward,
    }


def gemm_rate(seconds: float) -> float:
    """Multiplications per millisecond of a large float32 matrix product, by the faster of PyTorch's libraries."""
    a = torch.randn(2048, 2048)
    runs: dict[str, Run] = {"MKL": lambda: a @ a}
    if ONEDNN:
        runs["oneDNN"] = lambda: product(a, a, None)
    return 2048**3 / min(time_row("GEMM", "2048", 1, runs, seconds).medians.values())


def measure(name: str, seconds: float, rate: float) -> list[Timing]:
    """Times one case and prints its tables; `rate` is that of `gemm_rate`."""
    case, threads = CASES[name], torch.get_num_threads()
    available = psutil.virtual_memory().available
    if case.bytes_needed > available:
        display.say(
            f"{name} was not timed: it needs {case.bytes_needed / 2**30:.1f} GiB of memory and "
            f"{available / 2**30:.1f} GiB are free"
        )
        return []
    dense, fffs = build(case)
    title = f"{name}: d_model {case.d_model}, dense {case.n_neurons}, {case.shape}, {case.dtype}"
    layers = with_reference(dense, fffs)
    if ONEDNN and case.dtype == torch.float32:
        layers["dense oneDNN"] = [by_onednn(layer) for layer in dense]
    rows, absent = [], dict[str, str]()
    for n_tokens in case.tokens:
        tokens = torch.randn(case.n_layers, max(n_tokens, FEWEST_INPUTS), case.d_model).to(case.dtype)
        with torch.inference_mode():
            runs = runs_of(layers, in_pieces(list(tokens), n_tokens), ("dense",), absent)
            rows.append(time_row("layer", str(n_tokens), threads, runs, seconds))
    show_timings(f"{title}, threads: {threads}", to_dicts(rows), 1000)
    show_absent(absent)
    cost = 2 * case.d_model * case.shape.active_neurons  # multiplications per token
    shares = [f"{int(row.size) * cost / row.medians['converted'] / rate:.0%}" for row in rows]
    display.say(
        f"of GEMM: {', '.join(f'{row.size} tokens {s}' for row, s in zip(rows, shares, strict=True))}"
    )
    trained = []
    for n_tokens in case.trained_on:
        runs = training_runs(dense[0], fffs[0], torch.randn(n_tokens, case.d_model))
        trained.append(time_row("layer, forward and backward", str(n_tokens), threads, runs, seconds))
    if trained:
        show_timings(f"{name}, forward and backward, threads: {threads}", to_dicts(trained), 1000)
    return rows + trained


def to_dicts(rows: list[Timing]) -> list[dict[str, Any]]:
    return [vars(row) for row in rows]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="per size")
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the timings as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if not status()["cpu"].available:
        raise SystemExit(status()["cpu"].reason)
    rate = gemm_rate(arguments.seconds)
    display.say(f"{machine_name()}, matrix product {rate / 1e6:.0f} G multiplications/s")
    cases = {name: to_dicts(measure(name, arguments.seconds, rate)) for name in arguments.case or CASES}
    if arguments.json:
        report = {"machine": machine_name(), "gemm_per_second": 1000 * rate, "cases": cases}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
