"""Accelerate as this package uses it, and the processes that it finds itself in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState, is_initialized
from accelerate.tracking import filter_trackers
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    parse_flag_from_env,
)

from fffconvert.errors import UserError

LOGS = "runs"  # of trackers that write files, as TensorBoard looks for them


def make_accelerator(log_with: str | None = None, run_name: str = "") -> Accelerator:
    """An Accelerator as this package uses it: a batch is shared out over the processes.

    Mixed precision is what this process has used Accelerate with before, or what `accelerate launch` or
    `accelerate config` says; without a word from them it is bfloat16 on a GPU that has it, and off elsewhere.

    Raises:
        UserError: For a tracker that Accelerate does not know, or that is not installed.
    """
    if log_with:
        check_tracker(log_with)
    gpu = process_state().device.type == "cuda"
    bfloat16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "bf16" if bfloat16 else "no")
    return Accelerator(
        # whatever the environment says: `train` accumulates by itself
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        mixed_precision=None if is_initialized() else precision,  # a process has one at a time
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        log_with=log_with,
        project_config=ProjectConfiguration(logging_dir=f"{LOGS}/{run_name}"),
    )


@contextmanager
def own_accelerate() -> Iterator[None]:
    """Leaves Accelerate as the caller has it: each Accelerator sets gradient accumulation and precision for all."""
    gradients, used = GradientState(), is_initialized()
    accumulation, at_end_of_step = gradients.plugin_kwargs, gradients.sync_gradients
    gradients.sync_gradients = True  # else no optimizer moves
    try:
        yield
    finally:
        gradients.plugin_kwargs, gradients.sync_gradients = accumulation, at_end_of_step
        if not used:
            AcceleratorState._reset_state()


@contextmanager
def tracked(accelerator: Accelerator, run_name: str, config: dict[str, Any]) -> Iterator[None]:
    """Opens the accelerator's trackers, where it has any, for a run with these settings, and closes them."""
    accelerator.init_trackers("fffconvert", config=config, init_kwargs={"wandb": {"name": run_name}})
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()  # `end_training` would part the processes too, which have more to do


def process_state() -> PartialState:
    """What this process is among those of `accelerate launch`, as an `Accelerator` finds it first."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def wait_for_everyone() -> None:
    """Waits until every process of `accelerate launch` has come this far."""
    process_state().wait_for_everyone()


def check_tracker(name: str) -> None:
    """Raises a `UserError` for a tracker that Accelerate does not know, or that is not installed."""
    process_state()  # Accelerate's log asks for it
    try:
        found = filter_trackers(name, logging_dir=".")
    except ValueError as error:
        raise UserError(f"tracker {name!r} is unknown to Accelerate ({error})") from error
    if not found:
        raise UserError(f"tracker {name!r} is not installed; install its package or leave it out")
