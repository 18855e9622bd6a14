"""Every head from one's own data to scores, by the command line: made, converted, distilled, judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from conftest import sentences, tiny_config
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from fffconvert import checkpoint
from fffconvert.checkpoint import give_head, load_for_task
from fffconvert.cli import main
from fffconvert.data import read_data, read_validations
from fffconvert.distillation import comparing
from fffconvert.errors import UserError
from fffconvert.evaluation import Judge, evaluate
from fffconvert.heads import kind_of, labels_of
from fffconvert.inference import LONGEST_ANSWER, spans
from fffconvert.recipe import DataSource
from fffconvert.tasks import TASKS, Task

TEXTS = sentences(32)
ROWS: dict[str, list[dict[str, Any]]] = {
    "classification": [{"text": t, "label": ["one", "two", "three"][len(t) % 3]} for t in TEXTS],
    "regression": [{"text": t, "score": len(t) / 10} for t in TEXTS],
    "multi-label": [{"text": t, "labels": [w for w in ("good", "bad") if w in t.split()]} for t in TEXTS],
    "tokens": [
        {"tokens": t.split(), "ner_tags": ["B-X" if w in ("film", "book") else "O" for w in t.split()]}
        for t in TEXTS
    ],
    "question": [
        {
            "question": t.split()[0],
            "context": t,
            "answers": {"text": [t.split()[1]], "answer_start": [len(t.split()[0]) + 1]},
        }
        for t in TEXTS
    ],
    "masked": [{"text": t} for t in TEXTS],
    "embedding": [{"text": t} for t in TEXTS],
}
METRIC = {
    "classification": "accuracy",
    "regression": "pearson",
    "multi-label": "micro_f1",
    "tokens": "entity_f1",
    "question": "span_f1",
    "masked": "accuracy",
    "embedding": "cosine",
}


def test_a_new_head_forgets_what_the_old_one_answered() -> None:
    config = tiny_config()
    for name, kind in (("mnli", "single_label_classification"), ("stsb", "regression")):
        give_head(config, TASKS[name])
        assert config.problem_type == kind
    nomic = tiny_config("nomic_bert")
    with pytest.raises(UserError, match=r"nomic_bert has no AutoModelForQuestionAnswering in transformers"):
        give_head(nomic, Task("own", ("question", "context"), kind="question"))


def test_a_head_keeps_its_rows_where_labels_stand_in_another_order(
    folder_of: Callable[..., str], tokenizer: PreTrainedTokenizerFast
) -> None:
    names = {0: "CONTRADICTION", 1: "neutral", 2: "entailment"}
    model = BertForSequenceClassification(tiny_config(id2label=names)).eval()
    loaded = load_for_task(folder_of(model), TASKS["mnli"], seed=0)
    inputs = tokenizer(["a good film"], return_tensors="pt")
    with torch.no_grad():
        expected, found = (each(**inputs).logits[0] for each in (model, loaded.model))
    assert labels_of(loaded.model.config) == TASKS["mnli"].labels
    torch.testing.assert_close(found, expected.flip(0))


def test_a_head_keeps_its_names_where_the_data_has_numbers() -> None:
    own = Task("own", ("text",), ("0", "1"))
    for names in (("bad", "good"), ("LABEL_0", "LABEL_1")):
        config = tiny_config(id2label=dict(enumerate(names)))
        give_head(config, own)
        assert labels_of(config) == (names if names[0] == "bad" else own.labels)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def done(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def home(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny encoder, a masked language model, and a JSONL file for each kind of task."""
    monkeypatch.chdir(tmp_path)
    set_seed(0)
    for name, cls in (("base", BertModel), ("mlm", BertForMaskedLM)):
        cls(tiny_config(initializer_range=0.5)).save_pretrained(name)
        tokenizer.save_pretrained(name)
    for kind, rows in ROWS.items():
        Path(f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("plain.txt").write_text("\n".join(sentences(30, seed=5)), encoding="utf-8")
    return tmp_path


def teacher_for(kind: str) -> str:
    if kind in ("masked", "embedding"):
        return {"masked": "mlm", "embedding": "base"}[kind]
    done("finetune", "base", "teacher", "--data", f"{kind}.jsonl", "--epochs", 1, "--learning-rate", 1e-3)
    return "teacher"


STEPS = ("--epochs", 10, "--batch-size", 16)
TREE = ("--depth", 2, "--leaf-width", 4, "--calibration-tokens", 300)


@pytest.mark.parametrize("kind", ROWS)
def test_the_whole_way(home: Path, kind: str) -> None:
    teacher, data = teacher_for(kind), f"{kind}.jsonl"
    assert kind_of(checkpoint.load_config(teacher)) == kind
    done("convert", teacher, "student", "--data", data, *TREE)
    done("distill", "student", "distilled", "--teacher", teacher, "--data", data, *STEPS)
    assert loss_of("distilled", teacher, data) < loss_of("student", teacher, data)
    done("evaluate", "distilled", "--data", data, "--teacher", teacher, "--json", "scores.json")
    scores = json.loads(Path("scores.json").read_text())
    assert (scores["task"], scores["metric"]) == (data, METRIC[kind])
    assert scores["metrics"][data][METRIC[kind]] == scores["score"]
    assert scores["active_neurons"] == 5
    assert -1 <= scores["agreement"] < 1
    assert (home / "distilled" / "README.md").is_file()


def loss_of(student: str, teacher: str, data: str) -> float:
    """The distillation loss on all rows at once."""
    ours, theirs = checkpoint.load(student), checkpoint.load(teacher)
    rows = read_data(DataSource(data), ours.tokenizer, theirs.model.config, labelled=False).rows
    columns = ours.tokenizer.pad(rows.select_columns(["input_ids", "attention_mask"])[:], return_tensors="pt")
    with torch.no_grad(), comparing(ours.model, theirs.model) as loss:
        return float(loss(ours.model, columns)[0])


def test_a_teacher_agrees_with_itself(home: Path) -> None:
    done("evaluate", "mlm", "--data", "masked.jsonl", "--teacher", "mlm", "--json", "scores.json")
    scores = json.loads(Path("scores.json").read_text())
    assert scores["agreement"] == 1
    assert scores["teacher_score"] == pytest.approx(scores["score"])


@pytest.mark.parametrize("kind", ["classification", "tokens"])
def test_text_alone(home: Path, kind: str) -> None:
    """A file without labels: the teacher is the judge."""
    teacher = teacher_for(kind)
    done("convert", teacher, "student", "--calibration", "plain.txt", *TREE)
    done("distill", "student", "distilled", "--teacher", teacher, "--text", "plain.txt")
    done("evaluate", "distilled", "--text", "plain.txt", "--teacher", teacher, "--json", "scores.json")
    scores = json.loads(Path("scores.json").read_text())
    assert scores["task"] == "text"
    assert -1 <= scores["agreement"] < 1
    assert (scores["metric"], scores["teacher_score"]) == ("agreement", 1)
    assert scores["score"] == scores["retention"] == scores["agreement"]
    lonely = run("evaluate", "distilled", "--text", "plain.txt")
    assert lonely.exit_code == 1
    assert "text has no labels, so a model is judged by how close it is to its teacher" in lonely.output


# ---- Evaluation against plain loops


def test_tokens_are_judged_where_their_labels_stand(home: Path) -> None:
    teacher = checkpoint.load(teacher_for("tokens"))
    task, validations = read_validations(DataSource("tokens.jsonl"), teacher.tokenizer, teacher.model.config)
    scores = evaluate(teacher.model, teacher.tokenizer, task, validations)
    right = []
    tagger = transformers.pipeline("token-classification", "teacher")
    for row in ROWS["tokens"]:
        found = tagger(" ".join(row["tokens"]), ignore_labels=[])
        right += [token["entity"] == tag for token, tag in zip(found, row["ner_tags"], strict=True)]
    assert scores.metrics["tokens.jsonl"]["accuracy"] == pytest.approx(np.mean(right))


def test_masked_words_are_judged_as_the_model_does(home: Path) -> None:
    loaded = checkpoint.load("mlm")
    task, validations = read_validations(DataSource("masked.jsonl"), loaded.tokenizer, loaded.model.config)
    scores = evaluate(loaded.model, loaded.tokenizer, task, validations)
    total, n_masked = 0.0, 0
    for row in validations["masked.jsonl"]:
        inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask", "labels")}
        n_here = sum(label >= 0 for label in row["labels"])
        with torch.no_grad():
            total += float(loaded.model(**inputs).loss) * n_here
        n_masked += n_here
    assert scores.metrics["masked.jsonl"]["loss"] == pytest.approx(total / n_masked, rel=1e-4)


def test_spans_are_in_order_real_short_and_in_the_context() -> None:
    n_tokens = LONGEST_ANSWER + 10
    start, end = torch.zeros(5, n_tokens), torch.zeros(5, n_tokens)
    start[0, 5], end[0, 3] = 9, 8  # the end before the start: one of them must give way
    start[1, 3], end[1, n_tokens - 2] = 9, 8  # too far apart
    start[2, 7], end[2, 7] = 9, 9  # padding
    start[3, 1], end[3, 4] = 9, 8  # from the question into the context
    start[4, 0], end[4, 4] = 9, 8  # no answer, which ends where it begins
    mask, ids = torch.ones(5, n_tokens, dtype=torch.long), torch.full((5, n_tokens), 7)
    mask[2, 6:] = 0
    ids[:, 2] = ids[:, -1] = ids[2, 5] = 3  # separators
    batch = {"attention_mask": mask, "input_ids": ids}
    found = spans({"start_logits": start, "end_logits": end}, batch, sep_token_id=3)
    for row, (first, last) in enumerate(found.tolist()):
        assert first == last == 0 or 2 < first <= last < first + LONGEST_ANSWER
        assert mask[row, last] == 1
        assert ids[row, last] != 3
    assert found[0, 0] == 5
    assert found[1, 0] == 3
    assert found[3, 1] == 4
    assert found[4].tolist() == [0, 0]


def test_no_teacher_and_no_labels(home: Path) -> None:
    loaded = checkpoint.load("base")
    data = read_data(Path("plain.txt"), loaded.tokenizer, loaded.model.config, held_out=5)
    with pytest.raises(UserError, match="judged by how close it is to its teacher"):
        Judge(loaded.tokenizer, data.task, data.validations, None)


def test_a_head_that_cannot_be_judged(home: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    transformers.BertForPreTraining(tiny_config()).save_pretrained("pretraining")
    tokenizer.save_pretrained("pretraining")
    result = run("evaluate", "pretraining", "--text", "plain.txt", "--teacher", "pretraining")
    assert result.exit_code == 1
    assert (
        "BertForPreTraining, which cannot be judged; expected an encoder without a head, or" in result.output
    )


# ---- The guard


@pytest.fixture
def evaluated(home: Path) -> tuple[object, ...]:
    """An evaluation of a student that has lost something."""
    done("convert", "base", "student", "--calibration", "plain.txt", *TREE)
    return ("evaluate", "student", "--text", "plain.txt", "--teacher", "base")


def test_guard_of_evaluate(evaluated: tuple[object, ...]) -> None:
    done(*evaluated, "--min-retention", 0.01)
    failed = run(*evaluated, "--min-retention", 0.9999, "--json", "scores.json")
    assert failed.exit_code == 1
    (line,) = [line for line in failed.output.splitlines() if line.startswith("error:")]
    retention = json.loads(Path("scores.json").read_text())["retention"]
    assert line == (
        f"error: retention is {100 * retention:.2f}%; at least 99.99% was asked for; "
        "the report is in scores.json"
    )
    lonely = run("evaluate", "student", "--text", "plain.txt", "--min-retention", 0.5)
    assert lonely.exit_code == 1
    assert "--min-retention needs a teacher to compare with" in lonely.output
    for out_of_range in (1.2, "nan"):
        assert run(*evaluated, "--min-retention", out_of_range).exit_code == 2


@pytest.mark.parametrize("where", ["option", "recipe"])
def test_guard_of_run(home: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr("fffconvert.pipeline.benchmark", lambda *_, **__: Latency())
    monkeypatch.setattr("fffconvert.cli.show_latency", lambda _: None)
    recipe = {
        "model": "base",
        "data": {"path": "embedding.jsonl"},
        "held_out": 8,
        "tree": {"depth": 1, "leaf_width": 2},
    }
    options: tuple[object, ...] = ()
    if where == "recipe":
        recipe["min_retention"] = 0.9999
    else:
        options = ("--min-retention", 0.9999)
    Path("own.yaml").write_text(json.dumps({**recipe, "calibration_tokens": 200}))
    failed = run("run", "own.yaml", "--output", "made", *options)
    assert failed.exit_code == 1
    assert "at least 99.99% was asked for; the report is in made/report.json" in failed.output
    report = json.loads(Path("made/report.json").read_text())
    assert report["scores"]["retention"] < 0.9999
    assert AutoTokenizer.from_pretrained("made")


class Latency:
    def to_dict(self) -> dict[str, Any]:
        return {"machine": "none", "rows": []}
