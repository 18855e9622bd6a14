"""How good a model is, beside its teacher and for how many neurons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from scipy.stats import pearsonr
from torch import Tensor
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.generic import ModelOutput

from fffconvert.calibration import evaluating
from fffconvert.display import progress_bar
from fffconvert.modeling import dense_neurons, is_converted, shape_of
from fffconvert.tasks import Task, compute_metrics, predictions
from fffconvert.training import batches_of, make_accelerator

BATCH_SIZE = 64

Outputs = dict[str, NDArray[Any]]
"""Per validation split, one row of numbers for each row of data."""


@dataclass(frozen=True)
class Scores:
    """One model's result, with the neurons that it took.

    Attributes:
        task: The task, or `text` for a sentence encoder judged on plain text.
        metric: The task's first metric; `cosine` for an encoder.
        score: Its value on the first validation split; for an encoder the mean cosine of its sentence
            embeddings to the teacher's.
        teacher_score: The teacher's; none without a teacher.
        retention: `score / teacher_score`. It flatters: a model without FFNs can have 97% (see the controls).
        agreement: Share of rows on which model and teacher predict the same class; for regression the
            Pearson correlation of their outputs; for an encoder the share of texts whose nearest neighbour
            is the same.
        active_neurons: Neurons that one token uses in each layer, routers included.
        dense_neurons: Neurons of one dense FFN.
        share: `active_neurons / dense_neurons`.
        metrics: Every metric on every validation split.
    """

    task: str
    metric: str
    score: float
    teacher_score: float | None
    retention: float | None
    agreement: float | None
    active_neurons: float
    dense_neurons: int
    share: float
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `--json` and `report.json` hold them."""
        return asdict(self)


def value_kept(student: float, removed: float, teacher: float) -> float | None:
    """The FFN's value that a student keeps: 0 for no FFN, 1 for the teacher; none where they are equal."""
    return (student - removed) / (teacher - removed) if teacher != removed else None


def active_neurons(config: PreTrainedConfig) -> float:
    """Neurons that one token uses in each layer of a converted or a dense model."""
    return shape_of(config).active_neurons if is_converted(config) else float(dense_neurons(config))


class Judge:
    """Scores any number of models beside one teacher, whose outputs are computed once.

    Args:
        tokenizer: The tokenizer of teacher and models.
        task: The task; none for sentence encoders, which are judged on text by their embeddings.
        validations: Tokenized rows by split; for an encoder one split.
        teacher: The model to compare with; a classifier can do without.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        task: Task | None,
        validations: dict[str, Dataset],
        teacher: PreTrainedModel | None,
    ) -> None:
        self.tokenizer, self.task, self.validations, self.teacher = tokenizer, task, validations, teacher

    @cached_property
    def theirs(self) -> Outputs | None:
        """What the teacher gives."""
        return self.outputs_of(self.teacher) if self.teacher is not None else None

    def outputs_of(self, model: PreTrainedModel) -> Outputs:
        """Logits `(n_rows, n_outputs)`, or for an encoder embeddings `(n_rows, d_model)`, of every split."""
        compute = embed if self.task is None else predict
        return {
            split: compute(model, self.tokenizer, rows, split) for split, rows in self.validations.items()
        }

    def __call__(self, model: PreTrainedModel) -> Scores:
        """Scores a model, dense or converted."""
        ours = self.outputs_of(model)
        if self.task is None:
            return score_encoder(model.config, ours, self.theirs or ours)
        labels = {split: np.asarray(rows["labels"]) for split, rows in self.validations.items()}
        return score_task(model.config, self.task, labels, ours, self.theirs)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | None,
    validations: dict[str, Dataset],
    teacher: PreTrainedModel | None = None,
) -> Scores:
    """Scores one model, beside its teacher where there is one.

    Under `accelerate launch` the rows are shared out over the processes, and none counts twice.

    Args:
        model: The model, converted or dense.
        tokenizer: Its tokenizer.
        task: The task; none for a sentence encoder, which is judged by its embeddings of text.
        validations: Tokenized rows for each validation split (see `fffconvert.tasks`).
        teacher: The model to compare with.
    """
    return Judge(tokenizer, task, validations, teacher)(model)


def score_task(
    config: PreTrainedConfig, task: Task, labels: Outputs, ours: Outputs, theirs: Outputs | None
) -> Scores:
    """Scores logits `(n_rows, n_outputs)` against labels `(n_rows,)` and beside the teacher's logits."""
    metrics = {split: compute_metrics(task, logits, labels[split]) for split, logits in ours.items()}
    first, metric = task.validations[0], task.metrics[0]
    teacher_score = agreed = None
    if theirs is not None:
        teacher_score = compute_metrics(task, theirs[first], labels[first])[metric]
        agreed = agreement(task, ours[first], theirs[first])
    return make_scores(config, task.name, metric, metrics[first][metric], teacher_score, agreed, metrics)


def score_encoder(config: PreTrainedConfig, ours: Outputs, theirs: Outputs) -> Scores:
    """Scores sentence embeddings `(n_texts, d_model)` by how close they are to the teacher's."""
    metrics = {
        split: {
            "cosine": float((embeddings * theirs[split]).sum(1).mean()),
            "neighbour_agreement": float((nearest(embeddings) == nearest(theirs[split])).mean()),
        }
        for split, embeddings in ours.items()
    }
    first = next(iter(metrics.values()))
    return make_scores(config, "text", "cosine", first["cosine"], 1.0, first["neighbour_agreement"], metrics)


def make_scores(
    config: PreTrainedConfig,
    task: str,
    metric: str,
    value: float,
    teacher_score: float | None,
    agreed: float | None,
    metrics: dict[str, dict[str, float]],
) -> Scores:
    """Adds to a result what the model's configuration says of its cost."""
    active, dense = active_neurons(config), dense_neurons(config)
    return Scores(
        task=task,
        metric=metric,
        score=value,
        teacher_score=teacher_score,
        retention=value / teacher_score if teacher_score else None,
        agreement=agreed,
        active_neurons=active,
        dense_neurons=dense,
        share=active / dense,
        metrics=metrics,
    )


def agreement(task: Task, ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """How often two models predict the same class, or how their regressed numbers correlate."""
    a, b = predictions(task, ours), predictions(task, theirs)
    if not task.is_regression:
        return float((a == b).mean())
    return float(pearsonr(a, b).statistic) if a.std() > 0 and b.std() > 0 else 0.0


def predict(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, split: str
) -> NDArray[np.float32]:
    """The logits of a model on every row, `(n_rows, n_outputs)`, in the rows' order."""
    return forward_all(model, tokenizer, rows, f"Evaluating on {split}", lambda output, _: output["logits"])


def embed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, split: str
) -> NDArray[np.float32]:
    """Sentence embeddings `(n_rows, d_model)`: the mean of the last hidden states, at unit length."""

    def pool(output: ModelOutput, real: Tensor) -> Tensor:
        mean = (output["last_hidden_state"] * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean.float(), dim=-1)

    return forward_all(model, tokenizer, rows, f"Embedding {split}", pool)


def forward_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    description: str,
    pick: Callable[[ModelOutput, Tensor], Tensor],
) -> NDArray[np.float32]:
    """Runs a model over all rows and stacks what `pick` takes from each output and its attention mask."""
    accelerator = make_accelerator()
    size = BATCH_SIZE - BATCH_SIZE % accelerator.num_processes
    by_length = np.argsort(rows["length"], kind="stable")[::-1]  # little padding, and the longest batch first
    unlabelled = [name for name in rows.column_names if name != "labels"]
    sampler = BatchSampler(SequentialSampler(rows), size, drop_last=False)
    loader = accelerator.prepare_data_loader(
        batches_of(rows.select(by_length).select_columns(unlabelled), tokenizer, sampler)
    )
    model.to(accelerator.device)
    parts = []
    with evaluating(model), torch.no_grad(), progress_bar(description, len(loader)) as advance:
        for batch in loader:
            picked = pick(model(**batch), batch["attention_mask"])
            parts.append(accelerator.gather_for_metrics(picked).float().cpu().numpy())
            advance("")
    model.to("cpu")  # type: ignore[arg-type]
    return np.concatenate(parts)[np.argsort(by_length)]


def nearest(embeddings: NDArray[np.float32]) -> NDArray[np.intp]:
    """For each row the number of the row closest to it, `(n_texts,)`."""
    similarity = embeddings @ embeddings.T
    np.fill_diagonal(similarity, -np.inf)
    return similarity.argmax(1)
