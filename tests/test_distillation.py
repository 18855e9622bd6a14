"""That a student comes closer to its teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import converted, sentences, tiny_model, tokenized_texts
from torch import Tensor
from transformers import BertForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from fffconvert import distillation
from fffconvert.conversion import convert
from fffconvert.distillation import comparing, distill
from fffconvert.errors import UserError
from fffconvert.families import FAMILIES, ffn_starts_of
from fffconvert.loss import relative_error
from fffconvert.recipe import Training
from fffconvert.tree import TreeShape

HEADS = ["", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM"]


@pytest.mark.parametrize("head", [*HEADS[:2], *(pytest.param(h, marks=pytest.mark.slow) for h in HEADS[2:])])
def test_student_comes_closer_on_text_that_it_was_not_taught(
    head: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    teacher = tiny_model("bert", f"AutoModel{head}")
    shape = TreeShape(2, 3)  # random, because a fitted one has little to gain on words without sense
    student = convert(teacher, tokenizer, sentences(60), shape, "random", calibration_tokens=300).model
    batch = dict(tokenizer(sentences(64, seed=99), padding=True, return_tensors="pt"))

    @torch.no_grad()
    def figures() -> dict[str, float]:
        with comparing(student, teacher) as loss:
            return {name: float(value) for name, value in loss(student, batch)[1].items()}

    before = figures()
    rows = tokenized_texts(sentences(320, seed=1), tokenizer)
    distill(student, teacher, tokenizer, rows, Training(epochs=3, learning_rate=1e-3, batch_size=16))
    after = figures()
    names = {"": [], "ForQuestionAnswering": ["start_logits", "end_logits"]}.get(head, ["logits"])
    assert list(after) == ["hidden", "ffn_inputs", *names]
    assert sum(after.values()) < sum(before.values())
    assert after["ffn_inputs"] < before["ffn_inputs"]


def test_what_ffns_read_is_that_of_the_batch_alone(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    student = converted(classifier, tokenizer)
    places = [place for model in (student, classifier) for place in ffn_starts_of(model, FAMILIES["bert"])]
    hooks = [len(place._forward_pre_hooks) for place in places]
    batch = dict(tokenizer(sentences(4), padding=True, return_tensors="pt"))
    with torch.no_grad(), comparing(student, classifier) as loss:
        first = loss(student, batch)[1]
        assert loss(student, batch)[1] == first
    # the first layer's FFN reads what the teacher's does, so all of it is the second's
    layers = [model.bert.encoder.layer for model in (student, classifier)]
    states = [model(**batch, output_hidden_states=True).hidden_states[1] for model in (student, classifier)]
    mask = batch["attention_mask"]
    read = [
        layer[1].attention(state, (1.0 - mask[:, None, None]) * -1e9)[0]
        for layer, state in zip(layers, states, strict=True)
    ]
    assert float(first["ffn_inputs"]) == pytest.approx(float(relative_error(*read, mask.float()).mean()))
    assert [len(place._forward_pre_hooks) for place in places] == hooks


def test_labels_are_not_used_and_the_teacher_is_left_alone(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    rows = tokenized_texts(sentences(24), tokenizer)
    ends = []
    for labels in ([0] * 24, [7] * 24):  # which no head has
        student = converted(classifier, tokenizer)
        distill(student, classifier, tokenizer, rows.add_column("labels", labels), Training(batch_size=8))
        ends.append(student.state_dict())
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "single_label_classification"])
def test_several_right_classes_are_taught_by_squared_errors(
    problem_type: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_model("bert", num_labels=3, problem_type=problem_type)
    student, batch = converted(teacher, tokenizer), {"input_ids": torch.tensor([[2, 7, 9, 3], [2, 8, 5, 3]])}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    seen: list[dict[str, Tensor]] = []

    def see(
        model: PreTrainedModel, _rows: object, _tokenizer: object, loss: Any, *_: Any, **how: Any
    ) -> None:
        seen.append(loss(model, batch)[1])
        assert how["dropout"] is False

    monkeypatch.setattr(distillation, "train", see)
    distill(student, teacher.train(), tokenizer, tokenized_texts(sentences(2), tokenizer))
    with torch.no_grad():
        ours, theirs = (model(**batch).logits for model in (student, teacher.eval()))
    squared = (ours - theirs).square().mean()
    assert torch.allclose(seen[0]["logits"], squared) == problem_type.startswith("multi")


def test_a_student_without_trees_of_this_package_is_refused(
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that was loaded with its own code has others, whose leaves would learn at the full rate."""
    student, rows = converted(classifier, tokenizer), tokenized_texts(sentences(8), tokenizer)
    with pytest.raises(UserError, match="the model is dense; expected a converted model"):
        distill(classifier, classifier, tokenizer, rows)
    monkeypatch.setattr(distillation, "fffs_of", lambda _model: [])
    with pytest.raises(UserError, match="the student has no tree of fffconvert's own"):
        distill(student, classifier, tokenizer, rows)


def test_a_head_that_judges_every_token_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """Its logits `(n_texts, n_tokens)` are no classes, and some of them are of padding."""
    dense = tiny_model("electra", "AutoModelForPreTraining")
    student = converted(dense, tokenizer)
    with pytest.raises(UserError, match=r"^the student is FFFElectraForPreTraining, which cannot be judged"):
        distill(student, dense, tokenizer, tokenized_texts(sentences(8), tokenizer))


def test_a_teacher_is_dense(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    student = converted(classifier, tokenizer)
    rows = tokenized_texts(sentences(4), tokenizer)
    with pytest.raises(UserError, match="is converted already"):
        distill(student, student, tokenizer, rows)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_switched_off_around_it(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, off: Any
) -> None:
    student = converted(classifier, tokenizer)
    before = student.classifier.weight.clone()
    with off():
        distill(student, classifier, tokenizer, tokenized_texts(sentences(8), tokenizer), Training(epochs=1))
    assert not torch.equal(student.classifier.weight, before)
