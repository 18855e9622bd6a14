"""Rows as a model takes them: texts become token ids, labels become numbers, for every kind of task.

Each row also gets its number of tokens as `length`. Rows of `tokens` and `masked` tasks have a label for each
token, and `IGNORED` where none counts.
"""

from __future__ import annotations

import ast
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from fffconvert.display import say, track
from fffconvert.errors import UserError
from fffconvert.labels import IGNORED, coder, is_ignored, labels_in
from fffconvert.recipe import MAX_LENGTH
from fffconvert.tasks import Task
from fffconvert.text import Text, how_to_read_further, say_if_cut

MASKED_SHARE = 0.15  # of the tokens of a text, as BERT was trained

ROWS_AT_ONCE = 16_384  # tokenized between two steps of a progress bar, in about a second

Columns = dict[str, list[Any]]


def texts_of(task: Task, rows: Dataset) -> list[Text]:
    """The texts, or pairs of texts, of checked rows; words are joined by spaces. An encoder reads each alone."""
    columns = [[_joined(task, value) for value in rows[name][:]] for name in task.columns]
    if len(columns) == 1 or task.is_embedded:
        return [text for column in columns for text in column]
    return [*zip(*columns, strict=True)]


def check_rows(task: Task, rows: Dataset) -> None:
    """Raises a `UserError` for a row without text, or without a label where each has one, and for lists as text."""
    check_texts(task, rows)
    for name in (*(task.columns if task.kind == "tokens" else ()), task.label):
        if name is not None and holds_printed_lists(rows[name]):
            raise UserError(
                f"{task.name}: column {name!r} holds lists written as text; expected values with spaces or commas "
                "between, or lists in a file of JSONL or Parquet"
            )
    if task.label is not None and (task.kind == "classification" or task.is_regression):
        given = rows[task.label][:]
        if None in given:
            raise UserError(
                f"{task.name}: row {given.index(None)} has no label in column {task.label!r}; expected one"
            )


def holds_printed_lists(column: Iterable[Any]) -> bool:
    """Whether cells are lists as Python prints them, which is how pandas writes them to a CSV file."""

    def bracketed(cell: Any) -> bool:
        return isinstance(cell, str) and cell[:1] + cell[-1:] == "[]"

    cells = (cell for cell in column if cell is not None)
    first = next(cells, None)  # which nearly always ends it
    if not bracketed(first) or not all(map(bracketed, cells)):
        return False
    try:
        return isinstance(ast.literal_eval(str(first)), list)
    except (ValueError, SyntaxError):
        return False  # such as [deleted]


def check_texts(task: Task, rows: Dataset) -> None:
    """Raises a `UserError` for a row without text; it is named."""
    for name in task.columns:
        for number, value in enumerate(rows[name][:]):
            words = value if isinstance(value, list) and task.kind == "tokens" else [value]
            if not all(isinstance(word, str) for word in words):
                raise UserError(f"{task.name}: row {number} has {name} {reprlib.repr(value)}; expected text")


def _joined(task: Task, value: str | list[str]) -> str:
    """A text as it is, after its prompt if it is read alone; words with one space between."""
    if isinstance(value, list) or task.kind == "tokens":
        return " ".join(_split(value))
    return task.prompt + value if task.is_embedded else value


def tokenized(
    task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int = MAX_LENGTH, seed: int = 0
) -> Dataset:
    """A split as a model takes it, with its labels where the task has them, and `length`.

    Args:
        task: Names the columns.
        rows: Holds them, checked by `check_rows`.
        tokenizer: The model's.
        max_length: Tokens that a row is cut at.
        seed: Decides which tokens of a `masked` task are masked.

    Raises:
        UserError: For a row without a token, or with a label that is none of the task's; for a tokenizer that does
            not say where in a text its tokens stand, or pads before them, and a task that has to know.
    """
    check_tokenizer(task, tokenizer)
    if task.is_embedded and len(task.columns) > 1:  # all first texts, then all second ones
        sides = [replace(task, columns=(column,)) for column in task.columns]
        return concatenate_datasets([tokenized(s, rows, tokenizer, max_length, seed) for s in sides])

    code = coder(task, rows)
    # a new column would be cast to the type of an old one of its name
    needed = {name: f"given {name}" for name in (*task.columns, task.label) if name is not None}
    made = in_parts(
        rows.select_columns(list(needed)).rename_columns(needed),
        lambda batch, random: encoded(
            task,
            {name: batch[column] for name, column in needed.items()},
            tokenizer,
            max_length,
            code,
            random,
        ),
        seed,
    )
    if 0 in made["length"]:  # by a tokenizer that adds nothing to an empty text
        raise UserError(f"{task.name} has a text without a token, such as an empty one; leave such rows out")
    say_if_cut(task.name, made["length"], max_length, tokenizer)
    if "end_positions" in made.column_names:
        say_what_was_cut(task, rows[task.label][:], made["end_positions"], max_length, tokenizer)
    return made


def check_tokenizer(task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises a `UserError` for a tokenizer that loses where tokens stand, if a task has to know."""
    if asks_where(task) and not tokenizer.is_fast:
        raise UserError(
            f"{task.name}: {type(tokenizer).__name__} does not say where in a text its tokens stand, as "
            f"{'answers' if task.kind == 'question' else 'tags of words'} need; expected a model with a fast tokenizer"
        )
    if task.kind == "question" and tokenizer.sep_token_id is None:
        raise UserError(
            f"{task.name}: the tokenizer names no sep_token, behind which the context of a question stands; expected "
            "one: set its sep_token and save it"
        )
    if (asks_where(task) or task.kind == "masked") and tokenizer.padding_side != "right":
        raise UserError(
            f"{task.name}: the tokenizer pads on the {tokenizer.padding_side}, which would move tokens away from their "
            "labels; expected right: set its padding_side and save it"
        )


def asks_where(task: Task) -> bool:
    """Whether labels are found by the place of each token in its text."""
    return task.kind == "tokens" or (task.kind == "question" and task.label is not None)


def encoded(
    task: Task,
    batch: Columns,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    code: Callable[[Any], Any],
    random: np.random.Generator,
) -> Columns:
    """A batch of rows as a model takes them, with labels and lengths (see `tokenized`).

    Args:
        task: Names the columns.
        batch: Holds them.
        tokenizer: The model's.
        max_length: Tokens that a row is cut at.
        code: Turns a label into what the model's loss takes.
        random: Draws what is masked.
    """
    texts = [[_joined(task, value) for value in batch[name]] for name in task.columns]
    where = asks_where(task)
    found = tokenizer(*texts, truncation=True, max_length=max_length, return_offsets_mapping=where)
    given = batch[task.label] if task.label else None
    if task.kind == "tokens":
        words = [_split(value) for value in batch[task.columns[0]]]
        labels = {"labels": _tags(task, found["offset_mapping"], words, given, code)}
    elif task.kind == "question":
        labels = _spans(task, found, texts[1], given) if given else {}
    elif task.kind == "masked":
        labels = {"labels": _mask(found["input_ids"], tokenizer, random)}
    else:
        labels = {"labels": [code(value) for value in given]} if given is not None else {}
    found.pop("offset_mapping", None)
    return {**found, **labels, "length": [len(ids) for ids in found["input_ids"]]}


def in_parts(rows: Dataset, encode: Callable[[Columns, np.random.Generator], Columns], seed: int) -> Dataset:
    """Rows encoded, `ROWS_AT_ONCE` at a time, where a progress bar can follow."""

    def encode_part(number: int, part: Dataset) -> Dataset:
        random = np.random.default_rng((seed, number))
        return part.map(
            lambda batch: encode(batch, random),
            batched=True,
            remove_columns=part.column_names,
            load_from_cache_file=False,  # which may hold rows that another version of this code made
        )

    parts = [
        rows.select(range(start, min(start + ROWS_AT_ONCE, len(rows))))
        for start in range(0, len(rows) or 1, ROWS_AT_ONCE)
    ]
    shown = track(parts, "Tokenizing") if len(parts) > 1 else parts
    return concatenate_datasets([encode_part(number, part) for number, part in enumerate(shown)])


def say_what_was_cut(
    task: Task,
    answers: Sequence[Any],
    ends: Sequence[int],
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """One line about the answers that were cut off."""
    n_answers = sum(any(answer["text"]) for answer in answers)
    if n_cut := n_answers - sum(end > 0 for end in ends):
        say(
            f"{task.name}: {n_cut} of {n_answers} answers end past token {max_length} and count as no answer"
            + how_to_read_further(tokenizer, max_length)
        )


def _tags(
    task: Task,
    offsets: list[Any],
    words: list[list[str]],
    given: list[Any] | None,
    code: Callable[[Any], int],
) -> list[list[int]]:
    """For each token the tag of its word where it is the word's first token, else `IGNORED`.

    Text without tags gets 0 at those places, which marks where predictions are compared.
    """
    aligned = []
    for row, spans in enumerate(offsets):
        n_words = len(words[row])
        tags = [0] * n_words
        if given is not None:
            tags = [IGNORED if is_ignored(tag) else code(tag) for tag in labels_in(task.kind, given[row])]
        if len(tags) != n_words:
            raise UserError(
                f"{task.name}: a row has {n_words} words and {len(tags)} tags in {task.label!r}; "
                "expected one tag for each word"
            )
        # a space is the next word's: some tokenizers make a token of it, or begin one with it
        word_of = [number for number, word in enumerate(words[row]) for _ in f" {word}"][1:]
        seen, labels = -1, []
        for start, end in spans:
            word = word_of[end - 1] if end > start else -1
            labels.append(tags[word] if word > seen else IGNORED)
            seen = max(seen, word)
        aligned.append(labels)
    return aligned


def _split(value: str | list[str]) -> list[str]:
    """Words as a list; a CSV file holds them as one text with spaces between."""
    return value.split() if isinstance(value, str) else list(value)


def _spans(task: Task, encoded: Any, contexts: list[str], answers: list[Any]) -> Columns:
    """The first and last token of each row's first answer; both 0 where the text was cut before it."""
    starts, ends = [], []
    for row, value in enumerate(answers):
        first, last = 0, 0
        if answer := _first_answer(task, contexts[row], value):
            begin, end = answer
            context = [part == 1 for part in encoded.sequence_ids(row)]
            inside = [
                token
                for token, (start, stop) in enumerate(encoded["offset_mapping"][row])
                if context[token] and start < end and stop > begin
            ]
            whole = bool(inside) and encoded["offset_mapping"][row][inside[-1]][1] >= end
            first, last = (inside[0], inside[-1]) if whole else (0, 0)
        starts.append(first)
        ends.append(last)
    return {"start_positions": starts, "end_positions": ends}


def _first_answer(task: Task, context: str, value: Any) -> tuple[int, int] | None:
    """Where a row's first answer begins and ends in its context; none where there is no answer.

    Raises:
        UserError: For what is not written as SQuAD writes it, or does not stand where it says.
    """
    try:
        texts, starts = value["text"], value["answer_start"]
        if len(texts) == len(starts) == 0:
            return None
        begin, end = starts[0], starts[0] + len(texts[0])
        if context[begin:end] == texts[0]:
            return begin, end
    except (TypeError, KeyError, IndexError):
        pass
    raise UserError(
        f"{task.name}: {value!r} in column {task.label!r} is no answer; expected the lists `text` and "
        "`answer_start`, the place of the text in its context, both empty where there is no answer"
    )


def _mask(
    rows: list[list[int]], tokenizer: PreTrainedTokenizerBase, random: np.random.Generator
) -> list[list[int]]:
    """Masks tokens in `rows`, in place, at least one in each; gives what they were, `IGNORED` elsewhere."""
    if tokenizer.mask_token_id is None:
        raise UserError("the tokenizer has no mask token; a masked language model needs one")
    special, labels = set(tokenizer.all_special_ids), []
    for ids in rows:
        words = [place for place, token in enumerate(ids) if token not in special]
        n_masked = max(1, round(MASKED_SHARE * len(words))) if words else 0
        row = [IGNORED] * len(ids)
        for place in random.permutation(words)[:n_masked]:
            row[place], ids[place] = ids[place], tokenizer.mask_token_id
        labels.append(row)
    return labels
