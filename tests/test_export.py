"""ONNX: what ONNX Runtime computes is what PyTorch computes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import tiny_config
from torch import Tensor
from transformers import BertForMultipleChoice, BertForSequenceClassification, PreTrainedModel

from fffconvert import TreeShape, UserError, onnx_runtime
from fffconvert.cli import main
from fffconvert.export import FEW_TOKENS, block_ffn, blocks, export_onnx, leaves_in_blocks
from fffconvert.families import FAMILIES
from fffconvert.fff import FFF
from fffconvert.kernels import reference
from fffconvert.modeling import config_class, config_with, heads_of, model_class
from fffconvert.quantization import quantize
from fffconvert.tree import GatedTreeShape

TOLERANCE = 1e-4
SHAPES = [
    TreeShape(0, 3),
    TreeShape(3, 2),
    TreeShape(2, 0),
    TreeShape(2, 3, trunk=2, trees=2, emitting=True),
    GatedTreeShape(3, 2),
]
SIZES = ((1, 1), (3, 5), (8, 40))  # batch and length; the last has many tokens, and so another way


def converted(model_type: str) -> PreTrainedModel:
    """A converted classifier of a family: one layer of random weights."""
    family = FAMILIES[model_type]
    config = tiny_config(model_type, initializer_range=0.5, num_hidden_layers=1)
    shape = family.shape_for(config, TreeShape(depth=3, leaf_width=3, trunk=2, linear=False))
    heads = {auto.__name__: dense for auto, dense in heads_of(family)}
    head = heads.get("AutoModelForSequenceClassification") or heads["AutoModel"]
    torch.manual_seed(0)
    return model_class(head)(config_with(config, config_class(family), fff=shape.to_dict())).eval()


def gap(model: PreTrainedModel, file: Path, batch: int, length: int) -> float:
    """How far a graph's first output is from its model's, on token ids and a mask."""
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    ids = torch.randint(5, 60, (batch, length))
    mask = torch.ones_like(ids)
    mask[-1, length // 2 + 1 :] = 0
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    inputs = {each.name: given[each.name] for each in session.get_inputs()}
    (found, *_) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        expected: Tensor = model(**inputs)[0]
    return float((torch.tensor(found) - expected).abs().max())


@pytest.mark.parametrize("n_tokens", [1, 7, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_are_the_reference(shape, n_tokens):
    torch.manual_seed(0)
    layer = FFF(shape, 8, "gelu").requires_grad_(False)
    x = torch.randn(n_tokens, 8)
    leaf = reference.route(x, layer.weights)
    expected = reference.leaves_forward(x, leaf, layer.weights, 0, "gelu")
    tables = [t[0] for t in layer.weights[3:7]]
    torch.testing.assert_close(blocks(x, leaf, tables, "gelu"), expected)
    torch.testing.assert_close(block_ffn(x[:, None], leaf, tables, "gelu")[:, 0], expected)
    torch.testing.assert_close(leaves_in_blocks(x, leaf, layer.weights, 0, "gelu"), expected)


def test_a_block_runs_its_leaf_with_its_gates():
    torch.manual_seed(0)
    layer = FFF(GatedTreeShape(2, 3), 8, "gelu").requires_grad_(False)
    tables = [t[0] for t in layer.weights[3:7]]
    assert len(tables[0][0]) == 2 * len(tables[2][0]), "rows of neurons, then as many of gates"
    x, leaf = torch.randn(3, 5, 8), torch.tensor([2, 0, 2])
    found = block_ffn(x, leaf, tables, "gelu")
    for block, number, given in zip(x, leaf, found, strict=True):
        in_weight, in_bias, out_weight, out_bias = (table[number] for table in tables)
        expected = reference.dense_ffn(block, in_weight, in_bias, out_weight, "gelu") + out_bias
        torch.testing.assert_close(given, expected)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory) -> tuple[PreTrainedModel, PreTrainedModel, Path, dict[str, str]]:
    """A dense and a converted BERT, the folder of what ONNX Runtime runs of them, and what is absent."""
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    transformers.set_seed(0)
    dense = BertForSequenceClassification(tiny_config(num_hidden_layers=1, initializer_range=0.5)).eval()
    model, folder = converted("bert"), tmp_path_factory.mktemp("graphs")
    _, absent = onnx_runtime.prepare(dense, model, torch.randint(5, 60, (2, 6)), folder)
    return dense, model, folder, absent


@pytest.mark.slow
@pytest.mark.xdist_group("graphs")
def test_the_benchmark_times_both_models_as_they_are(graphs):
    dense, model, folder, absent = graphs
    assert absent == {}
    ids = torch.randint(5, 60, (3, 9))  # another batch and length than they were tried on
    exact, rounded, ours = (
        torch.tensor(onnx_runtime.runner(folder, name, ids, 1)()[0]) for name in onnx_runtime.NAMES
    )
    with torch.no_grad():
        expected = dense(input_ids=ids).logits
        torch.testing.assert_close(ours, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-4)
    assert (rounded - expected).norm() / expected.norm() < 0.5  # int8 of tiny random weights is coarse


@pytest.mark.slow
@pytest.mark.xdist_group("graphs")
@pytest.mark.parametrize("name", ["ONNX-Runtime", "converted-ONNX-Runtime"])
def test_onnx_runtime_recognizes_attention_in_what_is_timed(graphs, name):
    import onnx

    dense, model, folder, _ = graphs
    operators = [node.op_type for node in onnx.load(folder / f"{name}.onnx").graph.node]
    assert operators.count("Attention") == dense.config.num_hidden_layers
    assert onnx_runtime.UNMASKED not in (dense.config._attn_implementation, model.config._attn_implementation)


@pytest.mark.slow
@pytest.mark.xdist_group("graphs")
def test_a_graph_of_standard_operators_gives_what_pytorch_gives(graphs):
    import onnx

    _, model, folder, _ = graphs
    file = folder / "converted-ONNX-Runtime.plain.onnx"
    assert {node.domain for node in onnx.load(file).graph.node} <= {"", "ai.onnx"}
    assert max(gap(model, file, *size) for size in SIZES) < TOLERANCE
    assert FEW_TOKENS < 8 * 40


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type",
    [
        "bert",
        "roberta",
        "distilbert",
        "electra",
        "mpnet",
        "albert",
        "deberta",
        "deberta-v2",
        "ernie",
        "modernbert",
        "nomic_bert",
        "eurobert",
    ],
)
def test_a_family_in_onnx_runtime(model_type, tmp_path, capfd):
    model = converted(model_type)
    for module in model.modules():
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 4  # which must not fix the length
    export_onnx(model, tmp_path / "model.onnx")
    for module in model.modules():
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 0  # else it reads multiples alone
    assert max(gap(model, tmp_path / "model.onnx", *size) for size in SIZES) < TOLERANCE
    assert "torchvision" not in capfd.readouterr().err, "the exporter's remarks are no news to a user"


def test_the_command_writes_configuration_and_tokenizer_too(classifier, folder_of, tmp_path, monkeypatch):
    monkeypatch.setattr("fffconvert.export.export_onnx", lambda model, file: file.write_bytes(b"a graph"))
    output = tmp_path / "onnx"
    done = CliRunner().invoke(main, ["export", folder_of(classifier), str(output), "--format", "onnx"])
    assert done.exit_code == 0, done.output
    assert {"model.onnx", "config.json", "tokenizer.json"} <= {p.name for p in output.iterdir()}


def test_a_missing_extra_is_told_in_one_line(classifier, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"fffconvert\[onnx\]"):
        export_onnx(classifier, tmp_path / "model.onnx")


def test_an_int8_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="export the model that it was made from"):
        export_onnx(quantize(converted("bert")), tmp_path / "model.onnx")


def test_what_has_no_graph_is_one_line(classifier, tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise torch.onnx.OnnxExporterError("no such operator")

    monkeypatch.setitem(sys.modules, "onnxscript", sys)  # whether it is there or not
    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(UserError, match=r"could not be exported \(no such operator\)"):
        export_onnx(classifier, tmp_path / "model.onnx")
    with pytest.raises(UserError, match="chooses among several texts has no graph"):
        export_onnx(BertForMultipleChoice(classifier.config), tmp_path / "model.onnx")


def test_a_model_in_half_precision_has_no_graph_to_time(tmp_path):
    model = converted("bert").bfloat16()
    found, absent = onnx_runtime.prepare(model, model, torch.ones(1, 4, dtype=torch.long), tmp_path)
    assert found == []
    assert all("this model is torch.bfloat16" in reason for reason in absent.values())
