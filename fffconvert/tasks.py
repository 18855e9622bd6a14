"""What is asked of a model: a task is columns of text, labels and metrics, of GLUE or of one's own data.

GLUE's tasks and metrics are those of Wang et al. (arXiv 1804.07461).
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedConfig, PreTrainedModel

from fffconvert.display import say
from fffconvert.errors import UserError

Kind = Literal[
    "classification", "multi-label", "regression", "tokens", "question", "masked", "embedding", "similarity"
]
"""What a head answers: one class, several, a number, a tag per word, a span, a masked word, nothing, or how alike
two texts are by their embeddings."""

HEADS: dict[str, Kind] = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "tokens",
    "ForQuestionAnswering": "question",
    "ForMaskedLM": "masked",
}
"""Kind by the end of a model class's name; any other is an encoder."""

HEAD_OF: dict[Kind, str] = {
    "multi-label": "ForSequenceClassification",
    "regression": "ForSequenceClassification",
    **{kind: ending for ending, kind in HEADS.items()},
}
"""The end of a model class's name by kind."""

TOKEN_LOGITS = ("start_logits", "end_logits")
"""Outputs with one number for each token, `(n_texts, n_tokens)`."""

AGREEMENT = ("agreement",)
METRICS: dict[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1"),
    "multi-label": ("micro_f1", "accuracy"),
    "regression": ("pearson", "spearman"),
    "tokens": ("accuracy", "macro_f1"),
    "question": ("span_f1", "exact_match"),
    "masked": ("accuracy", "loss", "perplexity"),
    "embedding": ("cosine", "neighbour_agreement"),
    "similarity": ("spearman", "pearson"),
}
"""What own data is judged by; the first is the score. Tags with B- and I- are judged by `entity_f1` first."""


@dataclass(frozen=True)
class Task:
    """What is asked of a model.

    Attributes:
        name: A GLUE task's name on the Hub, or that of one's own data.
        columns: The one or two columns that hold the text. For `tokens` a list of words, or text; for
            `question` the question and its context.
        labels: Names of the classes in the order of their codes; empty where there are no classes.
        metrics: What it is judged by; the first is the score.
        validations: Its validation splits; the first is the one that counts.
        kind: What the model's head answers.
        label: The column that holds the labels; none for text alone, where the teacher is the judge.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    validations: tuple[str, ...] = ("validation",)
    kind: Kind = "classification"
    label: str | None = "label"

    @property
    def is_regression(self) -> bool:
        """Whether the task asks for a number instead of a class."""
        return self.kind in ("regression", "similarity")

    @property
    def n_outputs(self) -> int:
        """Numbers that a head for this task gives, for each row or each token."""
        return len(self.labels) or (2 if self.kind == "question" else 1)

    @property
    def is_labelled(self) -> bool:
        """Whether there is a truth to compare with; a masked word is its own."""
        return self.label is not None or self.kind == "masked"


_ENTAILMENT = ("entailment", "not_entailment")
_PARAPHRASE = ("accuracy", "f1")

TASKS = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
        Task("sst2", ("sentence",), ("negative", "positive")),
        Task("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), _PARAPHRASE),
        Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), _PARAPHRASE),
        Task("stsb", ("sentence1", "sentence2"), (), ("pearson", "spearman"), kind="regression"),
        Task(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            validations=("validation_matched", "validation_mismatched"),
        ),
        Task("qnli", ("question", "sentence"), _ENTAILMENT),
        Task("rte", ("sentence1", "sentence2"), _ENTAILMENT),
        Task("wnli", ("sentence1", "sentence2"), ("not_entailment", "entailment")),
    )
}


def task_named(name: str) -> Task:
    """The task of that name.

    Raises:
        UserError: For a name that is not a GLUE task's.
    """
    if name not in TASKS:
        raise UserError(f"task {name!r} is unknown; expected one of {', '.join(TASKS)}")
    return TASKS[name]


def kind_of(config: PreTrainedConfig) -> Kind:
    """What the head of a saved model answers.

    Raises:
        UserError: For a configuration that no model was saved with.
    """
    if not config.architectures:
        raise UserError(
            "the configuration names no architecture, so the model's head is not known; expected the model itself, or "
            "the configuration of one that was saved"
        )
    head = config.architectures[0]
    kind: Kind = next((kind for ending, kind in HEADS.items() if head.endswith(ending)), "embedding")
    if kind == "classification" and config.problem_type == "multi_label_classification":
        return "multi-label"
    return "regression" if kind == "classification" and config.num_labels == 1 else kind


def as_saved(model: PreTrainedModel | PreTrainedConfig) -> PreTrainedConfig:
    """A model's configuration with the name of its class, which `transformers` writes there when it saves the model.

    One that is given stays as it is.
    """
    if isinstance(model, PreTrainedConfig):
        return model
    config = copy(model.config)
    config.architectures = [class_name(model)]
    return config


def class_name(model: PreTrainedModel) -> str:
    """The name of a model's class, compiled or not; of a class of your own, of the one that it is derived from."""
    cls = type(getattr(model, "_orig_mod", model))
    known = (each for each in cls.__mro__ if each.__module__.startswith(("transformers", "fffconvert.")))
    return next(known, cls).__name__


def labels_of(config: PreTrainedConfig) -> tuple[str, ...]:
    """The names of a saved model's outputs, in order."""
    return tuple(str(name) for _, name in sorted((config.id2label or {}).items()))


def names_labels(config: PreTrainedConfig) -> bool:
    """Whether a saved model's outputs have names of their own, and not those that `transformers` numbers."""
    return not any(label.startswith("LABEL_") for label in labels_of(config))


def reordered(ours: tuple[str, ...], theirs: tuple[str, ...]) -> bool:
    """Whether two lists hold the same labels in another order, whatever their case."""
    a, b = ([label.lower() for label in labels] for labels in (ours, theirs))
    return a != b and sorted(a) == sorted(b)


def as_asked_of(config: PreTrainedConfig, task: Task) -> Task:
    """The task itself; for an encoder without a head one of pairs and numbers, as STS-B is, by its embeddings."""
    if kind_of(config) == "embedding" and task.kind == "regression" and len(task.columns) == 2:
        return replace(task, kind="similarity", metrics=METRICS["similarity"])
    return task


def check_judgeable(config: PreTrainedConfig, name: str) -> None:
    """Refuses a model whose head no data can judge.

    Raises:
        UserError: For one whose head is neither in `HEADS` nor none.
    """
    heads = config.architectures or []
    if any("For" in head and not head.endswith(tuple(HEADS)) for head in heads):
        raise UserError(
            f"{name} is {', '.join(heads)}, which cannot be judged; expected an encoder without a head, "
            f"or one of {', '.join(HEADS)}"
        )


def check_head(task: Task, config: PreTrainedConfig, name: str) -> None:
    """Refuses a model whose head does not fit a GLUE task.

    Raises:
        UserError: For a model that is no sequence classifier, or has another number of outputs; for pairs judged by
            the cosine of their embeddings, a model with a head.
    """
    heads = config.architectures or ["no head"]
    if task.kind == "similarity":
        if kind_of(config) != "embedding":
            raise UserError(
                f"{name} is {', '.join(heads)}; expected an encoder without a head, as the model is"
            )
        check_judgeable(config, name)
        return
    if not any(head.endswith("ForSequenceClassification") for head in heads):
        raise UserError(
            f"{name} is {', '.join(heads)}; task {task.name} expects a ...ForSequenceClassification. "
            f"Fine-tune one first: fffconvert finetune {name} OUTPUT --task {task.name}"
        )
    ours = tuple(label.lower() for label in labels_of(config))
    if reordered(ours, task.labels):
        raise UserError(
            f"{name} orders its labels {', '.join(ours)}; task {task.name} expects {', '.join(task.labels)}. "
            "As --data the same rows go by the names of their labels"
        )
    if config.num_labels != task.n_outputs:
        raise UserError(
            f"{name} has {config.num_labels} outputs; task {task.name} expects {task.n_outputs}. "
            f"Is it fine-tuned for another task?"
        )
    if task.labels and ours != task.labels and names_labels(config):
        say(
            f"The outputs of {name}, {', '.join(ours)}, are taken for {', '.join(task.labels)}, in that order"
        )
