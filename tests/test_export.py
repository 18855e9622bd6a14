"""ONNX: what ONNX Runtime computes is what PyTorch computes."""

from __future__ import annotations

import sys

import pytest
import torch
from click.testing import CliRunner

from fffconvert import TreeShape
from fffconvert.cli import main
from fffconvert.export import FEW_TOKENS, blocks, export_onnx, leaves_in_blocks
from fffconvert.families import FAMILIES
from fffconvert.fff import FFF
from fffconvert.kernels import reference
from fffconvert.modeling import config_class, config_with, model_class

TOLERANCE = 1e-4
SHAPES = [
    TreeShape(0, 3),
    TreeShape(3, 2),
    TreeShape(2, 0),
    TreeShape(2, 3, trunk=2, trees=2, emitting=True),
]


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
    torch.testing.assert_close(leaves_in_blocks(x, leaf, layer.weights, 0, "gelu"), expected)
    assert torch.equal(
        reference.fff_forward(x, layer.weights, "gelu"),
        reference.fff_forward(x, layer.weights, "gelu", reference.leaves_forward),
    )


def test_onnx_runtime_gives_what_pytorch_gives(classifier, folder_of, tmp_path):
    ort = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    shape = TreeShape(depth=3, leaf_width=3, trunk=2)
    config = config_with(classifier.config, config_class(FAMILIES["bert"]), fff=shape.to_dict())
    torch.manual_seed(0)
    model = model_class(type(classifier))(config).eval()
    output = tmp_path / "onnx"
    done = CliRunner().invoke(main, ["export", folder_of(model), str(output), "--format", "onnx"])
    assert done.exit_code == 0, done.output
    assert {"model.onnx", "config.json", "tokenizer.json"} <= {p.name for p in output.iterdir()}
    graph = onnx.load(output / "model.onnx").graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}  # standard operators
    session = ort.InferenceSession(output / "model.onnx")
    for batch, length in ((1, 1), (3, 5), (8, 40)):  # the last has many tokens, and so another way
        ids = torch.randint(5, 60, (batch, length))
        mask = torch.ones_like(ids)
        mask[-1, length // 2 + 1 :] = 0
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        (logits,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
        with torch.no_grad():
            expected = model(**inputs).logits
        assert (torch.tensor(logits) - expected).abs().max() < TOLERANCE
    assert FEW_TOKENS < 8 * 40


def test_a_missing_extra_is_told_in_one_line(classifier, tmp_path, monkeypatch):
    from fffconvert import UserError

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"fffconvert\[onnx\]"):
        export_onnx(classifier, tmp_path / "model.onnx")
