"""Labels and texts as a model takes them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest
from conftest import SPECIAL, WORDS, sentences
from datasets import ClassLabel, Dataset, DatasetDict, Features, LargeList, List, Value
from own_data import config_for, encoded_labels, reviews, write_jsonl
from transformers import PreTrainedTokenizerFast

from fffconvert import encoding
from fffconvert.data import read_data, read_texts, read_validations
from fffconvert.errors import UserError
from fffconvert.labels import IGNORED, multi_hot
from fffconvert.recipe import DataSource
from fffconvert.tasks import Task


def test_labels_of_a_model_that_is_there(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Names count, in the model's order and whatever their case; numbers are the model's own."""
    config = config_for("classification", id2label={0: "Positive", 1: "NEGATIVE", 2: "mixed"})
    assert encoded_labels(tmp_path, tokenizer, config, ["negative", "positive", "MIXED"]) == [1, 0, 2]
    assert encoded_labels(tmp_path, tokenizer, config, [2, 0, 1]) == [2, 0, 1]
    assert encoded_labels(tmp_path, tokenizer, config, ["2", "0", "1"]) == [2, 0, 1]
    assert encoded_labels(tmp_path, tokenizer, config, [2.0, 0.0, 1.0]) == [2, 0, 1]
    assert encoded_labels(tmp_path, tokenizer, config, [True, False]) == [1, 0]
    for wrong in (["dreadful"], [3], [-1, 0], [0.5], ["3"]):
        with pytest.raises(UserError, match=r"in column 'label' is no label; expected one of Positive, NEG"):
            encoded_labels(tmp_path, tokenizer, config, wrong)


def test_the_numbers_of_labels_may_be_text_as_json_has_them(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    names = [f"c{number}" for number in range(12)]
    config = config_for("classification")
    config.id2label = {str(number): name for number, name in enumerate(names)}
    assert encoded_labels(tmp_path, tokenizer, config, names) == [*range(12)]


def test_labels_that_differ_in_case_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = config_for("classification", id2label={0: "us", 1: "US", 2: "x"})
    assert encoded_labels(tmp_path, tokenizer, config, ["us", "US", "x"]) == [0, 1, 2]
    with pytest.raises(UserError, match="'X' in column 'label' is no label"):
        encoded_labels(tmp_path, tokenizer, config, ["us", "X"])


def test_numbers_that_are_names(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    stars = config_for("classification", id2label={i: str(i + 1) for i in range(5)})
    assert encoded_labels(tmp_path, tokenizer, stars, [1, 5, 3]) == [0, 4, 2]
    assert encoded_labels(tmp_path, tokenizer, stars, [1.0, 5.0, 3.0]) == [0, 4, 2]
    assert encoded_labels(tmp_path, tokenizer, None, [30, 4, 30]) == [1, 0, 1]  # a new head: 4, then 30


def test_lists_that_pandas_wrote_as_text_are_refused_where_they_are_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def read(**columns: list[Any]) -> list[int]:
        file = tmp_path / "own.csv"
        pandas.DataFrame(columns).to_csv(file, index=False)
        return list(read_data(DataSource(str(file)), tokenizer, None).rows["labels"])

    words, lists = ["good film", "book"], [["good", "film"], ["book"]]
    message = "column '{}' holds lists written as text; expected values with spaces or commas between"
    with pytest.raises(UserError, match=message.format("tokens")):
        read(tokens=lists, ner_tags=["1 0", "0"])
    with pytest.raises(UserError, match=message.format("ner_tags")):
        read(tokens=words, ner_tags=lists)
    with pytest.raises(UserError, match=message.format("label")):
        read(text=words, label=lists)
    assert read(text=["[deleted]", "[1, 2]"], label=["[a]", "[b]"], spans=lists) == [0, 1]


def test_tags_numbered_in_text_are_in_the_order_of_their_numbers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tags = " ".join(str(number) for number in range(12))
    file = tmp_path / "own.csv"
    file.write_text(f"words,ner_tags\n{'good ' * 12},{tags}\n", encoding="utf-8")
    data = read_data(DataSource(str(file)), tokenizer, None)
    assert data.task.labels == tuple(str(number) for number in range(12))
    assert [label for label in data.rows["labels"][0] if label >= 0] == [*range(12)]


def test_named_classes_are_matched_by_name(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = Dataset.from_dict({"text": sentences(3), "label": [0, 1, 1]}, features=features)
    DatasetDict(train=rows).save_to_disk(tmp_path / "saved")
    source = DataSource(str(tmp_path / "saved"))
    turned = config_for("classification", id2label={0: "POS", 1: "NEG"})
    assert list(read_data(source, tokenizer, turned).rows["labels"]) == [1, 0, 0]
    said = capsys.readouterr().err
    assert "by number" not in said
    assert "0 = " not in said  # the data has another order
    strange = config_for("classification", id2label={0: "bad", 1: "good"})
    assert list(read_data(source, tokenizer, strange).rows["labels"]) == [0, 1, 1]
    said = " ".join(capsys.readouterr().err.split())
    assert "The data's labels neg, pos are taken by number for the model's bad, good" in said


def test_names_and_numbers_are_not_mixed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Stars from 0 for a model whose classes are called 1 to 5 would merge two of them."""
    stars = config_for("classification", id2label={i: str(i + 1) for i in range(5)})
    with pytest.raises(UserError, match=r"0 in column 'label' is no label; expected one of 1, 2, 3, 4, 5$"):
        encoded_labels(tmp_path, tokenizer, stars, [0, 1, 4])
    with pytest.raises(UserError, match="0 in column 'label' is no label"):
        encoded_labels(tmp_path, tokenizer, stars, [0, 0, 0])
    features = Features({"text": Value("string"), "label": ClassLabel(names=["same", "other"])})
    rows = Dataset.from_dict({"text": sentences(2), "label": [0, 1]}, features=features)
    DatasetDict(train=rows).save_to_disk(tmp_path / "saved")
    three = config_for("classification", id2label={0: "same", 1: "neutral", 2: "opposite"})
    with pytest.raises(UserError, match=r"'other' in column 'label' is no label; expected one of same"):
        read_data(DataSource(str(tmp_path / "saved")), tokenizer, three)
    rows = Dataset.from_dict({"text": sentences(2), "label": [0, -1]}, features=features)  # -1 for none
    with pytest.raises(UserError, match="-1 in column 'label' is no label"):
        encoding.tokenized(Task("own", ("text",), ("same", "other"), label="label"), rows, tokenizer)


def test_a_missing_label_is_not_the_class_none(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = config_for("classification", id2label={0: "none", 1: "hate"})
    with pytest.raises(UserError, match="row 1 has no label in column 'label'"):
        encoded_labels(tmp_path, tokenizer, config, ["hate", None])


def test_regression(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = config_for("classification", num_labels=1)
    assert encoded_labels(tmp_path, tokenizer, config, [1, 2]) == [1.0, 2.0]
    for label in ("x", "inf", [1]):
        with pytest.raises(UserError, match=" in column 'label' is no number; the model's head gives one"):
            encoded_labels(tmp_path, tokenizer, config, [label])


@pytest.mark.parametrize("labels", [[1, None, 0], ["x", None, "y"], [0.5, None, 1.5]])
def test_a_row_without_a_label_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, labels: list[Any]
) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", {"text": sentences(3), "label": labels})
    for drawn in ({}, {"train_rows": 2}, {"held_out": 1}):  # it is the number in the file
        with pytest.raises(UserError, match="row 1 has no label in column 'label'; expected one"):
            read_data(source, tokenizer, None, **drawn)


def test_several_labels(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    labels = [["b", "a"], [], ["c"], None]
    source = write_jsonl(tmp_path / "own.jsonl", {"text": sentences(4), "labels": labels})
    data = read_data(source, tokenizer, None)
    assert data.task.labels == ("a", "b", "c")
    assert list(data.rows["labels"]) == [[1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]]
    config = config_for(
        "classification", id2label={0: "c", 1: "b"}, problem_type="multi_label_classification"
    )
    file = tmp_path / "own.csv"
    file.write_text('text,labels\ngood,"b, c,"\nbad,c\nfine,\n', encoding="utf-8")
    data = read_data(DataSource(str(file)), tokenizer, config)
    assert list(data.rows["labels"]) == [[1, 1], [1, 0], [0, 0]]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([[0, 1, 1], [0, 0, 1]], [[0, 1, 1], [0, 0, 1]]),
        ([[0.0, 1.0], [1.0, 0.0]], [[0, 1], [1, 0]]),
        ([[False, True], [True, False]], [[0, 1], [1, 0]]),
        ([[0, 1], [1, 0]], [[0, 1], [1, 0]]),  # who lists both labels, each time, does it in one order
        ([[0, 1], [0, 1]], [[1, 1], [1, 1]]),
    ],
)
def test_a_zero_or_one_for_every_label(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, labels: Any, expected: list[list[float]]
) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", {"text": sentences(2), "labels": labels})
    data = read_data(source, tokenizer, None)
    assert data.task.labels == tuple(str(number) for number in range(len(expected[0])))
    assert list(data.rows["labels"]) == expected
    names = config_for(
        "classification",
        id2label=dict(enumerate("abc"[: len(expected[0])])),
        problem_type="multi_label_classification",
    )
    assert list(read_data(source, tokenizer, names).rows["labels"]) == expected


@pytest.mark.parametrize("labels", [[[0.0, 1.0], [1.0, 0.0]], [["a"], ["a", "b"]]])
def test_lists_may_be_large(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, labels: list[list[Any]]
) -> None:
    rows = Dataset.from_dict({"text": sentences(2), "labels": labels})
    found = []
    for kind in (List, LargeList):
        features = Features({**rows.features, "labels": kind(rows.features["labels"].feature)})
        rows.cast(features).to_parquet(tmp_path / f"{kind.__name__}.parquet")
        data = read_data(DataSource(str(tmp_path / f"{kind.__name__}.parquet")), tokenizer, None)
        found.append((data.task.kind, data.task.labels, list(data.rows["labels"])))
    assert found[0] == found[1]
    assert found[0][0] == "multi-label"


def test_a_label_named_twice_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = config_for(
        "classification", id2label=dict(enumerate("abcd")), problem_type="multi_label_classification"
    )
    for labels in ([["a", "a"], ["b"]], [[0, 1, 1], [0, 0, 1]]):  # the second is of three labels
        source = write_jsonl(tmp_path / "own.jsonl", {"text": sentences(2), "labels": labels})
        with pytest.raises(
            UserError, match=r"names a label twice; expected the names or numbers of a row's labels"
        ):
            read_data(source, tokenizer, config)


def test_an_encoder_reads_text_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", reviews())
    task, validations = read_validations(source, tokenizer, config_for("embedding"))
    assert (task.kind, task.label) == ("embedding", None)
    assert "labels" not in validations["own.jsonl"].column_names
    with pytest.raises(UserError, match=r"needs no labels \(embedding\); leave out --label-column id"):
        read_validations(replace(source, label="id"), tokenizer, config_for("embedding"))


def test_an_encoder_reads_each_text_of_a_pair_by_itself(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    pairs = {"sentence1": sentences(4), "sentence2": sentences(4, seed=1)}
    source, alone = write_jsonl(tmp_path / "own.jsonl", pairs), [*pairs["sentence1"], *pairs["sentence2"]]
    data = read_data(source, tokenizer, config_for("embedding"))
    assert data.texts == list(read_texts(source, config_for("embedding"))) == alone
    assert list(data.rows["input_ids"]) == tokenizer(alone)["input_ids"]
    assert read_texts(source, config_for("classification"))[0] == (alone[0], alone[4])


def test_tags_stand_at_the_first_token_of_a_word(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """This tokenizer splits `film-book` in three; `New York` is one word of two."""
    words = [["the", "film-book", "good"], ["saw", "New York"]]
    source = write_jsonl(
        tmp_path / "own.jsonl", {"tokens": words, "ner_tags": [["O", "B-X", "I-X"], ["O", "B-X"]]}
    )
    data = read_data(source, tokenizer, None)
    assert data.task.labels == ("B-X", "I-X", "O")
    assert data.task.metrics[0] == "entity_f1"
    b, i, o, no = 0, 1, 2, IGNORED
    assert list(data.rows["labels"]) == [[no, o, b, no, no, i, no], [no, o, b, no, no]]
    assert data.texts == ["the film-book good", "saw New York"]

    config = config_for("tokens", id2label={0: "O", 1: "B-X", 2: "I-X"})
    assert read_data(source, tokenizer, config).rows["labels"][0] == [no, 0, 1, no, no, 2, no]
    unlabelled = read_data(source, tokenizer, config, labelled=False).rows["labels"]
    assert unlabelled[0] == [no, 0, 0, no, no, 0, no]

    short = read_data(source, tokenizer, None, max_length=4).rows["labels"]
    assert short[0] == [no, o, b, no]


def test_a_space_that_is_a_token_is_the_next_words() -> None:
    task = Task("own", ("words",), ("O", "B-X"), kind="tokens", label="tags")
    offsets = [[(0, 0), (0, 1), (1, 2), (2, 4), (4, 7), (0, 0)]]  # ["a", " ", "bc", " de"]
    tags = encoding._tags(task, offsets, [["a", "bc", "de"]], [[0, 1, 0]], int)
    assert tags == [[IGNORED, 0, 1, IGNORED, 0, IGNORED]]


def test_words_and_tags_of_a_csv_file(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "own.csv"
    file.write_text("words,tags\nthe  film good,DET NOUN ADJ\nsaw it,VERB\n", encoding="utf-8")
    with pytest.raises(UserError, match="a row has 2 words and 1 tags in 'tags'; expected one tag for each"):
        read_data(DataSource(str(file)), tokenizer, None)
    file.write_text("words,tags\nthe  film good,DET NOUN ADJ\n", encoding="utf-8")
    data = read_data(DataSource(str(file)), tokenizer, None)
    assert data.task.labels == ("ADJ", "DET", "NOUN")
    assert data.task.metrics == ("accuracy", "macro_f1")
    assert list(data.rows["labels"]) == [[IGNORED, 1, 2, 0, IGNORED]]


def test_answers_are_found_in_the_context(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    context = "the film was very good"  # tokens: [CLS] saw [SEP] the film was very good [SEP]
    columns = {
        "question": ["saw"] * 3,
        "context": [context] * 3,
        "answers": [
            {"text": ["very good", "good"], "answer_start": [13, 18]},
            {"text": [], "answer_start": []},
            {"text": ["the"], "answer_start": [0]},
        ],
    }
    source = write_jsonl(tmp_path / "own.jsonl", columns)
    rows = read_data(source, tokenizer, None).rows
    assert list(rows["start_positions"]) == [6, 0, 3]
    assert list(rows["end_positions"]) == [7, 0, 3]
    short = read_data(source, tokenizer, None, max_length=8).rows  # `good` is cut off
    assert list(short["start_positions"]) == [0, 0, 3]


@pytest.mark.parametrize(
    "answer",
    [
        None,
        {"text": "good", "answer_start": 18},
        {"text": ["good"]},
        {"text": ["good"], "answer_start": [17]},
        [{"text": "good", "answer_start": 18}],
        "good",
    ],
    ids=str,
)
def test_answers_that_are_none_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, answer: Any
) -> None:
    answers = [{"text": ["good"], "answer_start": [18]}, answer]
    columns = {"question": ["saw"] * 2, "context": ["the film was very good"] * 2, "answers": answers}
    source = write_jsonl(tmp_path / "own.jsonl", columns)
    with pytest.raises(UserError, match="in column 'answers' is no answer; expected the lists `text` and"):
        read_data(replace(source, label="answers"), tokenizer, config_for("question"))


def test_answers_that_are_cut_off_are_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    none = {"text": [], "answer_start": []}, {"text": [""], "answer_start": [0]}
    answers = [{"text": ["good"], "answer_start": [18]}, *none]
    columns = {"question": ["saw"] * 3, "context": ["the film was very good"] * 3, "answers": answers}
    source = write_jsonl(tmp_path / "own.jsonl", columns)
    read_data(source, tokenizer, None)
    assert "answers end past" not in capsys.readouterr().err
    read_data(source, tokenizer, None, max_length=7)
    assert "1 of 1 answers end past token 7 and count as no answer" in " ".join(
        capsys.readouterr().err.split()
    )


def test_masks(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "own.txt"
    file.write_text("\n".join(sentences(50)), encoding="utf-8")
    config = config_for("masked")
    rows = read_data(file, tokenizer, config).rows
    plain = read_data(file, tokenizer, config_for("embedding")).rows
    for masked, labels, ids in zip(rows["input_ids"], rows["labels"], plain["input_ids"], strict=True):
        hidden = [place for place, label in enumerate(labels) if label != IGNORED]
        assert len(hidden) == max(1, round(0.15 * (len(ids) - 2)))
        for place, token in enumerate(ids):
            assert masked[place] == (tokenizer.mask_token_id if place in hidden else token)
            assert labels[place] == (token if place in hidden else IGNORED)
            assert place not in hidden or token >= len(SPECIAL)
    assert read_data(file, tokenizer, config).rows["labels"][:] == rows["labels"][:]
    assert read_data(file, tokenizer, config, seed=1).rows["labels"][:] != rows["labels"][:]


def test_a_tokenizer_without_a_mask_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    bare = deepcopy(tokenizer)
    bare.mask_token = None
    (tmp_path / "own.txt").write_text("a film\n", encoding="utf-8")
    with pytest.raises(UserError, match="the tokenizer has no mask token"):
        read_data(tmp_path / "own.txt", bare, config_for("masked"))


def test_rows_are_made_anew_and_not_taken_from_a_cache_that_another_version_may_have_left(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", {"text": sentences(5), "label": list("ababa")})

    def written() -> list[int]:
        files = read_data(source, tokenizer, None).rows.cache_files
        return [Path(file["filename"]).stat().st_mtime_ns for file in files]

    before = written()
    assert before
    assert all(then < now for then, now in zip(before, written(), strict=True))


def test_a_tokenizer_that_does_not_say_where_its_tokens_stand_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    source = write_jsonl(tmp_path / "own.jsonl", {"tokens": [["a", "b"]], "ner_tags": [["O", "X"]]})
    with pytest.raises(
        UserError, match="does not say where in a text its tokens stand, as tags of words need"
    ):
        read_data(source, tokenizer, None)


@pytest.mark.parametrize("known", [None, {0: "1", 1: "2"}], ids=["new head", "known labels"])
def test_tags_that_are_to_be_ignored_are_no_class(
    known: dict[int, str] | None, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = config_for("tokens", id2label=known) if known else None
    for tags in ([[-100, 1], [2]], [["-100", "1"], ["2"]]):
        rows = {"tokens": [["film", "book"], ["good"]], "ner_tags": tags}
        data = read_data(write_jsonl(tmp_path / "own.jsonl", rows), tokenizer, config)
        assert data.task.labels == ("1", "2")
        assert [label for row in data.rows["labels"] for label in row if label != IGNORED] == [0, 1]


def test_a_tokenizer_that_pads_before_labelled_tokens_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "padding_side", "left")
    source = write_jsonl(tmp_path / "own.jsonl", {"tokens": [["a", "b"]], "ner_tags": [["O", "X"]]})
    with pytest.raises(UserError, match=r"the tokenizer pads on the left, .* expected right"):
        read_data(source, tokenizer, None)


def test_a_question_needs_a_token_before_its_context(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "sep_token", None)
    source = write_jsonl(tmp_path / "own.jsonl", {"question": ["a film"], "context": ["the film"]})
    with pytest.raises(UserError, match="the tokenizer names no sep_token"):
        read_data(source, tokenizer, config_for("question"))


def test_many_rows_are_tokenized_part_by_part(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", {"text": sentences(5), "label": list("ababa")})
    whole = read_data(source, tokenizer, None).rows
    assert "Tokenizing" not in capsys.readouterr().err
    monkeypatch.setattr("fffconvert.encoding.ROWS_AT_ONCE", 2)
    assert read_data(source, tokenizer, None).rows.to_list() == whole.to_list()
    assert "Tokenizing 3/3" in capsys.readouterr().err


def test_texts_are_cut_where_asked(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", {"text": [" ".join(WORDS * 20)], "label": [0]})

    def length(**settings: Any) -> int:
        config = config_for("classification", max_position_embeddings=300)
        return int(read_data(source, tokenizer, config, **settings).rows["length"][0])

    assert length() == 128
    assert length(max_length=7) == 7
    assert length(max_length=250) == 250


def test_a_model_that_reads_less_says_so(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", {"text": [" ".join(WORDS * 20)], "label": [0]})
    data = read_data(source, tokenizer, config_for("classification"), max_length=200)
    assert data.rows["length"][0] == 64
    assert "Texts are cut at 64 tokens: the model reads no more" in " ".join(capsys.readouterr().err.split())


def test_a_limit_that_leaves_no_room_for_a_word_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", {"text": ["a film"], "label": [0]})
    with pytest.raises(UserError, match="max_length is 3; expected at least 4"):
        read_data(source, tokenizer, config_for("classification"), max_length=3)
    monkeypatch.setattr(tokenizer, "model_max_length", 3)
    with pytest.raises(UserError, match="the model's own limit is 3; expected at least 4"):
        read_data(source, tokenizer, config_for("classification"))


@pytest.mark.parametrize(
    ("labels", "hot"), [([[1, 0], [0, 1]], 2), ([[0, 1], [0, 1]], 0), ([[0, 0], [0, 1]], 2), ([[0], [1]], 0)]
)
def test_zeros_and_ones_are_told_from_lists_of_labels(labels: list[list[int]], hot: int) -> None:
    assert multi_hot(Dataset.from_dict({"labels": labels}), "labels") == hot


@pytest.mark.parametrize(
    ("n_long", "said"), [(1, ""), (2, "own: 2 of 100 texts have 8 tokens or more, of which no more")]
)
def test_it_is_said_when_more_than_a_few_texts_are_cut(
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    n_long: int,
    said: str,
) -> None:
    rows = Dataset.from_dict({"text": ["good " * 20] * n_long + ["good"] * (100 - n_long)})
    task = Task("own", ("text",), kind="embedding", label=None)
    encoding.tokenized(task, rows, tokenizer, max_length=8)
    found = " ".join(capsys.readouterr().err.split())
    assert said in found
    assert bool(said) == ("--max-length" in found)
    monkeypatch.setattr(tokenizer, "model_max_length", 8)  # and more cannot be had
    encoding.tokenized(task, rows, tokenizer, max_length=8)
    found = " ".join(capsys.readouterr().err.split())
    assert said in found
    assert "--max-length" not in found
    assert bool(said) == ("or more" in found)


def test_a_text_without_a_token_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    bare = deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = None
    source = write_jsonl(tmp_path / "own.jsonl", {"text": ["good", ""], "label": [0, 1]})
    with pytest.raises(UserError, match="a text without a token"):
        read_data(source, bare, None)
