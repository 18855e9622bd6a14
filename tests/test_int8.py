from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from fffconvert import latency
from fffconvert.cli import main
from fffconvert.conversion import convert
from fffconvert.distillation import distill
from fffconvert.errors import UserError
from fffconvert.families import FAMILIES, count_ffns, layers_of
from fffconvert.fff import FFF
from fffconvert.int8 import LARGEST, Int8Linear, int8_linear
from fffconvert.kernels import FFFWeights
from fffconvert.modeling import config_class, config_with, model_class
from fffconvert.quantization import quantize
from fffconvert.tree import TreeShape

TREE = TreeShape(depth=2, leaf_width=3)
IDS = torch.tensor([[2, 7, 9, 11, 3], [2, 20, 6, 3, 0]])


@pytest.fixture
def student(classifier, tokenizer, texts):
    return convert(classifier, tokenizer, texts, TREE, calibration_tokens=500).model


def bound(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The most that rounding can move each output: half a step of each input and each weight."""
    low, high = x.amin().clamp_max(0), x.amax().clamp_min(0)
    step_x = (high - low) / 255
    step_w = linear.weight.abs().amax(1) / LARGEST  # (n_out,)
    # the step of the inputs is moved so that 0 has a number of its own: an input can be out by a whole step
    from_inputs = step_x * linear.weight.abs().sum(1)
    from_weights = step_w / 2 * (x.abs().sum(-1, keepdim=True) + step_x * linear.in_features)
    return from_inputs + from_weights + 1e-4 * (1 + linear(x).abs())


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 9),
    n_in=st.integers(1, 70),
    n_out=st.integers(1, 40),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_an_output_is_as_close_as_rounding_allows(n, n_in, n_out, bias, seed):
    torch.manual_seed(seed)
    linear, x = nn.Linear(n_in, n_out, bias=bias), torch.randn(n, n_in) * 3
    with torch.no_grad():
        error = (Int8Linear.from_linear(linear).eval()(x) - linear(x)).abs()
        assert (error <= bound(linear, x)).all()


def test_the_largest_sums_do_not_saturate():
    """Pairs of products are added in 16 bits where there is no VNNI: the reason for 7-bit weights."""
    linear = nn.Linear(64, 4, bias=False)
    with torch.no_grad():
        linear.weight.fill_(1.0)
        made = Int8Linear.from_linear(linear).eval()
        torch.testing.assert_close(made(torch.full((2, 64), 5.0)), torch.full((2, 4), 320.0))
    assert made.weight.abs().max() == 63, "with VNNI, 127 would do as well"


def test_a_row_of_zeros_is_no_division_by_zero():
    linear = nn.Linear(8, 2)
    with torch.no_grad():
        linear.weight[0] = 0
        made = Int8Linear.from_linear(linear).eval()
        assert torch.equal(made(torch.randn(3, 8))[:, 0], linear.bias[0].expand(3))
    assert (made.scale > 0).all()


def test_new_weights_replace_those_that_were_packed():
    first, second = (Int8Linear.from_linear(nn.Linear(8, 4)).eval() for _ in range(2))
    x = torch.randn(3, 8)
    with torch.no_grad():
        assert not torch.equal(first(x), second(x))
        first.load_state_dict(second.state_dict())
        assert torch.equal(first(x), second(x))
        assert torch.equal(deepcopy(second)(x), second(x))


def test_the_operator_is_one_that_pytorch_can_trace():
    layer = Int8Linear.from_linear(nn.Linear(8, 4))
    tensors = (torch.randn(2, 3, 8), layer.weight, layer.scale, layer.bias)
    torch.library.opcheck(int8_linear, tensors, test_utils=("test_schema", "test_faketensor"))


def test_only_projections_and_trees_are_quantized(student):
    quantized = quantize(student)
    kinds = {name for name, module in quantized.named_modules() if isinstance(module, Int8Linear)}
    attention = (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
    )
    assert kinds == {f"bert.encoder.layer.{layer}.{name}" for layer in range(2) for name in attention}
    before, after = student.state_dict(), quantized.state_dict()
    for name in before.keys() & after.keys():
        of_a_tree = name.rsplit(".", 1)[1] in FFFWeights._fields
        expected = before[name].bfloat16() if of_a_tree else before[name]
        if name.removesuffix(".weight") in kinds:
            assert after[name].dtype == torch.int8
        else:
            assert after[name].dtype == expected.dtype
            assert torch.equal(expected, after[name])
    assert not any(isinstance(module, Int8Linear) for module in student.modules())
    assert not student.config.int8_projections


def test_a_quantized_model_stays_close_to_the_float32_one(student, classifier, tokenizer, texts):
    one_leaf = convert(classifier, tokenizer, texts, TreeShape(0, 3), calibration_tokens=500).model
    # 7-bit weights round by 1/126 of the largest, which is some 3 times the typical: 2% of a product
    for ours, theirs in hidden_states(one_leaf):
        assert (ours - theirs).norm() / theirs.norm() < 0.1
    for ours, theirs in hidden_states(student):  # a few tokens take another path, and differ by more
        assert ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median() < 0.1


@torch.no_grad()
def hidden_states(model):
    """What each layer gives, rounded and exact."""
    rounded, exact = (m(input_ids=IDS, output_hidden_states=True) for m in (quantize(model), model))
    return zip(rounded.hidden_states[1:], exact.hidden_states[1:], strict=True)


def test_saved_and_loaded_by_the_auto_classes_it_is_the_same(student, folder_of):
    quantized = quantize(student)
    folder = folder_of(quantized, "int8")
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert loaded.config.int8_projections
    assert {w.dtype for m in loaded.modules() if isinstance(m, FFF) for w in m.weights} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, quantized(input_ids=IDS).logits)
        again = AutoModelForMaskedLM.from_pretrained(folder)  # another head on the same encoder
        assert again(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_every_family_saves_and_loads(family, tmp_path):
    torch.manual_seed(0)
    config = tiny_config(family.model_type)
    cls = model_class(transformers.AutoModelForTokenClassification._model_mapping[type(config)])
    float_model = cls(config_with(config, config_class(family), fff=TREE.to_dict()))
    n_linear = sum(isinstance(m, nn.Linear) for x in layers_of(float_model, family) for m in x.modules())
    assert n_linear >= 2 * count_ffns(config, family)
    quantized = quantize(float_model)
    quantized.save_pretrained(tmp_path / "int8")
    loaded = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "int8")
    assert sum(isinstance(module, Int8Linear) for module in loaded.modules()) == n_linear
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, quantized(input_ids=IDS).logits)


def test_torch_compile_traces_through_without_a_break(student):
    quantized = quantize(student)
    with torch.no_grad():
        expected = quantized(input_ids=IDS).logits
        compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(input_ids=IDS).logits, expected)


def test_training_is_refused(student, classifier, tokenizer):
    quantized = quantize(student)
    with pytest.raises(UserError, match="cannot be trained"):
        quantized.train()(input_ids=IDS)
    loss = quantized.eval()(input_ids=IDS, labels=torch.tensor([0, 1])).loss
    with pytest.raises(RuntimeError, match="int8_linear"):
        loss.backward()
    with pytest.raises(UserError, match="int8"):
        distill(quantized, classifier, tokenizer, None)


def test_other_dtypes_are_refused(student):
    with pytest.raises(UserError, match="float32 on a CPU"), torch.no_grad():
        quantize(student).half()(input_ids=IDS)
    with pytest.raises(UserError, match="made from float32"):
        quantize(student.to(torch.bfloat16))


def test_what_cannot_be_quantized_is_refused(student, classifier):
    with pytest.raises(UserError, match="dense"):
        quantize(classifier)
    with pytest.raises(UserError, match="already"):
        quantize(quantize(student))
    with torch.no_grad():
        student.bert.encoder.layer[0].attention.self.query.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="finite"):
        quantize(student)


def test_the_command_writes_the_model_and_says_what_it_loses_and_gains(
    student, folder_of, tmp_path, monkeypatch
):
    monkeypatch.setattr(latency, "time_in_turn", lambda runs, _: [[1.0 + n] for n, _ in enumerate(runs)])
    output, folder = tmp_path / "int8", Path(folder_of(student.bfloat16()))
    scores = {"task": "sst2", "metric": "accuracy", "metrics": {"validation": {"accuracy": 0.9123}}}
    float32 = {"scores": scores, "latency": {"rows": []}, "table": [], "layers": []}
    (folder / "report.json").write_text(json.dumps(float32))
    result = CliRunner().invoke(main, ["quantize", str(folder), str(output)])
    assert result.exit_code == 0, result.output
    assert set(json.loads((output / "report.json").read_text())) == {"layers", "int8", "versions"}
    card = (output / "README.md").read_text()
    assert "0.9123" not in card, "what was measured of the float32 model is not said of this one"
    assert "stored in int8" in card
    assert "recipe.yaml" not in card
    assert "int8 moves the last hidden states by" in result.output
    report = json.loads((output / "report.json").read_text())["int8"]
    assert 0 < report["error"] < 0.1
    assert "converted int8" in report["latency"]["rows"][0]["medians"]
    assert AutoModelForSequenceClassification.from_pretrained(output).config.int8_projections
    again = CliRunner().invoke(main, ["quantize", str(output), str(tmp_path / "again")])
    assert again.exit_code == 1
    assert "int8 already" in again.output
    assert not (tmp_path / "again").exists()


def test_convert_makes_int8_when_asked(classifier, folder_of, tmp_path, texts, monkeypatch):
    monkeypatch.setattr(latency, "time_in_turn", lambda runs, _: [[1.0 + n] for n, _ in enumerate(runs)])
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    tree = ["--depth", "2", "--leaf-width", "3", "--calibration", str(tmp_path / "texts.txt")]
    output = str(tmp_path / "int8")
    result = CliRunner().invoke(main, ["convert", folder_of(classifier), output, "--int8", *tree])
    assert result.exit_code == 0, result.output
    loaded = AutoModelForSequenceClassification.from_pretrained(output)
    assert sum(isinstance(module, Int8Linear) for module in loaded.modules()) == 8


def test_a_quantized_model_runs_where_gradients_are_on(classifier, tokenizer):
    student = convert(classifier, tokenizer, ["good film"] * 20, TreeShape(1, 1)).model
    assert torch.is_grad_enabled()
    assert quantize(student)(torch.tensor([[2, 7, 3]])).logits.isfinite().all()


def test_a_model_in_int8_is_traced_and_making_it_draws_nothing(student):
    before = torch.get_rng_state()
    model = quantize(student)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        traced = torch.jit.trace(model, IDS, strict=False)
        assert torch.equal(traced(IDS)["logits"], model(IDS).logits)
