"""Sizes, memory and time of a conversion, from a model's configuration and how much there is to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from fffconvert.configuration import dense_neurons, refuse_converted
from fffconvert.dense import DenseFFN
from fffconvert.families import family_of, longest_text, random_ids, read_ffns, uses_of_ffn
from fffconvert.fit import fit_layer
from fffconvert.modeling import config_class, config_with, model_class
from fffconvert.onednn import onednn_on
from fffconvert.recipe import Init
from fffconvert.sensitivity import SENSITIVITY_TOKENS
from fffconvert.tree import TreeShape

SAMPLES = (2048, 8192)  # tokens that one layer is fitted on, to tell what each token adds
COPIES_WHILE_FITTING = 15  # of a layer's inputs, those that wait in half-read texts among them
FLOAT32 = 4  # bytes
BATCH, LENGTH = 4, 64  # of the texts that the models are timed on


@dataclass(frozen=True)
class Workload:
    """How much there is to do.

    Attributes:
        calibration_tokens: Tokens that the trees are grown on.
        finetune_tokens: Tokens that the teacher is trained on, over all epochs.
        distill_tokens: Tokens that each student is trained on, over all epochs.
        controls: Shape and init of the students that are made beside the converted model.
    """

    calibration_tokens: int
    finetune_tokens: int = 0
    distill_tokens: int = 0
    controls: Sequence[tuple[TreeShape, Init]] = ()


@dataclass(frozen=True)
class Estimate:
    """What would come of a conversion.

    Attributes:
        n_layers: Layers whose FFNs are replaced.
        active_neurons: Neurons that one token uses in a layer.
        dense_neurons: Neurons that it uses in the dense FFN.
        share: `active_neurons / dense_neurons`.
        parameters_before: Numbers that the dense model stores; those that are shared count once.
        parameters_after: The converted one, routers included.
        bytes_before: Size of the dense model's weights.
        bytes_after: Size of the converted one's, which is in float32 where it is trained.
        memory_bytes: The most that is held at a time: both models, in float32 too where they are stored in half
            precision, as on a CPU, and the copies of a layer's calibration inputs (float32) that fitting it takes
            or, where a student is trained, its gradients and AdamW's two moments. Inputs of FFNs that layers share
            are held together. Activations come on top; they grow with the batch.
        seconds: By stage: tokens times the time of a token, measured here and now on models of this size
            with random weights; of a layer's fit a line through two short ones. Loading and evaluation
            come on top.
    """

    n_layers: int
    active_neurons: float
    dense_neurons: int
    share: float
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    memory_bytes: int
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `--json` holds them."""
        return asdict(self)


@torch.random.fork_rng(devices=[])
def estimate(
    dense_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    tree: TreeShape,
    init: Init,
    workload: Workload,
) -> Estimate:
    """Sizes from the configuration alone; times by measuring for some seconds.

    Args:
        dense_class: The class of the dense model, head included.
        config: Its configuration.
        tree: The shape of every layer.
        init: What would be clustered.
        workload: How much there is to do.

    Raises:
        UserError: For a model that cannot be converted, or a shape that it cannot fill.
    """
    refuse_converted(config)
    family = family_of(config)
    torch.manual_seed(0)
    dense = dense_class(config).eval()
    ffns = read_ffns(dense, family)
    tree = family.shape_for(config, tree)
    converted = config_with(config, config_class(family), fff=tree.to_dict())
    student = model_class(dense_class)(converted).eval()  # type: ignore[arg-type]
    trained = workload.distill_tokens > 0
    itemsize = (getattr(config, "dtype", None) or torch.float32).itemsize
    before, after = count_parameters(dense), count_parameters(student)
    models = (before + after) * FLOAT32
    if itemsize < FLOAT32 and not trained:
        models += (before + after) * itemsize  # the original, and what it is converted to
    n_uses = uses_of_ffn(config)  # it is fitted on all of them
    inputs = n_uses * workload.calibration_tokens * ffns[0].d_model * FLOAT32  # of one FFN
    shared_inputs = len(ffns) * inputs if n_uses > 1 else 0
    optimizer = 3 * after * FLOAT32 if trained else 0
    return Estimate(
        n_layers=len(ffns),
        active_neurons=tree.active_neurons,
        dense_neurons=dense_neurons(config),
        share=tree.active_neurons / dense_neurons(config),
        parameters_before=before,
        parameters_after=after,
        bytes_before=before * itemsize,
        bytes_after=after * (FLOAT32 if trained else itemsize),
        memory_bytes=models + shared_inputs + max(COPIES_WHILE_FITTING * inputs, optimizer),
        seconds=times(
            dense, student, ffns[0], [(tree, init), *workload.controls], workload, n_uses * len(ffns)
        ),
    )


def count_parameters(model: PreTrainedModel) -> int:
    """Numbers that `model.safetensors` would hold: parameters that are shared count once."""
    names = dict(model.named_parameters(remove_duplicate=False))
    buffers = [tensor for name, tensor in model.state_dict().items() if name not in names]
    return sum(tensor.numel() for tensor in [*model.parameters(), *buffers])


def times(
    dense: PreTrainedModel,
    student: PreTrainedModel,
    ffn: DenseFFN,
    made: Sequence[tuple[TreeShape, Init]],
    workload: Workload,
    n_fits: int,
) -> dict[str, float]:
    """Seconds by stage (see `Estimate`) for the students in `made`, each timed as `student`, with `n_fits` fits."""
    ids = random_ids(dense, BATCH, min(LENGTH, longest_text(dense.config)))
    n_tokens = ids.numel()

    def step(model: PreTrainedModel) -> None:
        with onednn_on(model.device):
            output = model(input_ids=ids, output_hidden_states=True, return_dict=True)
        output.hidden_states[-1].square().mean().backward()
        model.zero_grad()

    def forward(model: PreTrainedModel) -> None:
        with torch.no_grad(), onednn_on(model.device):
            model(input_ids=ids)

    dense_forward = seconds_of(partial(forward, dense)) / n_tokens
    dense_step = seconds_of(partial(step, dense)) / n_tokens
    fits = sum(seconds_to_fit(ffn, shape, init, workload.calibration_tokens) for shape, init in made)
    student_forward = seconds_of(partial(forward, student)) / n_tokens
    n_read = workload.calibration_tokens * len(made)
    linear = any(shape.linear for shape, _ in made)
    n_differentiated = min(workload.calibration_tokens, SENSITIVITY_TOKENS) if linear else 0
    found = {
        "calibration": dense_forward * n_read + dense_step * n_differentiated,
        "trees": fits * n_fits + student_forward * n_read,
    }
    if workload.finetune_tokens:
        found["fine-tuning"] = dense_step * workload.finetune_tokens
    if workload.distill_tokens:
        distillation_step = dense_forward + seconds_of(partial(step, student)) / n_tokens
        found["distillation"] = distillation_step * workload.distill_tokens * len(made)
    return found


def seconds_to_fit(ffn: DenseFFN, tree: TreeShape, init: Init, n_tokens: int) -> float:
    """Seconds to fit a layer on so many tokens: what a fit takes in itself, and what each token adds."""

    def fit(n: int) -> None:
        fit_layer(ffn, torch.randn(n, ffn.d_model), tree, init, 0)

    few, many = (seconds_of(partial(fit, n), again=False) for n in SAMPLES)
    per_token = max(0.0, many - few) / (SAMPLES[1] - SAMPLES[0])
    return max(0.0, few - per_token * SAMPLES[0]) + per_token * n_tokens


def seconds_of(action: Callable[[], object], again: bool = True) -> float:
    """How long something takes: once, or where it can be done `again` the better of two after a first."""
    if again:
        action()
    measured = []
    for _ in range(2 if again else 1):
        start = time.perf_counter()
        action()
        measured.append(time.perf_counter() - start)
    return min(measured)
