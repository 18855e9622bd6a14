"""What figures were measured on."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import torch

FACTS = ("model name", "cpu family", "model")
"""Of a processor, in Linux: rented ones of different speed may share a name."""


def processor_name() -> str:
    """The processor's model, and the instructions that PyTorch uses of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    pairs = (line.partition(":") for line in lines)
    given = {key.strip(): value.strip() for key, _, value in pairs}  # of the last core
    name, family, model = (given.get(fact, "") for fact in FACTS)
    numbers = f" (family {family}, model {model})" if family and model else ""
    known = name or platform.processor() or platform.machine()
    return f"{known}{numbers}, {torch.backends.cpu.get_cpu_capability()}"


def machine_name() -> str:
    """The processor, the threads that PyTorch has there, and its version."""
    return f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def versions() -> dict[str, str]:
    """The versions that decide a result."""
    packages = ("fffconvert", "torch", "transformers", "accelerate", "datasets", "scikit-learn", "numpy")
    return {package: metadata.version(package) for package in packages}
