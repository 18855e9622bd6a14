"""Context managers that change a model, or PyTorch, and put it back afterwards, whatever happens meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def moved(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Moves a model to a device, and back afterwards."""
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


@contextmanager
def pytorch_defaults() -> Iterator[None]:
    """Computes in float32, whatever the caller's default or autocast; the caller's random state is left as it was."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            torch.random.fork_rng(devices=[]),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)


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
def own_forward(model: nn.Module) -> Iterator[None]:
    """Undoes afterwards what Accelerate puts around a model's `forward` for mixed precision.

    Its own way back, `unwrap_model`, takes the decorators of `transformers` off too, and leaves a bare function.
    """
    names = ("forward", "_original_forward")
    kept = {name: vars(model)[name] for name in names if name in vars(model)}
    try:
        yield
    finally:
        for name in names:
            vars(model).pop(name, None)
        vars(model).update(kept)


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
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switches a model's dropout off, its FFNs `undivided`, and back on afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with undivided(model):
            yield
    finally:
        for module, training in modes:
            module.training = training
