"""One layer: dense, the PyTorch reference and the kernel, in turn within one run.

    python benchmarks/layer.py [--threads N] [--seconds S] [--case NAME]

Prints medians in microseconds, and how many times faster than the dense layer. The three are measured in
turn, round after round, so that whatever else the machine does falls on all of them alike. `GEMM` is the
share of the rate at which the same run's largest matrix product multiplies: routers, leaf and trunk counted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from fffconvert.kernels import FFFWeights, cpu, reference, status
from fffconvert.tree import TreeShape

CASES = {
    "minilm": (384, 1536, TreeShape(depth=7, leaf_width=12)),
    "bert": (768, 3072, TreeShape(depth=7, leaf_width=12)),
    "paper": (768, 4095, TreeShape(depth=11, leaf_width=1, emitting=True)),
}
Timed = dict[str, Callable[[], object]]


def random_weights(d_model: int, shape: TreeShape) -> FFFWeights:
    """Weights of `shape`, scaled so that pre-activations are of order 1."""
    trees, leaves, nodes, width = shape.trees, shape.n_leaves, shape.n_nodes, shape.leaf_width
    scale = d_model**-0.5
    return FFFWeights(
        router_weight=torch.randn(trees, nodes, d_model) * scale,
        router_bias=torch.zeros(trees, nodes),
        node_out_weight=torch.randn(trees, nodes if shape.emitting else 0, d_model) * scale,
        leaf_in_weight=torch.randn(trees, leaves, width, d_model) * scale,
        leaf_in_bias=torch.zeros(trees, leaves, width),
        leaf_out_weight=torch.randn(trees, leaves, width, d_model) * scale,
        leaf_out_bias=torch.zeros(trees, leaves, d_model),
        trunk_in_weight=torch.randn(shape.trunk, d_model) * scale,
        trunk_in_bias=torch.zeros(shape.trunk),
        trunk_out_weight=torch.randn(shape.trunk, d_model) * scale,
    )


def medians(timed: Timed, seconds: float) -> dict[str, float]:
    """The median time of each, in microseconds: called in turn for `seconds`, at least 5 rounds."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    repeats = {}
    for name, call in timed.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, min(50, int(5e-4 / (time.perf_counter() - start))))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[name]) < 5:
        for name, call in timed.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name] * 1e6)
    return {name: median(values) for name, values in times.items()}


def calls(x: Tensor, d_model: int, n_neurons: int, weights: FFFWeights) -> Timed:
    """Dense, reference and kernel, forward only."""
    up, down = torch.nn.Linear(d_model, n_neurons), torch.nn.Linear(n_neurons, d_model)
    up.requires_grad_(False), down.requires_grad_(False)
    return {
        "dense": lambda: down(F.gelu(up(x))),
        "reference": lambda: reference.fff_forward(x, weights, "gelu"),
        "kernel": lambda: cpu.fff_forward(x, weights, "gelu"),
    }


def training_calls(x: Tensor, d_model: int, n_neurons: int, weights: FFFWeights) -> Timed:
    """The same forward and backward, and the kernel's forward alone, which is the yardstick."""
    up, down = torch.nn.Linear(d_model, n_neurons), torch.nn.Linear(n_neurons, d_model)
    grad = torch.randn_like(x)
    x = x.clone().requires_grad_()
    leaves = FFFWeights(*(w.clone().requires_grad_() for w in weights))
    dense = [x, *up.parameters(), *down.parameters()]

    def backward(y: Tensor, inputs: list[Tensor]) -> object:
        return torch.autograd.grad(y, inputs, grad, allow_unused=True)

    return {
        "dense": lambda: backward(down(F.gelu(up(x))), dense),
        "reference": lambda: backward(reference.fff_forward(x, leaves, "gelu"), [x, *leaves]),
        "kernel": lambda: backward(cpu.fff_forward(x, leaves, "gelu"), [x, *leaves]),
        "forward": lambda: cpu.fff_forward(x.detach(), weights, "gelu"),
    }


def multiplications(shape: TreeShape, d_model: int) -> float:
    """What one token costs."""
    return 2 * d_model * shape.active_neurons


def gemm_rate() -> float:
    """Multiplications per microsecond of a large matrix product."""
    a = torch.randn(2048, 2048)
    return 2048**3 / medians({"gemm": lambda: a @ a}, 1.0)["gemm"]


def measure(name: str, seconds: float, rate: float) -> None:
    """Prints the tables of one case; `rate` is that of `gemm_rate`."""
    d_model, n_neurons, shape = CASES[name]
    weights = random_weights(d_model, shape)
    print(f"\n{name}: d_model {d_model}, dense {n_neurons}, {shape}")
    print(f"{'tokens':>8}{'dense µs':>11}{'reference µs':>14}{'kernel µs':>11}{'x dense':>9}{'GEMM':>7}")
    for n_tokens in (1, 16, 128, 1024, 4096):
        x = torch.randn(n_tokens, d_model)
        with torch.inference_mode():
            t = medians(calls(x, d_model, n_neurons, weights), seconds)
        share = n_tokens * multiplications(shape, d_model) / t["kernel"] / rate
        print(
            f"{n_tokens:8}{t['dense']:11.1f}{t['reference']:14.1f}{t['kernel']:11.1f}"
            f"{t['dense'] / t['kernel']:9.1f}{share:7.0%}"
        )
    print("forward and backward; `forward` is the inference kernel's forward of the same tokens")
    for n_tokens in (640, 4096):
        t = medians(training_calls(torch.randn(n_tokens, d_model), d_model, n_neurons, weights), seconds)
        print(
            f"{n_tokens:8}{t['dense']:11.1f}{t['reference']:14.1f}{t['kernel']:11.1f}"
            f"{t['dense'] / t['kernel']:9.1f}  = {t['kernel'] / t['forward']:.1f} x forward"
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="per line of the table")
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if not status()["cpu"].available:
        raise SystemExit(status()["cpu"].reason)
    rate = gemm_rate()
    print(
        f"torch {torch.__version__}, {arguments.threads} threads, matrix product {rate / 1e3:.0f} G mul-adds/s"
    )
    for name in arguments.case or CASES:
        measure(name, arguments.seconds, rate)


if __name__ == "__main__":
    main()
