"""Sentence-transformers models: their files are kept, their own pooling is used, and they load again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import sentences, tiny_config
from datasets import Dataset
from scipy.stats import spearmanr
from transformers import BertModel, PreTrainedTokenizerFast, set_seed

from fffconvert import UserError, checkpoint, convert, data, distill, distillation, hub, pipeline, students
from fffconvert.cli import main
from fffconvert.dry_run import estimate_run
from fffconvert.inference import embed
from fffconvert.recipe import Recipe, Training
from fffconvert.sentence import SentenceModules, embeddings, read_modules
from fffconvert.tree import TreeShape

st = pytest.importorskip("sentence_transformers", reason="the extra sentence is not installed")
modules = pytest.importorskip("sentence_transformers.models")


@pytest.fixture
def encoder(folder_of) -> str:
    """A tiny sentence-transformers model that pools by its first token, with a prompt."""
    set_seed(0)
    folder = folder_of(BertModel(tiny_config(initializer_range=0.5)), "plain")
    model = st.SentenceTransformer(
        modules=[
            modules.Transformer(folder, max_seq_length=32),
            modules.Pooling(16, pooling_mode="cls"),
            modules.Normalize(),
        ],
        prompts={"query": "the "},
        device="cpu",
    )
    model.save_pretrained(f"{folder}-sentence")
    return f"{folder}-sentence"


def run(*arguments: object) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_it_converts_distils_loads_and_is_judged(encoder, glue, tmp_path, monkeypatch):
    text, student, distilled = tmp_path / "text.txt", tmp_path / "student", tmp_path / "distilled"
    text.write_text("\n".join(sentences(600)), encoding="utf-8")
    shape = ("--depth", 2, "--leaf-width", 2, "--calibration-tokens", 500)
    run("convert", encoder, student, "--calibration", text, *shape)
    run("distill", student, distilled, "--teacher", encoder, "--text", text, "--learning-rate", 1e-3)
    model, teacher = (
        st.SentenceTransformer(str(distilled), device="cpu"),
        st.SentenceTransformer(encoder, device="cpu"),
    )
    assert type(model[0].auto_model).__name__ == "FFFBertModel"
    assert [type(module) for module in model] == [type(module) for module in teacher]
    assert model[1].pooling_mode == "cls"
    assert model.prompts["query"] == "the "
    assert model.max_seq_length == teacher.max_seq_length
    undistilled = st.SentenceTransformer(str(student), device="cpu")
    texts = sentences(50, seed=1)
    ours, before, theirs = (m.encode(texts) for m in (model, undistilled, teacher))
    assert (ours * theirs).sum(1).mean() > (before * theirs).sum(1).mean()

    monkeypatch.chdir(tmp_path)  # the card names the model as its folder is named
    card = (distilled / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert "SentenceTransformer" in snippet
    exec(snippet, {})

    scores = tmp_path / "scores.json"
    command = ("evaluate", distilled, "--task", "stsb", "--teacher", encoder, "--data-dir", glue)
    run(*command, "--json", scores)
    found = json.loads(scores.read_text())
    rows = Dataset.from_parquet(str(glue / "stsb" / "validation.parquet"))
    first, second = (model.encode(list(rows[name])) for name in ("sentence1", "sentence2"))
    expected = spearmanr((first * second).sum(1), rows["label"]).statistic
    assert found["metric"] == "spearman"
    assert found["score"] == pytest.approx(expected, abs=1e-4)
    assert 0 < found["metrics"]["validation"]["cosine"] <= 1
    sent = hub.push(distilled, "user/name", dry_run=True).files
    assert {
        "modules.json",
        "1_Pooling/config.json",
        "modeling_fff.py",
        "config_sentence_transformers.json",
    } <= set(sent)


def test_its_own_pooling_makes_the_embeddings(encoder, texts):
    loaded = checkpoint.load(encoder)
    inputs = loaded.tokenizer(texts[:8], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = loaded.model(**inputs).last_hidden_state
    found = embeddings(hidden, inputs["attention_mask"], loaded.pooling)
    expected = st.SentenceTransformer(encoder, device="cpu").encode(texts[:8])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not np.allclose(embeddings(hidden, inputs["attention_mask"], None), expected, atol=1e-2)


@pytest.mark.parametrize("include", [True, False], ids=["pooled_too", "not_pooled"])
def test_a_default_prompt_stands_before_every_text(include, folder_of, tmp_path):
    folder = folder_of(BertModel(tiny_config(initializer_range=0.5)), "plain")
    made = st.SentenceTransformer(
        modules=[
            modules.Transformer(folder),
            modules.Pooling(16, pooling_mode="mean", include_prompt=include),
        ],
        prompts={"query": "the good "},
        default_prompt_name="query",
        device="cpu",
    )
    made.save_pretrained(str(tmp_path / "prompted"))
    loaded = checkpoint.load(tmp_path / "prompted")
    texts, file = sentences(20), tmp_path / "text.txt"
    file.write_text("\n".join(texts), encoding="utf-8")
    config = loaded.model.config
    given = data.read_data(file, loaded.tokenizer, config, held_out=3, prompt=loaded.prompt)
    assert all(text.startswith("the good ") for text in given.texts)
    assert list(data.read_texts(file, config, prompt=loaded.prompt)) == [f"the good {text}" for text in texts]
    _, splits = data.read_validations(file, loaded.tokenizer, config, prompt=loaded.prompt)
    found = embed(loaded.model, loaded.tokenizer, loaded.pooling, splits["text"], "text")
    np.testing.assert_allclose(found, made.encode(texts, normalize_embeddings=True), atol=1e-5)


def test_modules_read_the_states_of_a_model_in_half_precision():
    class Dense(torch.nn.Linear):
        def forward(self, features):
            return {"sentence_embedding": super().forward(features["token_embeddings"].mean(1))}

    states, mask = torch.ones(2, 3, 4, dtype=torch.bfloat16), torch.ones(2, 3)
    assert embeddings(states, mask, Dense(4, 5)).shape == (2, 5)


def test_its_embeddings_count_for_most_of_what_a_student_is_taught(encoder, monkeypatch):
    loaded, seen = checkpoint.load(encoder), []
    batch = dict(loaded.tokenizer(sentences(3), padding=True, return_tensors="pt"))

    def see(model, rows, tokenizer, loss, *_, **__):
        seen.append(loss(model, batch))

    monkeypatch.setattr(distillation, "train", see)
    student = convert(loaded.model, loaded.tokenizer, sentences(40), TreeShape(2, 2)).model
    distill(student, loaded.model, loaded.tokenizer, Dataset.from_dict({}), pooling=loaded.pooling)
    ((value, figures),) = seen
    torch.testing.assert_close(value, figures["hidden"] + figures["ffn_inputs"] + 60 * figures["embedding"])


def test_an_encoder_that_came_from_a_model_with_a_head_loads_without_it(encoder, tmp_path, quick_latency):
    config = Path(encoder, "config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": ["BertForMaskedLM"]}))
    assert type(checkpoint.load(encoder).model) is BertModel
    text = tmp_path / "own.txt"
    text.write_text("\n".join(sentences(60)), encoding="utf-8")
    shape, quick = TreeShape(2, 2), Training(epochs=1, batch_size=8)
    recipe = Recipe(
        model=encoder, text=str(text), tree=shape, calibration_tokens=300, held_out=10, distill=quick
    )
    assert estimate_run(recipe).active_neurons == 3
    assert "cosine" in pipeline.run(recipe, tmp_path / "out").report["scores"]["metrics"]["held_out"]
    Path(encoder, "modules.json").unlink()
    with pytest.raises(UserError, match=r"the weights lack cls\.predictions"):
        checkpoint.load(encoder)


def test_a_missing_library_is_said_before_anything_is_made(encoder, tmp_path, monkeypatch):
    text = tmp_path / "own.txt"
    text.write_text("\n".join(sentences(60)), encoding="utf-8")
    recipe = Recipe(model=encoder, text=str(text), tree=TreeShape(2, 2), calibration_tokens=300, held_out=10)
    monkeypatch.setattr("fffconvert.sentence.import_module", import_nothing)
    monkeypatch.setattr(students, "build", import_nothing)
    for refuses in (lambda: estimate_run(recipe), lambda: pipeline.run(recipe, tmp_path / "out")):
        with pytest.raises(UserError, match="a sentence-transformers model needs that library"):
            refuses()
    assert not (tmp_path / "out.work").exists()


def import_nothing(name: str) -> None:
    raise ImportError(name)


def test_an_ordinary_folder_has_no_modules(classifier, folder_of):
    assert read_modules(folder_of(classifier)) is None


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("config_sentence_transformers.json", content) for content in ("{", "[]", '{"prompts": [1]}')),
        *(("sentence_bert_config.json", content) for content in ("{", "[]")),
    ],
)
def test_settings_that_are_none(encoder, file, content):
    (Path(encoder) / file).write_text(content)
    with pytest.raises(UserError, match="is not what sentence-transformers writes"):
        read_modules(encoder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", "[1]", '[{"path": ""}]'])
def test_a_list_of_modules_that_is_none(encoder, content):
    (Path(encoder) / "modules.json").write_text(content)
    with pytest.raises(UserError, match=r"modules.json is no list of modules with a type and a path each"):
        read_modules(encoder)


def test_a_module_that_reads_more_than_hidden_states_is_refused(encoder):
    modules = read_modules(encoder)
    listed = json.loads(modules.files["modules.json"])
    listed[1]["type"] = "sentence_transformers.models.WeightedLayerPooling"
    changed = SentenceModules({**modules.files, "modules.json": json.dumps(listed).encode()})
    with pytest.raises(UserError, match="WeightedLayerPooling is unknown; expected Pooling, Dense"):
        changed.pooling()


def test_texts_that_only_sentence_transformers_would_put_in_lower_case_are_refused(encoder, monkeypatch):
    file = Path(encoder) / "sentence_bert_config.json"
    file.write_text('{"max_seq_length": 20, "do_lower_case": true}')
    monkeypatch.setattr(PreTrainedTokenizerFast, "tokenize", lambda _, text: [text.lower()])
    checkpoint.load(encoder)  # whose tokenizer does it
    monkeypatch.setattr(PreTrainedTokenizerFast, "tokenize", lambda _, text: [text])
    with pytest.raises(UserError, match=r"in lower case \(do_lower_case\) and its tokenizer does not"):
        checkpoint.load(encoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "custom.Module"}, "code of the model's own"),
        ({"path": "../elsewhere"}, "expected one such as 1_Pooling"),
    ],
)
def test_what_cannot_be_kept_is_refused(encoder, tmp_path, change, message):
    folder = tmp_path / "changed"
    folder.mkdir()
    read_modules(encoder).write(folder)
    listed = json.loads((folder / "modules.json").read_text())
    listed[1].update(change)
    (folder / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(UserError, match=message):
        read_modules(str(folder))
