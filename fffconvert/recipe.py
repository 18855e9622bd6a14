"""What to make of which model: a recipe, in YAML and as frozen values. It travels with the weights."""

from __future__ import annotations

import types
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from difflib import get_close_matches
from math import inf
from numbers import Real
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from fffconvert.errors import UserError
from fffconvert.tree import DEFAULT_TREE, TreeShape

RECIPE = "recipe.yaml"
"""Beside a model's weights: how it was made."""

Control = Literal["removed", "narrow", "random", "neurons"]

Init = Literal["inputs", "neurons", "random"]
"""What is clustered to grow trees: the FFNs' inputs, their neurons, or nothing."""

CALIBRATION_TOKENS = 131_072
MAX_LENGTH = 128

LARGEST_SEED = 2**31 - 1  # NumPy takes twice that, and layers and processes count on from it


def check_whole(name: str, value: Any, least: int) -> None:
    """Raises a `UserError` for what is no whole number, or too small a one."""
    if type(value) is not int or value < least:
        raise UserError(f"{name} is {value!r}; expected a whole number of at least {least}")


def checked_number(name: str, value: Any) -> float:
    """A number, NumPy's too, as YAML can hold it. Raises a `UserError` for anything else."""
    if not isinstance(value, Real):
        raise UserError(f"{name} is {value!r}; expected a number")
    return float(value)


def check_init(init: Any) -> None:
    """Raises a `UserError` for what no tree is grown from."""
    if init not in get_args(Init):
        raise UserError(f"init is {init!r}; expected one of {', '.join(get_args(Init))}")


@dataclass(frozen=True)
class Training:
    """How one model is trained.

    Attributes:
        epochs: Passes over the training rows.
        learning_rate: Its peak; it rises over `warmup` and then falls linearly to 0.
        batch_size: Rows in a batch, over all processes together.
        gradient_accumulation: Batches per optimizer step.
        warmup: Share of the steps over which the learning rate rises.
        weight_decay: AdamW's.
        max_grad_norm: Gradients are clipped to this norm.
        checkpoint_every: Steps between checkpoints.

    Raises:
        UserError: For a value out of its range.
    """

    epochs: int = 3
    learning_rate: float = 3e-4
    batch_size: int = 32
    gradient_accumulation: int = 1
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "gradient_accumulation", "checkpoint_every"):
            check_whole(name, getattr(self, name), 1)
        for name in ("learning_rate", "warmup", "weight_decay", "max_grad_norm"):
            object.__setattr__(self, name, checked_number(name, getattr(self, name)))
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < inf:
                raise UserError(f"{name} is {getattr(self, name)}; expected a finite number above 0")
        if not 0 <= self.weight_decay < inf:
            raise UserError(f"weight_decay is {self.weight_decay}; expected a finite number of at least 0")
        if not 0 <= self.warmup < 1:
            raise UserError(f"warmup is {self.warmup}; expected a share of at least 0 and below 1")


FINETUNE = Training(learning_rate=5e-5, weight_decay=0.01)
"""What makes a good teacher of a BERT on GLUE."""

DISTILL = Training()
"""What recovers a converted model's accuracy."""


@dataclass(frozen=True)
class DataSource:
    """Rows of one's own.

    Attributes:
        path: A file (CSV, TSV, JSON, JSONL, Parquet, or text with one text per line), a folder with a file for
            each split, or the id of a dataset on the Hub.
        text: The one or two columns that hold the text; guessed from their names if not given.
        label: The column that holds the labels; likewise.
        subset: Which of a Hub dataset's configurations.
        train: The split to train on; `train`, or the only one, if not given.
        validation: The split to evaluate on; `validation` or `test` if not given, and rows held out of
            the training split where there is neither.
    """

    path: str
    text: tuple[str, ...] = ()
    label: str | None = None
    subset: str | None = None
    train: str | None = None
    validation: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.path, Path):
            object.__setattr__(self, "path", str(self.path))
        if self.path == "":
            raise UserError(
                "data.path is empty; expected a file, a folder, or the id of a dataset on the Hub"
            )
        if isinstance(self.text, str):  # whose letters would be taken for columns
            object.__setattr__(self, "text", (self.text,))


def check_seed(seed: int) -> None:
    """Raises a `UserError` for a seed that NumPy or a process of many could not count on from."""
    if type(seed) is not int or not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"seed is {seed!r}; expected a whole number from 0 to {LARGEST_SEED}")


@dataclass(frozen=True)
class Recipe:
    """A whole conversion, from a model's id to a folder.

    Attributes:
        model: Hub id or folder of the dense model.
        task: GLUE task to distil and evaluate on. Either this, or `text`, or `data`.
        text: File with one text per line: distils without labels, and holds out some lines.
        data: Rows of one's own, with labels or without.
        tree: Shape of every layer's tree.
        init: What is clustered to grow the trees.
        calibration_tokens: Tokens of text that the trees are grown on.
        train_rows: Rows to train on, drawn at random; all of them if not given.
        held_out: Rows of `text`, or of `data` without a split to evaluate on, kept for evaluation.
        max_length: Tokens that texts are cut at.
        min_retention: The command fails, when all is written, for a student with less of its teacher's score.
        finetune: Makes the teacher from `model` first; without it `model` is the teacher. What a file leaves open is
            as in `FINETUNE`.
        distill: How the student is trained.
        controls: Students given the same data, steps and seed, to compare with: `removed` has no FFN but a
            bias, `narrow` a dense FFN with as many neurons as the tree has active, `random` the same tree with
            random weights, `neurons` the same tree grown by clustering the FFN's neurons.
        seed: Decides every draw.

    Raises:
        UserError: For none or several of `task`, `text` and `data`, or a value out of its range.
    """

    model: str
    task: str | None = None
    text: str | None = None
    data: DataSource | None = None
    tree: TreeShape = DEFAULT_TREE
    init: Init = "inputs"
    calibration_tokens: int = CALIBRATION_TOKENS
    train_rows: int | None = None
    held_out: int = 500
    max_length: int = MAX_LENGTH
    min_retention: float | None = None
    finetune: Training | None = None
    distill: Training = DISTILL
    controls: tuple[Control, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("model", "text"):
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        if [self.task, self.text, self.data].count(None) != 2:
            raise UserError(
                "a recipe names exactly one of `task` (a GLUE task), `text` (a file) and `data` (your own)"
            )
        if self.text is not None and self.finetune is not None:
            raise UserError("`finetune` needs a `task` or `data`: text alone has no labels to learn")
        for name in ("calibration_tokens", "held_out", "train_rows", "max_length"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        check_init(self.init)
        known = get_args(Control)
        if not isinstance(self.controls, list | tuple) or not set(self.controls) <= set(known):
            raise UserError(f"controls are {self.controls!r}; expected a tuple of some of {', '.join(known)}")
        if len(set(self.controls)) < len(self.controls):
            raise UserError(f"controls are {', '.join(self.controls)}; expected each once")
        if self.min_retention is not None:
            object.__setattr__(self, "min_retention", checked_number("min_retention", self.min_retention))
            if not 0 < self.min_retention <= 1:
                raise UserError(f"min_retention is {self.min_retention}; expected a share such as 0.98")
        check_seed(self.seed)

    def to_yaml(self) -> str:
        """The recipe as YAML that `load_recipe` reads back."""
        return yaml.safe_dump(asdict(self), sort_keys=False)


def load_recipe(file: Path | str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        file: A YAML file.
        overrides: `key=value` strings that win over the file; `distill.epochs=2` reaches inside.

    Raises:
        UserError: For a file that cannot be read, an unknown or missing key, or a value of the wrong kind.
    """
    file = Path(file)
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), UniqueKeys)
    except OSError as error:
        raise UserError(f"{file} could not be read ({error.strerror}); expected a recipe in YAML") from error
    except (yaml.YAMLError, ValueError) as error:  # of no UTF-8, or a date in a thirteenth month
        raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no keys; expected a recipe such as `model: ...` and `task: ...`")
    for override in overrides:
        _set(values, override)
    if isinstance(values.get("finetune"), dict):  # what makes a student is too much for a teacher
        values["finetune"] = {**asdict(FINETUNE), **values["finetune"]}
    recipe: Recipe = from_plain(Recipe, values, where=file.name)
    return recipe


MERGE = "tag:yaml.org,2002:merge"  # `<<: *other`


class UniqueKeys(yaml.SafeLoader):
    """YAML in which no key comes twice: the standard loader takes the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys differ."""
        seen = []
        for part in (key for key, _ in node.value if key.tag != MERGE):
            key = self.construct_object(part)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} comes twice", part.start_mark
                )
            seen.append(key)
        return super().construct_mapping(node, deep)


def _set(values: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"--set {override}: expected key=value, such as distill.epochs=2")
    *sections, key = path.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        if not isinstance(values[section], dict):
            raise UserError(f"--set {override}: {section} holds no keys of its own")
        values[section] = dict(values[section])  # which in YAML may be another section too
        values = values[section]
    try:
        values[key] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--set {override}: {value} is not YAML") from error


def from_plain(cls: type, values: Any, where: str) -> Any:
    """A dataclass from plain values, strictly: unknown keys and wrong kinds are errors that name them.

    Args:
        cls: A dataclass.
        values: What YAML gave.
        where: What an error message calls the place.

    Raises:
        UserError: For anything that does not fit.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where} is {values!r}; expected keys such as {', '.join(_names(cls)[:3])}")
    for key in values:
        if key not in _names(cls):
            close = get_close_matches(str(key), _names(cls), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(_names(cls))}"
            raise UserError(f"{where}: unknown key {key!r}; {hint}")
    for item in fields(cls):
        if item.default is MISSING and item.default_factory is MISSING and item.name not in values:
            raise UserError(f"{where}: key {item.name!r} is missing")
    hints = get_type_hints(cls)
    try:
        return cls(**{key: _coerced(hints[key], value, f"{where}: {key}") for key, value in values.items()})
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error


def _names(cls: type) -> list[str]:
    return [item.name for item in fields(cls)]


def _coerced(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint` asks for it."""
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (option for option in get_args(hint) if option is not type(None))
    if is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, value, where)
    if hint == tuple[str, ...] and isinstance(value, str):
        value = (value,)
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(_coerced(get_args(hint)[0], item, where) for item in value)
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        raise UserError(f"{where} is {value!r}; expected one of {', '.join(get_args(hint))}")
    if hint is float and isinstance(value, str | int) and type(value) is not bool:
        try:
            return float(value)  # YAML 1.1 reads 2e-4 as a string
        except (ValueError, OverflowError):
            pass
    if type(value) is not hint:
        kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(
            hint, "a list"
        )
        raise UserError(f"{where} is {value!r}; expected {kind}")
    return value
