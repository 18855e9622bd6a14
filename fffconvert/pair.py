"""Whether two models fit each other: a student and its teacher, a converted model and its original."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fffconvert.errors import UserError
from fffconvert.families import PREFIX, family_of
from fffconvert.heads import class_name, labels_of, reordered
from fffconvert.modeling import dense_class_of

PROBE = "Is THIS naïve text read the same way, 1 or 2 times?"  # of which two tokenizers make the same tokens, or not


def check_pair(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raises a `UserError` for a student and a teacher whose outputs cannot be compared."""
    our_type, their_type = (model.config.model_type.removeprefix(PREFIX) for model in (student, teacher))
    if our_type != their_type:
        raise UserError(
            f"the student was made of a model of type {our_type} and the teacher's is {their_type}; expected the same"
        )
    names = ("num_hidden_layers", "hidden_size", "num_labels", "vocab_size", "max_position_embeddings")
    refuse_different(names, student.config, teacher.config, "the student", "the teacher")
    our_labels, their_labels = (labels_of(model.config) for model in (student, teacher))
    if reordered(our_labels, their_labels):
        raise UserError(
            f"the student orders its labels {', '.join(our_labels)} and the teacher {', '.join(their_labels)}; "
            "expected one order"
        )
    ours, theirs = (class_name(model).partition("For")[2] for model in (student, teacher))
    if ours not in ("", theirs):  # a student without a head is taught hidden states alone
        raise UserError(f"the student is made For{ours} and the teacher is not; expected the same head")


def check_original(model: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Raises a `UserError` for a dense model that cannot be the converted one's original."""
    family = family_of(model.config)
    if dense.config.model_type != family.model_type:
        raise UserError(
            f"the dense model is of type {dense.config.model_type!r}; expected {family.model_type!r}"
        )
    names = ("hidden_size", family.n_neurons, "num_hidden_layers", "vocab_size")
    refuse_different(names, model.config, dense.config, "the converted model", "the dense one")
    expected = dense_class_of(type(model))
    if type(dense) is not expected:
        raise UserError(f"the dense model is a {type(dense).__name__}; expected a {expected.__name__}")


def refuse_different(
    names: Iterable[str], ours: PreTrainedConfig, theirs: PreTrainedConfig, we: str, they: str
) -> None:
    """Raises a `UserError` where two configurations differ in one of these; a configuration may lack some."""
    for name in names:
        mine, other = getattr(ours, name, None), getattr(theirs, name, None)
        if mine != other:
            raise UserError(f"{name} is {mine} in {we} and {other} in {they}; expected the same")


def check_same_tokenizer(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> None:
    """Raises a `UserError` for a student and a teacher that read a text as different tokens."""
    if ours.get_vocab() != theirs.get_vocab() or ours(PROBE)["input_ids"] != theirs(PROBE)["input_ids"]:
        raise UserError(
            "the student's tokenizer reads a text as other tokens than the teacher's; expected one tokenizer for both"
        )
