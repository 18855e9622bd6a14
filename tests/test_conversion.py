"""A dense model in, a converted one out: determinism, what is left alone, and the fit that is reported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sentences, tiny_config, tiny_model
from torch import Tensor
from transformers import (
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

from fffconvert import conversion
from fffconvert.calibration import calibrate
from fffconvert.conversion import HELD_OUT, Conversion, convert
from fffconvert.errors import UserError
from fffconvert.families import FAMILIES, ffn_starts_of, read_ffns
from fffconvert.fff import FFF
from fffconvert.fit import fit_layer
from fffconvert.recipe import Init
from fffconvert.tree import REMOVED, TreeShape

TREE = TreeShape(depth=2, leaf_width=3)


def converted(
    model: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    init: Init = "inputs",
    seed: int = 0,
    shape: TreeShape = TREE,
) -> Conversion:
    return convert(model, tokenizer, sentences(60), shape, init, calibration_tokens=300, seed=seed)


def state_of(conversion: Conversion) -> dict[str, Tensor]:
    return conversion.model.state_dict()


@pytest.mark.parametrize("init", ["inputs", "neurons", "random"])
def test_seed_decides(
    init: Init, classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    first = converted(classifier, tokenizer, init, seed=1)
    torch.rand(3)  # the global generator must not matter
    again, other = (converted(classifier, tokenizer, init, seed) for seed in (1, 2))
    assert all(torch.equal(tensor, state_of(again)[name]) for name, tensor in state_of(first).items())
    assert first.layers == again.layers
    assert any(not torch.equal(tensor, state_of(other)[name]) for name, tensor in state_of(first).items())


def test_all_but_the_ffns_is_the_dense_models(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    state = state_of(converted(classifier, tokenizer))
    shared = before.keys() & state.keys()
    gone = {name for name in before if ".intermediate.dense." in name or ".output.dense." in name}
    assert shared == {name for name in before if name not in gone or "attention" in name}
    assert all(torch.equal(state[name], before[name]) for name in shared)
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())
    assert all(state[name].data_ptr() != classifier.state_dict()[name].data_ptr() for name in shared)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtype_is_kept(
    dtype: torch.dtype, classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = converted(classifier.to(dtype), tokenizer).model
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_converted_in_float32_on_a_cpu(
    dtype: torch.dtype,
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    half = deepcopy(classifier).to(dtype)
    made = converted(half, tokenizer)
    expected = converted(deepcopy(half).float(), tokenizer)
    assert made.layers == expected.layers
    assert {tensor.dtype for tensor in half.state_dict().values()} == {dtype}, "left as it was"
    for name, tensor in state_of(expected).items():
        assert torch.equal(tensor.to(dtype), state_of(made)[name])
    made.model.save_pretrained(tmp_path)
    assert f"torch.{json.loads((tmp_path / 'config.json').read_text())['dtype']}" == str(dtype)


def test_converted_model_is_refused(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match="the model is converted already; expected a dense model"):
        convert(converted(classifier, tokenizer).model, tokenizer, sentences(5))  # type: ignore[arg-type]


def test_fit_is_what_the_layer_does_on_held_out_tokens(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A layer is to give what the dense one gives, and to make good what layers below it got wrong."""
    made = converted(classifier, tokenizer, seed=3)
    calibration = calibrate(classifier, tokenizer, sentences(60), 300, seed=3)
    ffns = read_ffns(classifier, FAMILIES["bert"])
    places = ffn_starts_of(made.model, FAMILIES["bert"])
    forward_pass = calibration.read_by(made.model)
    ours_all = [forward_pass.inputs_of(place, "") for place in places]
    theirs_all = [inputs for inputs, _ in calibration.ffns()]
    assert torch.equal(ours_all[0], theirs_all[0])
    for number, (fit, ffn) in enumerate(zip(made.layers, ffns, strict=True)):
        theirs, ours = theirs_all[number], ours_all[number]
        target = (ffn(theirs) + theirs - ours)[: int(HELD_OUT * len(ours))]
        with torch.no_grad():
            squares = (places[number](ours[: len(target)]) - target).square().sum()
        assert fit.layer == number
        assert fit.error == pytest.approx(float(squares / (target - target.mean(0)).square().sum()), rel=1e-4)
        counts = torch.bincount(places[number].leaf_of(ours)[:, 0], minlength=4) / len(ours)
        assert fit.smallest_leaf == pytest.approx(float(counts.min()))
        assert fit.largest_leaf == pytest.approx(float(counts.max()))
        assert set(fit.to_dict()) == {"layer", "error", "smallest_leaf", "largest_leaf"}


@pytest.mark.parametrize(
    ("shape", "init", "counts"), [(TREE, "inputs", True), (REMOVED, "inputs", False), (TREE, "random", False)]
)
def test_a_linear_fit_knows_what_errors_cost(
    shape: TreeShape,
    init: Init,
    counts: bool,
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = []

    def fit(*args: Any) -> FFF:
        given.append(args[-1])
        return fit_layer(*args)

    monkeypatch.setattr(conversion, "fit_layer", fit)
    calibration = calibrate(classifier, tokenizer, sentences(60), 300)
    conversion.build(calibration, replace(shape, linear=shape == TREE), init)
    expected = calibration.sensitivities if counts else [None, None]
    assert all(ours is theirs for ours, theirs in zip(given, expected, strict=True))


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_a_layer_mends_what_layers_below_it_got_wrong_where_its_input_is_what_it_is_added_to(
    model_type: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[Tensor, Tensor]] = []

    def fit(ffn: Any, ours: Tensor, tree: Any, init: Any, seed: int, target: Tensor, sensitivity: Any) -> FFF:
        given.append((ours.clone(), target.clone()))
        return fit_layer(ffn, ours, tree, init, seed, target, sensitivity)

    monkeypatch.setattr(conversion, "fit_layer", fit)
    model, family = tiny_model(model_type), FAMILIES[model_type]
    calibration = calibrate(model, tokenizer, sentences(60), 300)
    conversion.build(calibration, family.with_gates(TREE), "inputs")
    for (ours, target), (theirs, outputs) in zip(given, calibration.ffns(), strict=True):
        assert len(ours) == len(theirs) - int(HELD_OUT * len(theirs)), "the rest is to judge the fit on"
        theirs, outputs = theirs[-len(ours) :], outputs[-len(ours) :]
        expected = outputs if family.pre_norm else outputs + theirs - ours
        torch.testing.assert_close(target, expected)
    assert not torch.equal(given[1][0], theirs), "the second layer reads what the first gives"


def test_what_wraps_a_model_is_refused_before_anything_is_read(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    def texts() -> Iterator[str]:
        raise AssertionError("nobody asks")
        yield ""

    with pytest.raises(UserError, match="OptimizedModule is no model of transformers; expected one, out of"):
        convert(torch.compile(classifier), tokenizer, texts())


def test_half_a_token_is_refused(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(
        UserError, match=r"calibration_tokens is 300.0; expected a whole number of at least 1"
    ):
        convert(classifier, tokenizer, sentences(60), TREE, calibration_tokens=3e2)  # type: ignore[arg-type]


def test_a_converted_model_names_its_own_class(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    classifier.config.architectures = ["BertForMaskedLM"]  # what it was made from
    made = converted(classifier, tokenizer).model
    assert made.config.architectures == [type(made).__name__]


def test_inference_mode_changes_nothing(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    tree = replace(TREE, linear=True)  # for which sensitivities are differentiated
    expected = converted(classifier, tokenizer, shape=tree).model.state_dict()
    with torch.inference_mode():
        made = converted(classifier, tokenizer, shape=tree).model.state_dict()
        own = BertForSequenceClassification(classifier.config)
    assert all(torch.equal(made[name], tensor) for name, tensor in expected.items())
    with pytest.raises(UserError, match=r"was made under torch.inference_mode\(\); expected one"):
        converted(own, tokenizer)


def test_what_pytorch_is_told_elsewhere_changes_nothing(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    def made() -> dict[str, Tensor]:
        return convert(
            classifier, tokenizer, texts, TreeShape(2, 3), calibration_tokens=300
        ).model.state_dict()

    expected, random = made(), torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        torch.set_default_dtype(torch.float64)
        try:
            found = made()
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_deberta_in_half_precision_stays_one(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("deberta").bfloat16()
    made = convert(model, tokenizer, sentences(60), TreeShape(2, 3), calibration_tokens=300).model
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}


def test_a_start_that_is_none_is_refused(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match="init is 'kmeans'; expected one of inputs, neurons, random"):
        converted(classifier, tokenizer, init="kmeans")  # type: ignore[arg-type]


def test_removed_is_no_better_than_the_mean(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    errors = [fit.error for fit in converted(classifier, tokenizer, shape=REMOVED).layers]
    assert min(errors) >= 1  # 1 with the held-out tokens' own mean, which is unknown


def test_more_leaves_than_tokens_are_refused(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match=r"depth 9 has 512 leaves and there are 300 tokens .* at most 3, or"):
        converted(classifier, tokenizer, shape=TreeShape(depth=9, leaf_width=1))
    with pytest.raises(
        UserError, match=r"depth 5 has 32 leaves and there are 4 tokens .*; expected more calib"
    ):
        convert(classifier, tokenizer, ["good film"], TreeShape(depth=5, leaf_width=1))


def test_a_few_words_are_enough_to_judge_a_fit_on(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    made = convert(classifier, tokenizer, ["good film"], TreeShape(depth=1, leaf_width=1))
    assert all(isfinite(layer.error) for layer in made.layers)


def test_says_where_leaves_have_few_tokens_of_their_own(
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    converted(classifier, tokenizer, shape=TreeShape(depth=5, leaf_width=1))
    assert "Of 32 leaves most will have fewer than 32" in " ".join(capsys.readouterr().err.split())
    converted(classifier, tokenizer, shape=TreeShape(depth=5, leaf_width=1), init="random")
    assert "leaves" not in capsys.readouterr().err


def test_says_where_nothing_is_saved(
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    converted(classifier, tokenizer, shape=TreeShape(depth=2, leaf_width=31, linear=False))
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "Every token will use 32 neurons and the dense FFN has 32: the model will be slower than it was"
        in said
    )
    converted(classifier, tokenizer, shape=TreeShape(depth=1, leaf_width=31, linear=False))
    assert "slower" not in capsys.readouterr().err


def test_a_head_that_chooses_among_texts_is_converted(tokenizer: PreTrainedTokenizerFast) -> None:
    model = BertForMultipleChoice(tiny_config()).eval()
    made = convert(model, tokenizer, sentences(40), TreeShape(2, 2), calibration_tokens=300)
    assert made.model.config.fff["linear"], "so sensitivities were asked for"


def test_a_model_that_gives_tuples_is_converted(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = convert(classifier, tokenizer, sentences(40), TREE, calibration_tokens=300).model.state_dict()
    classifier.config.return_dict = False
    made = convert(classifier, tokenizer, sentences(40), TREE, calibration_tokens=300).model.state_dict()
    assert all(torch.equal(made[name], tensor) for name, tensor in expected.items())


def test_leaves_that_cannot_be_filled_are_refused_before_anything_is_read(
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BertModel, "forward", None)
    with pytest.raises(UserError, match=r"tree.leaf_width is 50; expected at most 32 for this model"):
        convert(classifier, tokenizer, sentences(40), TreeShape(1, 50), calibration_tokens=300)


def test_a_class_of_ones_own_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    class Mine(BertForSequenceClassification):
        pass

    with pytest.raises(
        UserError, match=r"Mine is a class of your own; .* such as BertForSequenceClassification"
    ):
        convert(Mine(tiny_config()), tokenizer, sentences(20), TREE, calibration_tokens=100)


def test_arguments_that_cannot_be_are_one_line(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match=r"tree is {'depth': 2}; expected a TreeShape"):
        convert(classifier, tokenizer, sentences(5), {"depth": 2})  # type: ignore[arg-type]
    for seed in (-1, 1.5):
        with pytest.raises(UserError, match=f"seed is {seed}; expected a whole number from 0"):
            converted(classifier, tokenizer, seed=seed)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="max_length is 2; expected at least 4"):
        convert(classifier, tokenizer, sentences(5), TREE, max_length=2)


def test_weights_that_would_be_lost_are_refused(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    classifier.classifier.lora_A = torch.nn.Parameter(torch.zeros(1, 16))
    with pytest.raises(
        UserError, match=r"has weights that its class has not: classifier.lora_A; merge adapters"
    ):
        convert(classifier, tokenizer, sentences(30), TreeShape(1, 2), calibration_tokens=100)


def test_weights_that_would_be_drawn_are_refused(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    classifier.classifier = torch.nn.Identity()
    with pytest.raises(UserError, match=r"lacks weights that its class has: .*classifier\.weight"):
        convert(classifier, tokenizer, sentences(30), TreeShape(1, 2), calibration_tokens=100)
