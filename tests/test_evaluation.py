"""What a judge refuses and keeps to; evaluation of models is tested by head in test_heads.py."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import sentences, tiny_config, tiny_model, tokenized_texts
from transformers import BertModel

from fffconvert import UserError
from fffconvert.evaluation import evaluate
from fffconvert.tasks import Task


def test_splits_have_any_name_and_some_rows(tokenizer):
    model, rows = tiny_model("bert", num_labels=2), tokenized_texts(sentences(6), tokenizer)
    rows = rows.add_column("labels", [0, 1] * 3)
    task = Task("own", ("text",), ("bad", "good"))
    assert evaluate(model, tokenizer, task, {"mine": rows}).metrics.keys() == {"mine"}
    for splits in ({}, {"mine": rows.select([])}):
        with pytest.raises(UserError, match="own has no rows to judge a model by"):
            evaluate(model, tokenizer, task, splits)


def test_dropout_is_off_whatever_mode_the_models_are_in(tokenizer):
    rows = tokenized_texts(sentences(6), tokenizer).add_column("labels", [0, 1] * 3)
    model, teacher = (tiny_model("bert", num_labels=2, hidden_act=act) for act in ("relu", "gelu"))
    task = Task("own", ("text",), ("bad", "good"))
    expected = evaluate(model, tokenizer, task, {"mine": rows}, teacher)
    assert evaluate(model.train(), tokenizer, task, {"mine": rows}, teacher) == expected
    assert evaluate(model, tokenizer, task, {"mine": rows}, teacher.train()) == expected
    assert model.training
    assert teacher.training


def test_a_teacher_with_a_head_is_no_encoders_teacher(tokenizer):
    rows = tokenized_texts(sentences(4), tokenizer)
    encoder, teacher = tiny_model("bert", "AutoModel"), tiny_model("bert")
    task = Task("text", ("text",), metrics=("cosine",), kind="embedding", label=None)
    with pytest.raises(UserError, match="has no head \\(BertModel\\) and the teacher has one"):
        evaluate(encoder, tokenizer, task, {"held_out": rows}, teacher)


def test_a_head_that_is_not_the_tasks_is_refused(tokenizer):
    rows = tokenized_texts(sentences(6), tokenizer).add_column("labels", [0, 1] * 3)
    encoder = BertModel(tiny_config())
    with pytest.raises(UserError, match=r"own asks for a model ForSequenceClassification .* is a BertModel"):
        evaluate(encoder, tokenizer, Task("own", ("text",), ("bad", "good")), {"mine": rows})


def test_what_is_not_finite_is_no_answer(tokenizer):
    rows = tokenized_texts(sentences(6), tokenizer).add_column("labels", [0, 1] * 3)
    model = tiny_model("bert", num_labels=2)
    model.classifier.bias.data[0] = np.nan
    with pytest.raises(UserError, match="BertForSequenceClassification gives NaN or infinity"):
        evaluate(model, tokenizer, Task("own", ("text",), ("bad", "good")), {"mine": rows})


def test_a_copy_of_a_text_is_no_neighbour(tokenizer):
    """Else texts that come twice would agree, however far a student is."""
    teacher, student = (tiny_model("bert", "AutoModel", hidden_act=act) for act in ("gelu", "relu"))
    task = Task("text", ("text",), metrics=("cosine",), kind="embedding", label=None)
    once, thrice = (
        evaluate(student, tokenizer, task, {"own": tokenized_texts(texts, tokenizer)}, teacher).agreement
        for texts in (sentences(20), sentences(20) * 3)
    )
    assert once == thrice < 1
    with pytest.raises(UserError, match="has no neighbour"):
        evaluate(teacher, tokenizer, task, {"own": tokenized_texts(["good"] * 3, tokenizer)}, teacher)


def test_one_text_has_no_neighbour(tokenizer) -> None:
    model, rows = BertModel(tiny_config()), tokenized_texts(sentences(1), tokenizer)
    with pytest.raises(UserError, match="has no neighbour to judge by; expected two or more"):
        evaluate(model, tokenizer, Task("text", ("text",), kind="embedding"), {"own": rows}, model)


def test_ffns_may_be_told_to_read_a_few_tokens_at_a_time(tokenizer):
    rows = tokenized_texts(sentences(6), tokenizer).add_column("labels", [0, 1] * 3)
    model, teacher = (tiny_model("bert", num_labels=2, hidden_act=act) for act in ("relu", "gelu"))
    task = Task("own", ("text",), ("bad", "good"))
    expected = evaluate(model, tokenizer, task, {"mine": rows}, teacher)
    for module in (*model.modules(), *teacher.modules()):
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 1000  # of which no batch is a multiple
    assert evaluate(model, tokenizer, task, {"mine": rows}, teacher) == expected
