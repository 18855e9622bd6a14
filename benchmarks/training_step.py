"""What one training step costs: a dense model's own step, and the converted model's, timed in turn.

    python -m benchmarks.training_step MODEL

A step is forward, backward and optimizer, as training makes it: by oneDNN. The distillation step adds the teacher's
forward.
"""

from __future__ import annotations

import sys

import torch
from transformers import PreTrainedModel

from fffconvert.checkpoint import load
from fffconvert.conversion import convert
from fffconvert.display import table
from fffconvert.distillation import comparing
from fffconvert.families import random_ids
from fffconvert.latency import time_row
from fffconvert.onednn import onednn_on
from fffconvert.python_docs import standard_library_sentences

SIZES = ((32, 16), (32, 64), (16, 128))  # batch, length


def step(model: PreTrainedModel, ids: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One step on a stand-in for a loss, which costs nothing itself."""
    model(input_ids=ids, output_hidden_states=True)["hidden_states"][-1].square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def distillation_step(
    student: PreTrainedModel, teacher: PreTrainedModel, ids: torch.Tensor, optimizer: torch.optim.Optimizer
) -> None:
    """One step of `fffconvert distill`."""
    with comparing(student, teacher) as loss:
        loss(student, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0].backward()
    optimizer.step()
    optimizer.zero_grad()


def main(name: str) -> None:
    """Prints medians and ratios for a dense model and its conversion to the default tree."""
    loaded = load(name)
    dense, texts = loaded.model, standard_library_sentences()
    student = convert(dense, loaded.tokenizer, texts, calibration_tokens=8192).model
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
        for model in (dense, student)
    ]
    rows = []
    for batch, length in SIZES:
        ids = random_ids(dense, batch, length)
        runs = {
            "dense": lambda ids=ids: step(dense, ids, optimizers[0]),
            "student": lambda ids=ids: step(student, ids, optimizers[1]),
            "distillation": lambda ids=ids: distillation_step(student, dense, ids, optimizers[1]),
        }
        with onednn_on(student.device):
            timing = time_row("step", f"{batch} x {length}", torch.get_num_threads(), runs, 8.0)
        took = timing.medians
        ratios = (took["student"] / took["dense"], took["distillation"] / took["dense"])
        rows.append((timing.size, *took.values(), *ratios, max(timing.spreads.values())))
    columns = [
        "batch",
        "dense step",
        "student step",
        "distillation step",
        "student / dense",
        "distillation / dense",
    ]
    table(f"Training steps in milliseconds, {torch.get_num_threads()} threads", [*columns, "spread"], rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
