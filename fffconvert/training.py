"""One training loop on Accelerate, for a teacher as for a student.

The batches of an epoch follow from the seed and the epoch's number alone, dropout's draws are saved with
every checkpoint, and a checkpoint appears under its name only when it is whole. So a killed run that
is resumed ends with the same weights as one that was not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState, skip_first_batches
from accelerate.state import is_initialized
from accelerate.tracking import filter_trackers
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    parse_flag_from_env,
    set_seed,
)
from datasets import Dataset, List
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import BatchSampler, DataLoader, Sampler
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_scheduler,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from fffconvert.batch import Batch
from fffconvert.display import progress_bar, say
from fffconvert.errors import NotWritten, UserError, first_line
from fffconvert.fff import FFF
from fffconvert.projection import onednn_on
from fffconvert.recipe import Training

SETTINGS = "settings.json"  # in the folder of a run's checkpoints
LOGS = "runs"  # of trackers that write files, as TensorBoard looks for them

Loss = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]
"""From a model and a batch to the loss and the figures to log."""


class EpochSampler(Sampler[int]):
    """Rows in batches of similar lengths, which come in a random order; the epoch and the seed decide it.

    `LengthGroupedSampler` alone goes from long rows to short ones, again and again, and ends on short ones: the
    optimizer follows, at the cost of what is learned (`benchmarks/README.md` has the figures).
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch; Accelerate calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        rows = list(LengthGroupedSampler(self.batch_size, lengths=self.lengths, generator=generator))
        whole, size = len(rows) // self.batch_size, self.batch_size
        for batch in torch.randperm(whole, generator=generator).tolist():
            yield from rows[batch * size : (batch + 1) * size]
        yield from rows[whole * size :]

    def __len__(self) -> int:
        return len(self.lengths)


def make_accelerator(
    gradient_accumulation: int = 1, log_with: str | None = None, run_name: str = ""
) -> Accelerator:
    """An Accelerator as this package uses it: a batch is shared out over the processes.

    Mixed precision is what this process has used Accelerate with before, or what `accelerate launch` or
    `accelerate config` says; without a word from them it is bfloat16 on a GPU that has it, and off elsewhere.

    Raises:
        UserError: For a tracker that Accelerate does not know, or that is not installed.
    """
    if log_with:
        check_tracker(log_with)
    bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "bf16" if bfloat16 else "no")
    return Accelerator(
        gradient_accumulation_steps=gradient_accumulation,
        mixed_precision=None if is_initialized() else asked,  # a process has one for good
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        log_with=log_with,
        project_config=ProjectConfiguration(logging_dir=f"{LOGS}/{run_name}"),
    )


def process_state() -> PartialState:
    """What this process is among those of `accelerate launch`, as an `Accelerator` finds it first."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def check_tracker(name: str) -> None:
    """Raises a `UserError` for a tracker that Accelerate does not know, or that is not installed."""
    process_state()  # Accelerate's log asks for it
    try:
        found = filter_trackers(name, logging_dir=".")
    except ValueError as error:
        raise UserError(f"tracker {name!r} is unknown to Accelerate ({error})") from error
    if not found:
        raise UserError(f"tracker {name!r} is not installed; install its package or leave it out")


def loader_of(rows: Dataset, tokenizer: PreTrainedTokenizerBase, batches: BatchSampler) -> DataLoader[Batch]:
    """Padded batches of tokenized rows; labels of tokens, which are whole numbers in a list, are padded too."""
    labels = rows.features.get("labels")
    per_token = isinstance(labels, List) and "int" in labels.feature.dtype
    collate = DataCollatorForTokenClassification if per_token else DataCollatorWithPadding
    return DataLoader(
        rows.remove_columns("length"),
        batch_sampler=batches,
        collate_fn=collate(tokenizer),
        generator=torch.Generator(),  # its own, so that starting an epoch draws nothing from dropout's
    )


def optimizer_of(model: nn.Module, settings: Training, n_steps: int) -> tuple[Optimizer, LRScheduler]:
    """AdamW, and its rate over the steps: up to the peak, then linearly down to 0."""
    groups = parameter_groups(model, settings.learning_rate)
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)
    return optimizer, get_scheduler("linear", optimizer, int(settings.warmup * n_steps), n_steps)


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
    checkpoints: Path | None = None,
    log_with: str | None = None,
) -> None:
    """Trains a model in place, in float32: in half precision most of an update would round away.

    Afterwards it is on the CPU, its dropout off.

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
        UserError: For a batch that the processes cannot share out, a loss that is not finite, checkpoints of another
            run, or a tracker that is unknown or not installed.
        NotWritten: For a checkpoint that cannot be written.
    """
    run_name = f"{checkpoints.resolve().parent.stem}-{checkpoints.stem}" if checkpoints else description
    accelerator = make_accelerator(settings.gradient_accumulation, log_with, run_name)
    if settings.batch_size % accelerator.num_processes:
        raise UserError(
            f"batch_size is {settings.batch_size}; expected a multiple of the {accelerator.num_processes} processes"
        )
    model.float()
    set_seed(seed, device_specific=True)
    sampler = EpochSampler(list(rows["length"]), settings.batch_size, seed)
    batches = BatchSampler(sampler, settings.batch_size, drop_last=len(rows) >= settings.batch_size)
    together = settings.gradient_accumulation
    steps_per_epoch = -(-len(batches) // together)
    n_steps = settings.epochs * steps_per_epoch
    optimizer, schedule = optimizer_of(model, settings, n_steps)
    wrapped, optimizer, schedule, loader = accelerator.prepare(
        model, optimizer, schedule, loader_of(rows, tokenizer, batches)
    )
    wrapped.train(dropout)
    described = describe(settings, seed, rows, model, teacher) if checkpoints else {}
    step = resume(accelerator, checkpoints, described)
    if log_with:
        named = {"wandb": {"name": run_name}}
        accelerator.init_trackers("fffconvert", config=asdict(settings), init_kwargs=named)
    with onednn_on(accelerator.device), progress_bar(description, n_steps, done=step) as advance:
        while step < n_steps:
            epoch, done = divmod(step, steps_per_epoch)
            loader.set_epoch(epoch)
            for batch in skip_first_batches(loader, done * together):
                in_step = min(together, len(batches) - step % steps_per_epoch * together)
                with accelerator.accumulate(wrapped):
                    value, figures = loss(wrapped, batch)
                    accelerator.backward(value * (together / in_step))  # Accelerate divides by `together`
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(wrapped.parameters(), settings.max_grad_norm)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                if not accelerator.sync_gradients:
                    continue
                step += 1
                report(accelerator, figures, step, advance, logged=log_with is not None)
                if checkpoints and step % settings.checkpoint_every == 0 and step < n_steps:
                    save_checkpoint(accelerator, checkpoints, step, described)
    for tracker in accelerator.trackers:
        tracker.finish()  # `end_training` would part the processes too, which have more to do
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)  # else its forward stays in mixed precision
    accelerator.free_memory()
    model.to("cpu").eval()  # type: ignore[arg-type]


def parameter_groups(model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
    """The parameters to train, each with its learning rate: that of leaves is `1 / sqrt(n_leaves)` of the rest's.

    A leaf sees one token in `n_leaves`, so its gradient is noisier by the root of that; Adam makes steps of
    the same length out of signal and of noise, and the noise would undo what the closed form fitted.
    """
    rates = {
        parameter: learning_rate * module.shape.n_leaves**-0.5
        for module in model.modules()
        if isinstance(module, FFF)
        for name, parameter in module.named_parameters(recurse=False)
        if name.startswith("leaf_")
    }
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(rates.get(parameter, learning_rate), []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def describe(
    settings: Training, seed: int, rows: Dataset, model: nn.Module, teacher: nn.Module | None
) -> dict[str, Any]:
    """What tells a training run from others."""
    return {
        **asdict(settings),
        "seed": seed,
        "rows": len(rows),
        "data": digest_of_rows(rows),
        "model": digest_of_weights(model),
        "teacher": digest_of_weights(teacher) if teacher is not None else None,
    }


def digest_of_rows(rows: Dataset) -> str:
    """What tells tokenized rows from any others."""
    return digest_of(repr(batch).encode() for batch in rows.iter(1000))


def digest_of_weights(model: nn.Module) -> str:
    """What tells a model's weights from any others."""
    return digest_of(
        tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for tensor in model.state_dict().values()
    )


def digest_of(parts: Iterable[bytes]) -> str:
    """The digest of what comes in parts."""
    digest = sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def report(
    accelerator: Accelerator,
    figures: dict[str, Tensor],
    step: int,
    advance: Callable[[str], None],
    logged: bool,
) -> None:
    """Moves the progress bar on and logs; refuses to go on from a loss that is not finite."""
    values: dict[str, Any] = {name: float(figure.detach()) for name, figure in figures.items()}
    if not all(abs(value) < float("inf") for value in values.values()):
        raise UserError(f"the loss is not finite at step {step}: training diverged; lower the learning_rate")
    advance("  ".join(f"{name} {value:.3f}" for name, value in values.items()))
    if logged:
        accelerator.log(values, step=step)


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, settings: dict[str, Any]) -> None:
    """Writes `folder/step-N` beside its name first, then removes the older ones.

    What tells the run from others lies beside it, so that none of them resumes it.

    Raises:
        NotWritten: For a checkpoint that cannot be written, as to a full disk.
    """
    partial, whole = folder / "partial", folder / f"step-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_whole(folder / SETTINGS, json.dumps(settings, indent=2))
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not checkpoints_in(folder):
            forget(folder)
        raise NotWritten(
            f"{whole} could not be written ({first_line(error)}); the checkpoints before it are kept"
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        partial.rename(whole)
        for older in checkpoints_in(folder)[:-1]:
            shutil.rmtree(folder / f"step-{older}")


def forget(folder: Path) -> None:
    """Deletes a run's checkpoints, once what they led to is saved; anything else in the folder stays."""
    if not process_state().is_main_process:
        return
    for step in checkpoints_in(folder):
        shutil.rmtree(folder / f"step-{step}")
    shutil.rmtree(folder / "partial", ignore_errors=True)
    (folder / SETTINGS).unlink(missing_ok=True)
    with suppress(OSError):  # it is not there, or there is something else in it
        folder.rmdir()


def write_whole(file: Path, text: str) -> None:
    """Writes a file beside its name first: whoever is killed leaves the old one or the new one."""
    beside = file.with_name(f"{file.name}.writing")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)


def checkpoints_in(folder: Path) -> list[int]:
    """The steps of the whole checkpoints in a folder, oldest first."""
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def resume(accelerator: Accelerator, folder: Path | None, settings: dict[str, Any]) -> int:
    """Loads the newest checkpoint, if there is one; returns the step that it was taken at.

    Raises:
        UserError: For checkpoints of a run with other settings, another model or other data.
    """
    if folder is None or not checkpoints_in(folder):
        return 0
    theirs = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    if other := [name for name in settings if theirs.get(name) != settings[name]]:
        raise UserError(
            f"{folder} holds checkpoints of a run with another {' and '.join(other)}; delete it to start anew"
        )
    step = checkpoints_in(folder)[-1]
    say(f"Resuming from step {step}")
    accelerator.load_state(str(folder / f"step-{step}"))
    return step


def wait_for_everyone() -> None:
    """Waits until every process of `accelerate launch` has come this far."""
    process_state().wait_for_everyone()
