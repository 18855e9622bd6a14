"""A model reads as far as it is asked to, and nothing stays behind in it."""

from __future__ import annotations

import pytest
import torch
from conftest import hooks_of, sentences
from torch.overrides import _get_current_function_mode_stack
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from fffconvert.activations import collect_inputs, recording_inputs
from fffconvert.calibration import calibrate


def test_a_last_batch_that_nothing_is_wanted_of_adds_nothing(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    long, short = (
        dict(tokenizer([text], return_tensors="pt")) for text in ("a very good film indeed", "good")
    )
    place = classifier.bert.encoder.layer[0].intermediate
    (alone,), (both,) = (
        collect_inputs(classifier, [place], batches, 3) for batches in ([long], [long, short])
    )
    assert alone.shape == (3, 16)
    assert torch.equal(alone, both)


def test_nothing_stays_switched_while_a_failure_is_looked_at(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    """As in a notebook, which keeps the last traceback and all that its frames hold."""
    calibration = calibrate(classifier.train(), tokenizer, sentences(3), 20)
    calibration.batches[0]["attention_mask"] = torch.ones(1, 1)
    forward_pass = calibration.read_by(classifier)
    with pytest.raises(RuntimeError, match="is invalid for input") as failure:
        forward_pass.inputs_of(classifier.bert.encoder.layer[0].intermediate, "")
    assert classifier.training
    assert len(_get_current_function_mode_stack()) == 0
    assert failure.tb is not None


def test_inputs_of_a_module_are_recorded_until_the_end() -> None:
    module = torch.nn.Linear(2, 2)
    x, y = torch.ones(1, 2), torch.zeros(1, 2)
    with recording_inputs(module) as recorded:
        module(y)
        module(x)
    module(x)
    assert [entry.tolist() for entry in recorded] == [[[0.0, 0.0]], [[1.0, 1.0]]]


@pytest.mark.parametrize("chunk", [0, 1], ids=["whole", "chunked"])
def test_another_model_reads_the_same_tokens(
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    chunk: int,
) -> None:
    calibration = calibrate(classifier, tokenizer, texts, n_tokens=300)
    expected = [inputs for inputs, _ in calibration.ffns()]
    for layer in classifier.bert.encoder.layer:
        layer.chunk_size_feed_forward = chunk
    forward_pass = calibration.read_by(classifier)
    for layer, theirs in zip(classifier.bert.encoder.layer, expected, strict=True):
        assert torch.equal(forward_pass.inputs_of(layer.intermediate, "Again"), theirs)
        assert layer.chunk_size_feed_forward == chunk
    assert hooks_of(classifier) == 0


def test_a_forward_pass_goes_on_from_where_it_is_and_no_further_than_asked(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    """What lies above may change meanwhile, and what lies below has been used."""
    calibration = calibrate(classifier, tokenizer, texts, n_tokens=300)
    before = [inputs for inputs, _ in calibration.ffns()]
    first, second = classifier.bert.encoder.layer
    forward_pass = calibration.read_by(classifier)
    with recording_inputs(first) as once, recording_inputs(second) as beyond:
        forward_pass.inputs_of(first.intermediate, "")
        assert len(once) == len(calibration.batches)
        assert not beyond
        with torch.no_grad():
            first.attention.output.dense.weight.zero_()
            first.output.dense.weight.zero_()
        found = forward_pass.inputs_of(second.intermediate, "")
        assert len(once) == len(beyond) == len(calibration.batches)
    with torch.no_grad():
        again = calibration.read_by(classifier)
        assert not torch.equal(again.inputs_of(first.intermediate, ""), before[0])
        assert not torch.equal(again.inputs_of(second.intermediate, ""), found)
    assert not torch.equal(found, before[1])
