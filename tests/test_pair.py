"""Which models fit each other."""

from __future__ import annotations

import pytest
import torch
from conftest import converted, tiny_model
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from fffconvert.errors import UserError
from fffconvert.pair import check_pair


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 3},
        {"hidden_size": 32},
        {"num_labels": 5},
        {"vocab_size": 80},
        {"max_position_embeddings": 32},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_teacher_of_another_shape_is_refused(changes: dict[str, int]) -> None:
    ((name, value),) = changes.items()
    ours = {"num_hidden_layers": 2, "hidden_size": 16, "num_labels": 2}.get(name, 64)
    with pytest.raises(UserError, match=f"{name} is {ours} in the student and {value} in the teacher"):
        check_pair(tiny_model("bert"), tiny_model("bert", **changes))


def test_a_teacher_of_another_type_is_refused() -> None:
    with pytest.raises(
        UserError, match="made of a model of type bert and the teacher's is electra; expected"
    ):
        check_pair(tiny_model("bert"), tiny_model("electra"))


def test_a_teacher_with_its_labels_in_another_order_is_refused() -> None:
    ours, theirs = (
        tiny_model("bert", id2label=dict(enumerate(names))) for names in (["no", "yes"], ["yes", "no"])
    )
    with pytest.raises(
        UserError, match="orders its labels no, yes and the teacher yes, no; expected one order"
    ):
        check_pair(ours, theirs)


def test_teacher_of_another_head_is_refused() -> None:
    with pytest.raises(UserError, match="expected the same head"):
        check_pair(tiny_model("bert"), tiny_model("bert", "AutoModelForTokenClassification"))


def test_a_student_without_a_head_may_learn_from_a_teacher_with_one_but_not_the_other_way() -> None:
    check_pair(tiny_model("bert", "AutoModel"), tiny_model("bert"))
    with pytest.raises(UserError, match="made ForSequenceClassification and the teacher is not"):
        check_pair(tiny_model("bert"), tiny_model("bert", "AutoModel"))


def test_a_class_of_ones_own_teaches(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    class Mine(BertForSequenceClassification):
        pass

    teacher = Mine(classifier.config).eval()
    student = converted(classifier, tokenizer)
    check_pair(student, teacher)
    check_pair(student, torch.compile(classifier))
