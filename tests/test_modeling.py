"""A converted model is an ordinary model of `transformers`, for every family and every head."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TINY, batch_of, converted, sentences, tiny_config, tiny_model, tokenized_texts
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertLMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.models.auto import modeling_auto

import fffconvert
from fffconvert import modeling
from fffconvert.checkpoint import Loaded
from fffconvert.configuration import dense_neurons, is_converted, shape_of
from fffconvert.conversion import untrained_student
from fffconvert.errors import UserError
from fffconvert.families import FAMILIES, family_of
from fffconvert.fff import FFF
from fffconvert.modeling import config_class, config_with, dense_class_of, model_class
from fffconvert.tasks import Task
from fffconvert.tree import TreeShape

TREE = TreeShape(depth=2, leaf_width=3, linear=False)


def heads_of(model_type: str) -> list[str]:
    """The Auto classes that know a family."""
    config = getattr(transformers, FAMILIES[model_type].config_class)
    return [
        name
        for name, auto_class in vars(modeling_auto).items()
        if name.startswith("AutoModel") and config in (getattr(auto_class, "_model_mapping", None) or ())
    ]


every_head = pytest.mark.parametrize(
    ("model_type", "auto_class"),
    [  # by default all of BERT's, and of each other family another one in turn
        pytest.param(
            family,
            head,
            marks=[] if family == "bert" or head == heads[number % len(heads)] else pytest.mark.slow,
        )
        for number, (family, heads) in enumerate((family, heads_of(family)) for family in TINY)
        for head in heads
    ],
)
every_family = pytest.mark.parametrize("model_type", TINY)


def unfitted(dense: PreTrainedModel) -> PreTrainedModel:
    """The converted counterpart with random trees, where what they hold does not matter."""
    family = family_of(dense.config)
    return untrained_student(dense, family, family.shape_for(dense.config, TREE))


@pytest.fixture
def student(classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return converted(classifier, tokenizer, TREE)


@torch.no_grad()
def outputs_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in model(**batch).items() if isinstance(value, Tensor)}


def assert_same_model(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    """Bitwise."""
    assert type(ours) is type(theirs)
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


# ---- Saved and loaded


@every_head
def test_saved_and_loaded_by_the_stock_auto_class_is_bitwise_equal(
    model_type: str, auto_class: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    dense = tiny_model(model_type, auto_class)
    model = unfitted(dense)
    assert isinstance(model, type(dense))
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, auto_class).from_pretrained(tmp_path)
    assert not loaded.training
    assert_same_model(model, loaded)
    batch = batch_of(tokenizer, 4)
    if auto_class == "AutoModelForMultipleChoice":
        batch = {name: tensor[None] for name, tensor in batch.items()}
    # copied, because a weight that lies in a file at an odd address may be summed in another order
    ours, theirs = outputs_of(model, batch), outputs_of(copy.deepcopy(loaded), batch)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert all(torch.isfinite(tensor).all() for tensor in ours.values())


@every_family
def test_the_usual_heads_are_known(model_type: str) -> None:
    usual = {"SequenceClassification", "TokenClassification", "MaskedLM"}
    if model_type not in ("nomic_bert", "eurobert"):  # whose dense models have none
        usual.add("QuestionAnswering")
    assert {"AutoModel", *(f"AutoModelFor{head}" for head in usual)} <= set(heads_of(model_type))


def test_a_decoder_generates_as_it_did(tokenizer: PreTrainedTokenizerFast) -> None:
    dense = BertLMHeadModel(tiny_config(is_decoder=True, bos_token_id=2, eos_token_id=3)).eval()
    dense.generation_config.max_new_tokens = 7
    student = converted(dense, tokenizer, TREE)
    assert student.generation_config.max_new_tokens == 7
    assert student.generation_config is not dense.generation_config


def test_saved_again_is_the_same(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder_of: Callable[..., str]
) -> None:
    first = folder_of(student, "first")
    second = folder_of(AutoModelForSequenceClassification.from_pretrained(first), "second")
    for name in ("model.safetensors", "config.json"):
        assert Path(second, name).read_bytes() == Path(first, name).read_bytes()


def test_config_holds_what_the_dense_one_held_and_the_tree(
    student: PreTrainedModel, classifier: BertForSequenceClassification, folder_of: Callable[..., str]
) -> None:
    saved = json.loads(Path(folder_of(student), "config.json").read_text())
    assert saved["model_type"] == "fff-bert"
    assert saved["architectures"] == ["FFFBertForSequenceClassification"]
    assert saved["fff"] == TREE.to_dict()
    ours, theirs = student.config.to_dict(), classifier.config.to_dict()
    assert {key for key in theirs if ours.get(key) != theirs[key]} <= {"model_type", "architectures", "dtype"}


def test_shards(student: PreTrainedModel, tmp_path: Path) -> None:
    student.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same_model(student, AutoModelForSequenceClassification.from_pretrained(tmp_path))


def test_head_can_be_changed_by_loading(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder_of: Callable[..., str]
) -> None:
    encoder = transformers.AutoModel.from_pretrained(folder_of(student))
    assert type(encoder) is modeling.FFFBertModel
    batch = batch_of(tokenizer, 4)
    assert torch.equal(
        outputs_of(encoder, batch)["last_hidden_state"],
        outputs_of(student.bert, batch)["last_hidden_state"],
    )


def test_weights_that_a_file_lacks_are_drawn_anew(student: PreTrainedModel, tmp_path: Path) -> None:
    """As stock `transformers` does for a dense model, which it says in its report of what was loaded."""
    weights = student.state_dict()
    lacking = "bert.encoder.layer.1.intermediate.leaf_in_weight"
    student.save_pretrained(tmp_path, state_dict={k: v for k, v in weights.items() if k != lacking})
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {lacking}
    drawn = loaded.state_dict()
    assert 0 < drawn[lacking].std() < 1
    assert drawn[lacking].abs().max() <= 16**-0.5  # as `FFF.reset_parameters` draws them
    assert all(torch.equal(tensor, weights[name]) for name, tensor in drawn.items() if name != lacking)


@pytest.mark.parametrize("fff", [None, "deep", {"depth": 2}, {"depth": 2, "leaf_width": 1, "roots": 3}])
def test_config_without_a_shape_is_refused(fff: object) -> None:
    config = tiny_config()
    broken = config_with(config, config_class(FAMILIES["bert"]), fff=fff)
    with pytest.raises(UserError, match=r"config\.json: `fff` does not hold the shape of a tree"):
        shape_of(broken)
    with pytest.raises(UserError, match="does not hold the shape of a tree"):
        AutoModelForSequenceClassification.from_config(broken)


def test_what_a_configuration_says(
    student: PreTrainedModel, classifier: BertForSequenceClassification
) -> None:
    assert is_converted(student.config)
    assert not is_converted(classifier.config)
    assert family_of(student.config) is FAMILIES["bert"]
    assert shape_of(student.config) == TREE
    assert dense_neurons(student.config) == dense_neurons(classifier.config) == 32
    assert dense_class_of(type(student)) is BertForSequenceClassification
    assert model_class(BertForSequenceClassification) is type(student)


@pytest.mark.parametrize("given", ["a-name", None, Loaded])
def test_what_is_no_model_is_refused(
    given: Any, student: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model: Any = Loaded("student", student, tokenizer) if given is Loaded else given
    rows = tokenized_texts(sentences(4), tokenizer).add_column("labels", [0, 1] * 2)
    task = Task("own", ("text",), ("bad", "good"))
    asked: list[Callable[[], object]] = [
        lambda: fffconvert.convert(model, tokenizer, sentences(4)),
        lambda: fffconvert.finetune(model, tokenizer, rows),
        lambda: fffconvert.distill(model, model, tokenizer, rows),
        lambda: fffconvert.evaluate(model, tokenizer, task, {"own": rows}),
        lambda: fffconvert.quantize(model),
        lambda: fffconvert.benchmark(model),
        lambda: fffconvert.export_onnx(model, tmp_path / "model.onnx"),
    ]
    for ask in asked:
        with pytest.raises(
            UserError, match=r"is no model of transformers; expected one, such as `load\(name"
        ):
            ask()
    if given is not Loaded:
        with pytest.raises(UserError, match="is nothing to save; expected what `load` gives"):
            fffconvert.save(model, tmp_path / "out")


def test_rows_that_no_model_reads_are_refused(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts: Any = Dataset.from_dict({"text": sentences(4), "labels": [0, 1] * 2})
    dense, task = tiny_model("bert"), Task("own", ("text",), ("bad", "good"))
    asked: list[Callable[[Any], object]] = [
        lambda rows: fffconvert.finetune(dense, tokenizer, rows),
        lambda rows: fffconvert.distill(student, dense, tokenizer, rows),
        lambda rows: fffconvert.evaluate(dense, tokenizer, task, {"own": rows}),
    ]
    for rows in (texts, texts.to_iterable_dataset()):
        for ask in asked:
            with pytest.raises(UserError, match="expected a Dataset of tokenized ones, such as"):
                ask(rows)


def test_class_of_an_unknown_family_is_refused() -> None:
    with pytest.raises(UserError, match="model type 'gpt2' is not supported"):
        model_class(transformers.GPT2LMHeadModel)


# ---- Used


@every_family
def test_pipelines(
    model_type: str, tokenizer: PreTrainedTokenizerFast, folder_of: Callable[..., str]
) -> None:
    dense = tiny_model(model_type, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    model = unfitted(dense)
    folder = folder_of(model)
    text = "the film is very good"
    encoded = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        logits = model(**encoded).logits[0]
        states = getattr(model, model.base_model_prefix)(**encoded).last_hidden_state[0]
    (found,) = pipeline("text-classification", folder, device="cpu")(text)
    assert found["label"] == ("bad", "good")[int(logits.argmax())]
    assert found["score"] == pytest.approx(float(logits.softmax(-1).max()), rel=1e-5)
    features = pipeline("feature-extraction", folder, device="cpu")(text)
    torch.testing.assert_close(torch.tensor(features[0]), states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    dtype: torch.dtype,
    folder_of: Callable[..., str],
) -> None:
    batch = batch_of(tokenizer, 4)
    expected = outputs_of(student, batch)["logits"]
    changed = copy.deepcopy(student).to(dtype)
    logits = outputs_of(changed, batch)["logits"]
    assert logits.dtype == dtype
    tolerance = {torch.float64: 1e-4, torch.float16: 0.05}.get(dtype, 0.3)
    # a token close to a hyperplane may take the other way in few bits, so this is of the whole batch
    assert (logits.float() - expected).norm() < tolerance * expected.norm()
    loaded = AutoModelForSequenceClassification.from_pretrained(folder_of(changed))
    assert loaded.dtype == dtype
    assert_same_model(changed, loaded)


def test_deepcopy_and_pickle(student: PreTrainedModel) -> None:
    for twin in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert_same_model(student, twin)
        with torch.no_grad():
            twin.bert.encoder.layer[0].intermediate.leaf_in_weight.zero_()
        assert student.bert.encoder.layer[0].intermediate.leaf_in_weight.abs().sum() > 0


def test_trainer(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str], tmp_path: Path
) -> None:
    labels = [int("good" in text) for text in texts]
    rows: Dataset = tokenized_texts(texts, tokenizer).add_column("labels", labels)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(student, arguments, train_dataset=rows, processing_class=tokenizer)
    assert trainer.train().training_loss > 0
    after = student.state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    leaves = {f"bert.encoder.layer.{i}.intermediate.leaf_{n}_weight" for i in (0, 1) for n in ("in", "out")}
    assert leaves <= moved
    assert not any("router" in name for name in moved)  # a hard choice passes no gradient
    assert_same_model(
        student, AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2").train()
    )


def test_compiled_without_graph_breaks(student: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    batch = batch_of(tokenizer, 4)
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")  # inductor would only add C++
    with torch.inference_mode():  # as it is timed
        torch.testing.assert_close(
            outputs_of(compiled, batch)["logits"], outputs_of(student, batch)["logits"]
        )


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing")  # the name that follows
def test_gradients_with_checkpointing_are_those_without(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = {**batch_of(tokenizer, 4), "labels": torch.tensor([0, 1, 0, 1])}
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    gradients = []
    for enable in (student.gradient_checkpointing_disable, student.gradient_checkpointing_enable):
        enable()
        student.train().zero_grad()
        student(**batch).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("leaf_in_weight" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}"
        )


@every_family
def test_attention_implementations_agree(
    model_type: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    dense = tiny_model(model_type)
    if not dense._supports_sdpa:
        pytest.skip(f"{model_type} has its own attention only")
    unfitted(dense).save_pretrained(tmp_path)
    batch = batch_of(tokenizer, 4)
    logits = []
    for name in ("eager", "sdpa"):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation=name)
        assert model.config._attn_implementation == name
        logits.append(outputs_of(model, batch)["logits"])
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_every_layer_has_a_tree_of_its_own(student: PreTrainedModel) -> None:
    trees = [module for module in student.modules() if isinstance(module, FFF)]
    assert len(trees) == 2
    assert not torch.equal(trees[0].leaf_in_weight, trees[1].leaf_in_weight)


# ---- Imported in any order

ORDERS = r"""
import os, sys
# slow, and the same for all: each order is tried in a fork of its own
import scipy.optimize, torch, torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor

assert "transformers" not in sys.modules
orders = sys.argv[2:]
for order in orders:
    if not os.fork():
        exec(order)
        from transformers import AutoConfig, AutoModelForSequenceClassification
        config = AutoConfig.from_pretrained(sys.argv[1])
        model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
        line = f"{order}: {type(config).__name__}: {type(model).__name__}\n"
        os.write(1, line.encode())  # in one piece, which `print` is not where Python does not buffer
        os._exit(0)
for _ in orders:
    os.wait()
"""


@pytest.mark.slow
def test_known_whatever_is_imported_first(student: PreTrainedModel, folder_of: Callable[..., str]) -> None:
    folder = folder_of(student)
    Path(folder, "model.pickle").write_bytes(pickle.dumps(student))
    orders = (
        "import fffconvert",
        "import fffconvert.modeling",
        "from fffconvert.families import FAMILIES",  # imports `transformers` while it is not whole itself
        "from transformers import AutoModel; import fffconvert",
        "import fffconvert; from transformers import BertModel",  # imports the Auto classes halfway
        "import fffconvert; from transformers import AutoModelForSequenceClassification",
        "import pickle; pickle.load(open(sys.argv[1] + '/model.pickle', 'rb'))",
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(fffconvert.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", ORDERS, folder, *orders],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    expected = [f"{order}: FFFBertConfig: FFFBertForSequenceClassification" for order in orders]
    assert sorted(done.stdout.splitlines()) == sorted(expected), done.stderr


def test_every_configuration_is_known() -> None:
    for model_type, family in FAMILIES.items():
        assert AutoConfig.for_model(f"fff-{model_type}", fff=TREE.to_dict()).fff == TREE.to_dict()
        assert config_class(family).model_type == f"fff-{model_type}"
