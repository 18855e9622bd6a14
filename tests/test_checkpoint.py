"""The folder on disk: what a converted model leaves there, and its card."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import sentences, tiny_config, tiny_model
from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from fffconvert import UserError, checkpoint
from fffconvert.checkpoint import Loaded, load, save
from fffconvert.conversion import convert
from fffconvert.errors import NotWritten
from fffconvert.families import FAMILIES
from fffconvert.modeling import config_class, config_with, model_class
from fffconvert.report import read_report
from fffconvert.tree import TreeShape

SHAPE = TreeShape(depth=2, leaf_width=2)

HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "classification": ("BertForSequenceClassification", {"num_labels": 3}),
    "multi-label": (
        "BertForSequenceClassification",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
    ),
    "regression": ("BertForSequenceClassification", {"num_labels": 1}),
    "tokens": ("BertForTokenClassification", {"num_labels": 3}),
    "question": ("BertForQuestionAnswering", {}),
    "masked": ("BertForMaskedLM", {}),
    "embedding": ("BertModel", {}),
}


def converted(head: str, **changes: Any) -> PreTrainedModel:
    """A converted model with random weights."""
    dense = tiny_config(**changes)
    config = config_with(dense, config_class(FAMILIES["bert"]), fff=SHAPE.to_dict())
    config.architectures = [f"FFF{head}"]  # as a saved model has it
    transformers.set_seed(0)
    return model_class(getattr(transformers, head))(config).eval()


def scores_of(task: str) -> dict[str, Any]:
    """What a report holds of a task, as far as the card shows it."""
    return {"scores": {"task": task, "metric": "accuracy", "metrics": {"validation": {"accuracy": 0.5}}}}


def snippet_of(card: str) -> str:
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    return snippet


# ---- The card


@pytest.mark.parametrize("kind", HEADS)
def test_the_cards_snippet_runs(kind, tokenizer, tmp_path, monkeypatch, capsys):
    head, changes = HEADS[kind]
    model = converted(head, **changes)
    save(Loaded("user/dense", model, tokenizer), tmp_path / "made")
    monkeypatch.chdir(tmp_path)  # the card names the model as its folder is named
    names: dict[str, Any] = {}
    exec(snippet_of((tmp_path / "made" / "README.md").read_text(encoding="utf-8")), names)
    used = getattr(names["model"], "model", names["model"])  # inside its pipeline
    assert type(used).__name__ == f"FFF{head}"
    assert capsys.readouterr().out, "it prints an answer"


def test_the_card_of_a_model_of_pairs_asks_for_a_pair(tokenizer, tmp_path, monkeypatch):
    loaded = Loaded("user/dense", converted("BertForSequenceClassification"), tokenizer)
    report = scores_of("mrpc")
    report["scores"]["columns"] = ["premise", "hypothesis"]
    save(loaded, tmp_path / "made", report={**report, "table": []})
    monkeypatch.chdir(tmp_path)
    snippet = snippet_of((tmp_path / "made" / "README.md").read_text(encoding="utf-8"))
    assert '"text_pair"' in snippet
    exec(snippet, {})


def test_a_card_without_the_control_speaks_of_no_value(tokenizer, tmp_path):
    loaded = Loaded("user/dense", converted("BertForSequenceClassification"), tokenizer)
    row = {"name": "teacher", "active_neurons": 32.0, "share": 1.0, "score": 0.5, "agreement": 1.0}
    for value, there in ((None, False), (1.0, True)):
        report = {**scores_of("sst2"), "table": [{**row, "value_kept": value}]}
        save(loaded, tmp_path / f"made-{value}", report=report)
        card = (tmp_path / f"made-{value}" / "README.md").read_text(encoding="utf-8")
        assert ("FFN value kept" in card) is there
        assert ("| 100% |" in card) is there


@pytest.mark.parametrize(("licence", "expected"), [("mit", "mit"), (None, None)])
def test_the_card_has_the_licence_of_the_original(licence, expected, classifier, folder_of, tmp_path):
    folder = folder_of(classifier)
    if licence:
        Path(folder, "README.md").write_text(f"---\nlicense: {licence}\n---\n# A model\n", encoding="utf-8")
    dense = load(folder)
    model = converted("BertForSequenceClassification")
    save(Loaded(dense.name, model, dense.tokenizer), tmp_path / "made")
    card = ModelCard.load(tmp_path / "made" / "README.md")
    assert card.data.license == expected
    assert card.data.base_model is None, "a folder is no model of the Hub"


def test_a_teacher_hands_on_what_its_card_says_of_its_origin(classifier, folder_of, tmp_path):
    folder = folder_of(classifier)
    card = "---\nbase_model: user/dense\nlicense: mit\n---\n# A model\n"
    Path(folder, "README.md").write_text(card, encoding="utf-8")
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    save(load(folder), teacher)
    save(
        Loaded(str(teacher), converted("BertForSequenceClassification"), load(teacher).tokenizer),
        student,
    )
    for made in (teacher, student):
        data = ModelCard.load(made / "README.md").data
        assert (data.base_model, data.license) == ("user/dense", "mit"), made.name


@pytest.mark.parametrize(("task", "dataset"), [("sst2", "nyu-mll/glue"), ("reviews.csv", "reviews.csv")])
def test_the_cards_results_name_their_data(task, dataset, tokenizer, tmp_path):
    loaded = Loaded("user/dense", converted("BertForSequenceClassification"), tokenizer)
    save(loaded, tmp_path / "made", report={**scores_of(task), "table": []})
    data = ModelCard.load(tmp_path / "made" / "README.md").data
    (result,) = data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == (dataset, "accuracy", 0.5)
    assert (data.base_model, data.pipeline_tag) == ("user/dense", "text-classification")
    assert data.datasets == (["nyu-mll/glue"] if task == "sst2" else None)


# ---- The files


def test_a_converted_model_is_a_smaller_file_and_loads_as_it_was(tokenizer, tmp_path):
    dense = tiny_model("bert", intermediate_size=256)
    model = converted("BertForSequenceClassification", intermediate_size=256)
    save(Loaded("user/dense", dense, tokenizer), tmp_path / "dense")
    save(Loaded("user/dense", model, tokenizer), tmp_path / "made")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("made", "dense")]
    assert sizes[0] < sizes[1]
    assert ModelCard.load(tmp_path / "dense" / "README.md").data.base_model == "user/dense"
    again = load(tmp_path / "made").model
    ids = torch.tensor([[2, 7, 9, 3]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "made"}, "nothing is left beside them"


def test_routers_that_are_no_numbers_are_refused(tokenizer, tmp_path):
    model = converted("BertModel")
    model.encoder.layer[0].intermediate.router_weight[0, 0, 0] = float("nan")
    save(Loaded("user/dense", model, tokenizer), tmp_path / "made")
    with pytest.raises(UserError, match="router_weight holds NaN or infinity"):
        load(tmp_path / "made")


def test_what_fails_halfway_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    loaded = Loaded("user/dense", converted("BertModel"), tokenizer)
    monkeypatch.setattr(checkpoint, "model_card", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(loaded, tmp_path / "made")
    assert not list(tmp_path.iterdir())


def test_a_model_that_gives_its_attentions_is_saved_and_loads(classifier, folder_of, tmp_path):
    folder = Path(folder_of(classifier))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "output_attentions": True}))
    dense = load(folder)
    made = convert(dense.model, dense.tokenizer, sentences(20), TreeShape(depth=1, leaf_width=2)).model
    save(replace(dense, model=made), tmp_path / "made")
    again = load(tmp_path / "made").model
    assert len(again(torch.tensor([[2, 7, 9, 3]])).attentions) == 2


def test_what_transformers_refuses_to_write_leaves_nothing(tokenizer, tmp_path):
    model = converted("BertModel")
    model.config._output_attentions = True  # the attention that it has cannot give any
    with pytest.raises(NotWritten, match="made could not be written"):
        save(Loaded("user/dense", model, tokenizer), tmp_path / "made")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "setting",
    [
        {"attn_implementation": "flash_attention_2"},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_package_that_is_not_there_is_one_line(setting, classifier, folder_of):
    folder = Path(folder_of(classifier))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **setting}))
    with pytest.raises(UserError, match="could not be loaded"):
        load(folder)


def test_a_file_of_a_model_is_not_taken_for_its_folder(classifier, folder_of):
    with pytest.raises(UserError, match="is a file; expected the folder of a saved model"):
        load(f"{folder_of(classifier)}/config.json")


def test_padding_is_told_from_text_whatever_the_tokenizer_says_it_gives(classifier, folder_of):
    folder = Path(folder_of(classifier))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_input_names": ["input_ids"]}))
    assert "attention_mask" in load(folder).tokenizer("a film")


@pytest.mark.parametrize("limit", [0, -1, 0.5, "64"], ids=str)
def test_a_tokenizer_whose_longest_text_is_no_length_is_refused(limit, classifier, folder_of):
    folder = Path(folder_of(classifier))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": limit}))
    with pytest.raises(UserError, match=f"model_max_length is {limit!r}; expected a number of tokens"):
        load(folder)
    for many in (float("inf"), 1e30):
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": many}))
        assert load(folder).tokenizer.model_max_length == 64
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": 32.0}))
    assert len(load(folder).tokenizer("a film " * 64, truncation=True)["input_ids"]) == 32


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(classifier, folder_of):
    with pytest.raises(UserError, match="its tokenizer has 27 tokens and the model 26; expected no more"):
        checkpoint.load_tokenizer(folder_of(classifier), tiny_config(vocab_size=26))


def test_a_report_that_is_none(tmp_path):
    assert read_report(tmp_path) == {}
    for text in ("{", "3", "[1]"):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(UserError, match="not what fffconvert wrote there"):
            read_report(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({"layers": []}))
    assert read_report(tmp_path) == {"layers": []}


def test_a_mistyped_path_is_looked_for_nearby_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def glob(_self: Path, _pattern: str) -> Any:
        raise FileNotFoundError("/proc/27263")

    monkeypatch.setattr(Path, "glob", glob)
    for name in ("modle", "modle/v1", "modle/v1/bert/fine"):
        assert checkpoint.near_folder(str(tmp_path / name)) is None


def test_the_outputs_of_a_head_are_put_in_order_and_nothing_of_the_encoder() -> None:
    """Two labels, and two types of tokens: a table of the encoder is as long as the head's."""
    model = tiny_model("bert")
    torch.nn.init.normal_(model.classifier.bias)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    assert len(before["bert.embeddings.token_type_embeddings.weight"]) == model.config.num_labels == 2
    checkpoint.reorder_outputs(model, ("no", "yes"), ("Yes", "No"))
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved == {"classifier.weight", "classifier.bias"}
    assert torch.equal(model.classifier.weight, before["classifier.weight"][[1, 0]])
