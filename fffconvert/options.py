"""Options that several commands share, each a decorator."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import click

from fffconvert.errors import UserError
from fffconvert.recipe import LARGEST_SEED, MAX_LENGTH, DataSource, Training
from fffconvert.tree import DEFAULT_TREE

Command = TypeVar("Command", bound=Callable[..., Any])

FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)

TASK_HELP = "GLUE task: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or wnli."


option_data_dir = click.option(
    "--data-dir",
    type=FOLDER,
    metavar="DIR",
    help="Read GLUE from DIR/TASK/SPLIT.parquet instead of from the Hub.",
)

option_log_with = click.option(
    "--log-with",
    metavar="TRACKER",
    help="Log training to a tracker that Accelerate knows, such as wandb or tensorboard; files go to the folder runs.",
)

option_seed = click.option(
    "--seed",
    type=click.IntRange(0, LARGEST_SEED),
    default=0,
    show_default=True,
    help="Decides every random draw.",
)

option_dry_run = click.option(
    "--dry-run",
    is_flag=True,
    help="Only show what would be made: sizes, active share, expected memory and time. Writes nothing.",
)

option_max_length = click.option(
    "--max-length",
    type=click.IntRange(2),
    default=MAX_LENGTH,
    show_default=True,
    help="Truncate texts to this many tokens.",
)


class Finite(click.FloatRange):
    """A range of numbers, without NaN and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """As click does, which lets them through."""
        found: float = super().convert(value, param, ctx)
        return found if isfinite(found) else self.fail(f"{value} is not finite.", param, ctx)


option_min_retention = click.option(
    "--min-retention",
    type=Finite(0, 1, min_open=True),
    metavar="SHARE",
    help="Fail, when all is written, below this share of the teacher's score, such as 0.98.",
)


def option_json(command: Command) -> Command:
    """Adds `--json FILE`; a folder that is not there is an error before any work is done."""

    def check(_context: click.Context, _parameter: click.Parameter, file: Path | None) -> Path | None:
        if file is None:
            return None
        written = file.resolve() if file.is_symlink() else file
        if not written.parent.is_dir():
            raise UserError(f"--json {file}: there is no folder {written.parent}")
        if not os.access(written if written.exists() else written.parent, os.W_OK):
            raise UserError(f"--json {file} cannot be written; name another file")
        return file

    text = "Also write the result as JSON."
    return click.option("--json", "json_file", type=FILE, metavar="FILE", callback=check, help=text)(command)


def option_size(command: Command) -> Command:
    """Adds `--size BATCHxLENGTH`, any number of times; the command gets pairs, as `sizes`."""

    def parse(
        _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
    ) -> tuple[tuple[int, int], ...]:
        sizes = []
        for value in values:
            batch, _, length = value.partition("x")
            if not (batch.isdecimal() and length.isdecimal() and int(batch) and int(length)):
                raise UserError(f"--size {value}: expected batch and length, such as 8x128")
            sizes.append((int(batch), int(length)))
        return tuple(sizes)

    text = "Time the whole models at this size, and no layer. May be repeated."
    return click.option("--size", "sizes", multiple=True, metavar="BATCHxLENGTH", callback=parse, help=text)(
        command
    )


def data_options(command: Command) -> Command:
    """Adds `--data` and what belongs to it; the command gets one `DataSource` or none, as `data`."""

    @functools.wraps(command)
    def with_source(
        *args: Any,
        data: str | None,
        text_column: tuple[str, ...],
        label_column: tuple[str, ...],
        split: str | None,
        subset: str | None,
        **rest: Any,
    ) -> Any:
        if data is None and (text_column or label_column or split or subset):
            raise UserError("--text-column, --label-column, --split and --subset go with --data")
        if len(label_column) > 1:
            raise UserError(
                "--label-column is given more than once; expected one column, with all labels of a row"
            )
        label = next(iter(label_column), None)
        if data is None:
            return command(*args, data=None, **rest)
        source = DataSource(data, text_column, label, subset=subset, train=split, validation=split)
        return command(*args, data=source, **rest)

    options = (
        click.option(
            "--data",
            metavar="FILE|FOLDER|ID",
            help="Data of your own: a CSV, TSV, JSON, JSONL, Parquet or text file, a folder of them, or a dataset "
            "on the Hub.",
        ),
        click.option(
            "--text-column",
            metavar="NAME",
            multiple=True,
            help="The column of text; twice for pairs. Guessed if not given.",
        ),
        click.option(
            "--label-column",
            metavar="NAME",
            multiple=True,
            help="The column of labels. Guessed if not given.",
        ),
        click.option("--split", metavar="NAME", help="The split of --data to use."),
        click.option("--subset", metavar="NAME", help="Which configuration of a Hub dataset."),
    )
    return decorated(with_source, options)


def tree_options(command: Command) -> Command:
    """Adds what says how a tree is shaped: the fields of a `TreeShape`, each by its name."""
    shape = DEFAULT_TREE
    options = (
        click.option(
            "--depth",
            default=shape.depth,
            show_default=True,
            help="Levels of routers; 2^depth leaves. 0 is a dense FFN.",
        ),
        click.option("--leaf-width", default=shape.leaf_width, show_default=True, help="Neurons in a leaf."),
        click.option(
            "--trunk", default=shape.trunk, show_default=True, help="Neurons that every token uses."
        ),
        click.option("--trees", default=shape.trees, show_default=True, help="Parallel trees, summed."),
        click.option("--emitting", is_flag=True, help="Routers are neurons too, as in UltraFastBERT."),
        click.option(
            "--linear/--nonlinear",
            default=None,
            help="Neurons without activation, or with the dense model's. Default: without, in a tree's leaves "
            "of at most d_model/8 neurons.",
        ),
    )
    return decorated(command, options)


def decorated(command: Any, options: tuple[Callable[[Any], Any], ...]) -> Any:
    """Adds options so that `--help` lists them in the order given."""
    for option in reversed(options):
        command = option(command)
    return command


def training_options(defaults: Training) -> Callable[[Any], Any]:
    """Adds what a training run can be told, with the defaults of a command."""
    named = {
        "epochs": "Passes over the rows.",
        "learning_rate": "Peak learning rate.",
        "batch_size": "Rows in a batch, over all processes.",
    }
    options = (
        *(
            click.option(
                f"--{name.replace('_', '-')}", default=getattr(defaults, name), show_default=True, help=text
            )
            for name, text in named.items()
        ),
        click.option(
            "--train-rows", type=click.IntRange(1), help="Train on this many rows, drawn at random."
        ),
    )
    return functools.partial(decorated, options=options)
