"""What the head of a model answers, by the name of its class."""

from __future__ import annotations

from copy import copy
from typing import Literal

from transformers import PreTrainedConfig, PreTrainedModel

from fffconvert.errors import UserError

Kind = Literal[
    "classification", "multi-label", "regression", "tokens", "question", "masked", "embedding", "similarity"
]
"""What a head answers: one class, several, a number, a tag per word, a span, a masked word, nothing, or how alike
two texts are by their embeddings."""

KIND_BY_HEAD: dict[str, Kind] = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "tokens",
    "ForQuestionAnswering": "question",
    "ForMaskedLM": "masked",
}
"""Kind by the end of a model class's name; any other is an encoder."""

HEAD_BY_KIND: dict[Kind, str] = {
    "multi-label": "ForSequenceClassification",
    "regression": "ForSequenceClassification",
    **{kind: ending for ending, kind in KIND_BY_HEAD.items()},
}
"""The end of a model class's name by kind."""

TOKEN_LOGITS = ("start_logits", "end_logits")
"""Outputs with one number for each token, `(n_texts, n_tokens)`."""


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
    kind: Kind = next((kind for ending, kind in KIND_BY_HEAD.items() if head.endswith(ending)), "embedding")
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
    numbered = {int(number): str(name) for number, name in (config.id2label or {}).items()}  # JSON has texts
    return tuple(name for _, name in sorted(numbered.items()))


def names_labels(config: PreTrainedConfig) -> bool:
    """Whether a saved model's outputs have names of their own, and not those that `transformers` numbers."""
    return not any(label.startswith("LABEL_") for label in labels_of(config))


def reordered(ours: tuple[str, ...], theirs: tuple[str, ...]) -> bool:
    """Whether two lists hold the same labels in another order, whatever their case."""
    a, b = ([label.lower() for label in labels] for labels in (ours, theirs))
    return a != b and sorted(a) == sorted(b)


def check_judgeable(config: PreTrainedConfig, name: str) -> None:
    """Refuses a model whose head no data can judge.

    Raises:
        UserError: For one whose head is neither in `KIND_BY_HEAD` nor none, or that gives several numbers.
    """
    heads = config.architectures or []
    of_sequence = any(head.endswith("ForSequenceClassification") for head in heads)
    if of_sequence and config.problem_type == "regression" and (config.num_labels or 1) > 1:
        raise UserError(f"{name} gives {config.num_labels} numbers, which cannot be judged; expected one")
    if any(("For" in head or "LMHead" in head) and not head.endswith(tuple(KIND_BY_HEAD)) for head in heads):
        raise UserError(
            f"{name} is {', '.join(heads)}, which cannot be judged; expected an encoder without a head, "
            f"or one of {', '.join(KIND_BY_HEAD)}"
        )
