"""What is asked of a model: a task is columns of text, labels and metrics, of GLUE or of one's own data.

GLUE's tasks and metrics are those of Wang et al. (arXiv 1804.07461).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from fffconvert.display import say
from fffconvert.errors import UserError
from fffconvert.heads import Kind, check_judgeable, kind_of, labels_of, names_labels, reordered

GLUE = "nyu-mll/glue"  # its id on the Hub
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
        prompt: What a sentence encoder has before every text.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    validations: tuple[str, ...] = ("validation",)
    kind: Kind = "classification"
    label: str | None = "label"
    prompt: str = ""

    @property
    def is_regression(self) -> bool:
        """Whether the task asks for a number instead of a class."""
        return self.kind in ("regression", "similarity")

    @property
    def is_per_token(self) -> bool:
        """Whether an answer has a part for each token that counts, not one for the row."""
        return self.kind in ("tokens", "masked")

    @property
    def is_embedded(self) -> bool:
        """Whether embeddings are judged: of each text by itself, whatever stands beside it in a row."""
        return self.kind in ("embedding", "similarity")

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


def task_for(config: PreTrainedConfig, task: Task) -> Task:
    """The task itself; for an encoder without a head one of pairs and numbers, as STS-B is, by its embeddings."""
    if kind_of(config) == "embedding" and task.kind == "regression" and len(task.columns) == 2:
        return replace(task, kind="similarity", metrics=METRICS["similarity"])
    return task


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
            f"Fine-tune the dense model first: fffconvert finetune MODEL OUTPUT --task {task.name}"
        )
    check_judgeable(config, name)
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
