"""One training loop on Accelerate, for a teacher as for a student.

A killed run that is resumed ends with the same weights as one that was not.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import BatchSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from fffconvert.accelerator import make_accelerator, own_accelerate, tracked
from fffconvert.batch import Batch
from fffconvert.display import progress_bar
from fffconvert.errors import UserError
from fffconvert.fff import fffs_of
from fffconvert.loader import EpochSampler, check_tokenized, loader_of, shared_batch_size, steps_from
from fffconvert.modeling import refuse_inference
from fffconvert.modes import own_forward, undivided
from fffconvert.onednn import onednn_on
from fffconvert.recipe import Training, check_seed
from fffconvert.resumption import fingerprint_of, resume, save_checkpoint

Loss = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]
"""From a model and a batch to the loss and the figures to log."""


def optimizer_of(model: nn.Module, settings: Training, n_steps: int) -> tuple[Optimizer, LRScheduler]:
    """AdamW, and its rate over the steps: up to the peak, then linearly down to 0.

    Raises:
        UserError: For a model without a parameter to train.
    """
    groups = parameter_groups(model, settings.learning_rate)
    if not groups:
        raise UserError("no parameter of the model requires a gradient; expected some to train")
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)
    return optimizer, get_scheduler("linear", optimizer, int(settings.warmup * n_steps), n_steps)


@own_accelerate()
@torch.inference_mode(mode=False)
@torch.enable_grad()  # the caller may have switched gradients off
def train(
    model: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    loss: Loss,
    settings: Training,
    *,
    description: str,
    seed: int = 0,
    dropout: bool = True,
    teacher: nn.Module | None = None,
    checkpoints: Path | str | None = None,
    log_with: str | None = None,
) -> None:
    """Trains a model in place, in float32: in half precision most of an update would round away.

    Afterwards it is on the CPU, its dropout off, and the generators of PyTorch, NumPy and Python are seeded anew.

    Args:
        model: What is trained: every parameter that requires a gradient.
        rows: Tokenized rows with their `length`.
        tokenizer: Pads them.
        loss: What is minimized; called with the model as Accelerate wraps it.
        settings: Epochs, learning rate and so on.
        description: What the progress bar says.
        seed: Decides the order of the rows and dropout.
        dropout: Whether the model's own dropout is on.
        teacher: What `loss` compares the model with; a run with another one is not resumed.
        checkpoints: Folder for checkpoints, which names the run for a tracker too. The newest in it is resumed. It
            is for the caller to delete, once the model is saved.
        log_with: A tracker that Accelerate knows, such as `tensorboard`.

    Raises:
        UserError: For a model made under `torch.inference_mode()`, a seed out of range, fewer rows than processes, no
            parameter to train, a batch that the processes cannot share out, a loss or gradient that is not finite,
            checkpoints of another run or in no folder, or a tracker that is unknown or not installed.
        NotWritten: For a checkpoint that cannot be written.
    """
    refuse_inference(model)
    check_tokenized(rows)
    rows = rows.with_format(None)
    check_seed(seed)
    checkpoints = Path(checkpoints) if checkpoints is not None else None
    run_name = f"{checkpoints.resolve().parent.stem}-{checkpoints.stem}" if checkpoints else description
    accelerator = make_accelerator(log_with, run_name)
    batch_size = shared_batch_size(settings.batch_size, len(rows), accelerator.num_processes)
    model.float()
    model.zero_grad()  # of whatever was done with it before
    set_seed(seed, device_specific=True)
    sampler = EpochSampler(list(rows["length"]), batch_size, seed)
    batches = BatchSampler(sampler, batch_size, drop_last=True)
    n_steps = settings.epochs * -(-len(batches) // settings.gradient_accumulation)
    optimizer, schedule = optimizer_of(model, settings, n_steps)
    with own_forward(model), undivided(model), onednn_on(accelerator.device):
        wrapped, optimizer, schedule, loader = accelerator.prepare(
            model, optimizer, schedule, loader_of(rows, tokenizer, batches)
        )
        wrapped.train(dropout)
        fingerprint = fingerprint_of(settings, seed, rows, model, teacher) if checkpoints else {}
        done = resume(accelerator, checkpoints, fingerprint)
        steps = steps_from(loader, done, n_steps, settings.gradient_accumulation)
        with (
            tracked(accelerator, run_name, asdict(settings)),
            progress_bar(description, n_steps, done=done) as advance,
        ):
            for step, parts in enumerate(steps, done + 1):
                figures = add_gradients(accelerator, wrapped, loss, parts)
                clip(accelerator, wrapped, settings.max_grad_norm, step)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                advance(log_step(accelerator, figures, step))
                if checkpoints and step % settings.checkpoint_every == 0 and step < n_steps:
                    save_checkpoint(accelerator, checkpoints, step, fingerprint)
    accelerator.free_memory()
    model.to("cpu").eval()  # type: ignore[arg-type]


def add_gradients(
    accelerator: Accelerator, model: nn.Module, loss: Loss, batches: list[Batch]
) -> list[dict[str, Tensor]]:
    """Adds the gradients of the mean loss over a step's batches; gives the figures of each."""
    found = []
    for number, batch in enumerate(batches, 1):
        with nullcontext() if number == len(batches) else accelerator.no_sync(model):  # else processes wait
            value, figures = loss(model, batch)
            accelerator.backward(value / len(batches))
        found.append({name: figure.detach() for name, figure in figures.items()})
    return found


def parameter_groups(model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
    """The parameters to train, each with its learning rate: that of leaves is `1 / sqrt(n_leaves)` of the rest's.

    A leaf sees one token in `n_leaves`, so its gradient is noisier by the root of that; Adam makes steps of
    the same length out of signal and of noise, and the noise would undo what the closed form fitted.
    """
    rates = {
        parameter: learning_rate * fff.shape.n_leaves**-0.5
        for fff in fffs_of(model)
        for name, parameter in fff.named_parameters(recurse=False)
        if name.startswith("leaf_")
    }
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(rates.get(parameter, learning_rate), []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def clip(accelerator: Accelerator, model: nn.Module, max_norm: float, step: int) -> None:
    """Clips the gradients of a step; refuses those that are not finite, before they reach the weights."""
    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
    # a scaler skips such a step by itself
    if norm is not None and accelerator.scaler is None and not torch.isfinite(norm):
        raise diverged(step)


def diverged(step: int) -> UserError:
    """What says that training cannot go on."""
    return UserError(
        f"the loss or its gradient is not finite at step {step}: training diverged; lower the learning_rate"
    )


def log_step(accelerator: Accelerator, parts: list[dict[str, Tensor]], step: int) -> str:
    """Logs the means of figures over a step's batches, and gives them as text; refuses a loss that is not finite."""
    means = torch.stack([torch.stack([part[name] for part in parts]).mean() for name in parts[0]])
    values: dict[str, Any] = dict(zip(parts[0], accelerator.reduce(means, "mean").tolist(), strict=True))
    if not all(abs(value) < float("inf") for value in values.values()):
        raise diverged(step)
    accelerator.log(values, step=step)
    return "  ".join(f"{name} {value:.3f}" for name, value in values.items())
