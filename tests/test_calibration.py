"""Text in, inputs of FFNs out: which tokens, how many, and how much of the text is ever held."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from conftest import hooks_of, sentences, tiny_model
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)

from fffconvert.activations import recording_inputs
from fffconvert.calibration import BATCH_SIZE, FEWEST_TOKENS_PER_TEXT, Calibration, calibrate, sample_texts
from fffconvert.errors import UserError
from fffconvert.text import encode


def inputs_by_hand(
    model: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, text: str | tuple[str, str]
) -> list[Tensor]:
    """The inputs of each layer's FFN for one text: no batch, so no padding; `(n_tokens, d_model)`."""
    pair = (text,) if isinstance(text, str) else text
    encoded = tokenizer(*pair, return_tensors="pt")
    with torch.no_grad():
        states = model(**encoded, output_hidden_states=True).hidden_states
        return [
            layer.attention(state)[0][0]
            for layer, state in zip(model.bert.encoder.layer, states[:-1], strict=True)
        ]


def inputs_of(calibration: Calibration) -> list[Tensor]:
    """The inputs of every FFN, first layer to last."""
    return [inputs for inputs, _ in calibration.ffns()]


def assert_same_rows(ours: Tensor, theirs: Tensor) -> None:
    """The same rows, up to rounding, in any order."""
    assert ours.shape == theirs.shape
    distances = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.min(0).values.max() < 1e-4
    assert distances.min(1).values.max() < 1e-4


# ---- Which tokens


def test_tokens_are_those_of_each_text_alone_and_never_padding(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = sentences(50)  # of three to twelve words, in two batches: there is much padding
    expected = [inputs_by_hand(classifier, tokenizer, text) for text in texts]
    collected = inputs_of(calibrate(classifier, tokenizer, texts, n_tokens=100_000))
    assert len(collected) == 2
    for layer, ours in enumerate(collected):
        assert_same_rows(ours, torch.cat([layers[layer] for layers in expected]))


def test_pairs_are_read_as_pairs(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    pairs = list(zip(sentences(20), sentences(20, seed=1), strict=True))
    expected = [inputs_by_hand(classifier, tokenizer, pair) for pair in pairs]
    for layer, ours in enumerate(inputs_of(calibrate(classifier, tokenizer, pairs, n_tokens=100_000))):
        assert_same_rows(ours, torch.cat([layers[layer] for layers in expected]))


def test_layers_hold_the_same_tokens_in_the_same_order(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = "a very good film"
    first, second = inputs_of(calibrate(classifier, tokenizer, [text], n_tokens=100))
    for ours, theirs in zip((first, second), inputs_by_hand(classifier, tokenizer, text), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_seed_decides_which_texts(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    first, again, other = (
        inputs_of(calibrate(classifier, tokenizer, texts, 64, seed))[1] for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("n_tokens", [1, 7, 64, 333])
def test_exactly_so_many_tokens_where_there_are_enough(
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    n_tokens: int,
) -> None:
    shapes = [x.shape for x in inputs_of(calibrate(classifier, tokenizer, texts, n_tokens))]
    assert shapes == [(n_tokens, 16), (n_tokens, 16)]


def test_all_tokens_where_there_are_fewer(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    n_tokens = sum(len(ids) for ids in tokenizer(sentences(5))["input_ids"])
    assert len(inputs_of(calibrate(classifier, tokenizer, sentences(5), 10_000))[0]) == n_tokens


def test_no_more_text_is_run_than_needed(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    with recording_inputs(classifier.bert.embeddings.word_embeddings) as recorded:
        inputs_of(calibrate(classifier, tokenizer, texts, n_tokens=400))
    # 100 texts may be needed for 400 tokens; these are longer, so fewer batches are run
    assert len(recorded) == 2 < -(-len(texts) // BATCH_SIZE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_collected_in_float32(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype
) -> None:
    collected = inputs_of(calibrate(classifier.to(dtype), tokenizer, sentences(3), 10))
    assert {x.dtype for x in collected} == {torch.float32}
    assert not any(x.requires_grad for x in collected)


@pytest.mark.parametrize(
    ("n_layers", "uses", "chunk"),
    [(6, (3, 3), 0), (6, (3, 3), 1), (3, (2, 1), 0)],
    ids=["whole", "chunked", "uneven"],
)
def test_shared_ffn_gets_the_inputs_of_all_its_uses(
    tokenizer: PreTrainedTokenizerFast, n_layers: int, uses: tuple[int, ...], chunk: int
) -> None:
    """ALBERT's layers share one FFN per group; some configurations feed an FFN a few tokens at a time."""
    set_seed(0)
    sizes = {"hidden_size": 16, "embedding_size": 8, "num_attention_heads": 2, "intermediate_size": 32}
    config = AlbertConfig(vocab_size=64, num_hidden_layers=n_layers, num_hidden_groups=2, **sizes)
    model = AlbertModel(config).eval()
    ffns = [group.albert_layers[0].ffn for group in model.encoder.albert_layer_groups]
    expected = []
    for ffn, n_uses in zip(ffns, uses, strict=True):
        with torch.no_grad(), recording_inputs(ffn) as recorded:
            for text in sentences(20):
                model(**tokenizer(text, return_tensors="pt"))
        assert len(recorded) == n_uses * 20
        expected.append(torch.cat([x[0] for x in recorded]))
    for group in model.encoder.albert_layer_groups:
        group.albert_layers[0].chunk_size_feed_forward = chunk
    for ours, theirs in zip(
        inputs_of(calibrate(model, tokenizer, sentences(20), 10_000)), expected, strict=True
    ):
        assert_same_rows(ours, theirs)
    shapes = [x.shape for x in inputs_of(calibrate(model, tokenizer, sentences(20), 10))]
    assert shapes == [(10 * n_uses, 16) for n_uses in uses]


def test_a_model_of_one_layer(tokenizer: PreTrainedTokenizerFast) -> None:
    ((inputs, outputs),) = calibrate(
        tiny_model("bert", num_hidden_layers=1), tokenizer, sentences(20), 50
    ).ffns()
    assert inputs.shape == outputs.shape == (50, 16)


# ---- Memory


class Line(str):
    """Text that can be weakly referred to, to see whether anybody still holds it."""


def watched(n_texts: int, alive: weakref.WeakSet[Line], most: list[int]) -> Iterator[Line]:
    """Texts that are made when asked for; notes the most that were alive at once."""
    for number in range(n_texts):
        line = Line(f"good film {number}")
        alive.add(line)
        most[0] = max(most[0], len(alive))
        yield line
        del line


@pytest.mark.parametrize("n_kept", [1, 10, 100])
def test_long_stream_is_never_held(n_kept: int) -> None:
    most = [0]
    sample = sample_texts(watched(5_000, weakref.WeakSet(), most), n_kept, seed=0)
    assert len(sample) == n_kept
    assert most[0] <= n_kept + 2  # the one in hand, and the one before it that is about to go


def test_calibration_holds_as_many_texts_as_it_says(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    most, n_tokens = [0], 200
    stream = watched(5_000, weakref.WeakSet(), most)
    collected = inputs_of(calibrate(classifier, tokenizer, stream, n_tokens))
    assert next(stream, None) is None  # it was read to its end, for the sample to be uniform
    assert most[0] <= n_tokens / FEWEST_TOKENS_PER_TEXT + 2
    assert sum(x.untyped_storage().nbytes() for x in collected) <= 2 * 2 * n_tokens * 16 * 4


def test_layers_are_forgotten_when_the_next_ones_are_read(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("bert", num_hidden_layers=5)
    alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
    most = 0
    for inputs, outputs in calibrate(model, tokenizer, sentences(20), 50).ffns():
        alive.update((inputs.untyped_storage(), outputs.untyped_storage()))
        del inputs, outputs
        most = max(most, len(alive))
    assert most <= 4  # of this layer and the one before


# ---- The sample


def test_sample_is_uniform() -> None:
    counts: Counter[int] = Counter()
    for seed in range(4_000):
        counts.update(sample_texts(map(str, range(20)), 5, seed))
    # each of 20 is drawn by a quarter of the samples; 1000 with a standard deviation of 27
    assert set(counts) == set(map(str, range(20)))
    assert 860 < min(counts.values()) <= max(counts.values()) < 1140


def test_sample_is_in_random_order() -> None:
    firsts = Counter(sample_texts(map(str, range(4)), 4, seed)[0] for seed in range(2_000))
    assert min(firsts[str(i)] for i in range(4)) > 400  # 500 with a standard deviation of 19


def test_sample_of_fewer_texts_is_all_of_them() -> None:
    assert sorted(sample_texts(iter("abc"), 10, seed=0)) == ["a", "b", "c"]


def test_sample_repeats_nothing() -> None:
    sample = sample_texts(map(str, range(1_000)), 50, seed=1)
    assert len(set(sample)) == 50
    assert sample == sample_texts(map(str, range(1_000)), 50, seed=1)
    assert sample != sample_texts(map(str, range(1_000)), 50, seed=2)


# ---- What is left behind


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_model_is_left_as_it_was(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, training: bool
) -> None:
    classifier.train(training)
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    inputs_of(calibrate(classifier, tokenizer, sentences(3), 20))
    assert classifier.training is training
    assert hooks_of(classifier) == 0
    assert torch.is_grad_enabled()
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_dropout_is_off_while_it_reads(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    evaluated = inputs_of(calibrate(classifier.eval(), tokenizer, sentences(3), 20))
    trained = inputs_of(calibrate(classifier.train(), tokenizer, sentences(3), 20))
    assert all(torch.equal(a, b) for a, b in zip(evaluated, trained, strict=True))


def test_model_is_left_as_it_was_when_reading_fails(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    classifier.train()
    classifier.resize_token_embeddings(4)  # fewer than the tokenizer's
    with pytest.raises((IndexError, RuntimeError)):
        inputs_of(calibrate(classifier, tokenizer, ["good"], 20))
    assert classifier.training
    assert hooks_of(classifier) == 0


def test_encoding_cuts_to_the_length(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(tokenizer, ["good " * 100, "bad"], max_length=10)
    assert [len(ids) for ids in encoded["input_ids"]] == [10, 3]


# ---- In batches, and again by another model


def test_batches_hold_texts_of_like_length_and_no_more_of_them_than_needed(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    batches = calibrate(classifier, tokenizer, texts, n_tokens=600, seed=1).batches
    lengths = [batch["attention_mask"].sum(1) for batch in batches]  # (n_texts,) each
    ranges = sorted((int(rows.min()), int(rows.max())) for rows in lengths)
    assert all(highest <= lowest for (_, highest), (lowest, _) in itertools.pairwise(ranges))
    assert 600 <= sum(int(rows.sum()) for rows in lengths) < 600 + max(highest for _, highest in ranges)
    assert ranges != [(int(rows.min()), int(rows.max())) for rows in lengths], "a fit is judged on the first"


def test_texts_are_cut_to_what_is_asked_and_to_what_the_model_reads(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    for asked, read in ((6, 6), (500, 64)):
        (batch,) = calibrate(classifier, tokenizer, ["good " * 300], 200, max_length=asked).batches
        assert batch["input_ids"].shape == (1, read)


def test_texts_encoded_part_by_part_are_the_same(
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = calibrate(classifier, tokenizer, texts, n_tokens=600).batches
    monkeypatch.setattr("fffconvert.calibration.ENCODED_AT_ONCE", 7)
    parts = calibrate(classifier, tokenizer, texts, n_tokens=600).batches
    assert [batch["input_ids"].tolist() for batch in parts] == [
        batch["input_ids"].tolist() for batch in whole
    ]


@pytest.mark.parametrize(
    "texts", [[], iter(()), itertools.repeat("a", 0)], ids=["list", "iterator", "repeat"]
)
def test_no_text_is_refused(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, texts: object
) -> None:
    with pytest.raises(UserError, match="calibration text is empty; expected at least one line"):
        calibrate(classifier, tokenizer, texts, 100)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "are one text; expected a list"),
        ([("a", "b"), "c"], "some calibration texts are pairs"),
        ([{"text": "a"}], "a calibration text is {'text': 'a'}; expected text or a pair"),
        ([("a", "b", "c")], "expected text or a pair of texts"),
        ([1, 2], "a calibration text is [12]; expected text"),
    ],
    ids=["one", "mixed", "rows", "three", "numbers"],
)
def test_texts_that_are_none_are_refused(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, texts: object, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        calibrate(classifier, tokenizer, texts, 100)


def test_hidden_states_that_are_not_finite_are_refused(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    calibration = calibrate(classifier, tokenizer, sentences(20), 100)
    with torch.no_grad():
        classifier.bert.encoder.layer[0].attention.output.LayerNorm.weight.fill_(1e38)
    with pytest.raises(UserError, match="are NaN or infinite on the calibration text; expected finite"):
        list(calibration.ffns())
