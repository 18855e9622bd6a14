"""The command line: each command parses, loads, calls the public function of the same name, saves and prints."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import click

from fffconvert import __version__, display
from fffconvert.errors import UserError
from fffconvert.options import (
    FILE,
    FOLDER,
    TASK_HELP,
    Finite,
    data_options,
    option_data_dir,
    option_dry_run,
    option_json,
    option_log_with,
    option_max_length,
    option_min_retention,
    option_seed,
    option_size,
    training_options,
    tree_options,
)
from fffconvert.recipe import CALIBRATION_TOKENS, DISTILL, FINETUNE, DataSource, Init, load_recipe
from fffconvert.tables import (
    active,
    show_comparison,
    show_estimate,
    show_info,
    show_int8,
    show_latency,
    show_layers,
    show_scores,
)
from fffconvert.tree import TreeShape

if TYPE_CHECKING:
    from fffconvert.checkpoint import Loaded
    from fffconvert.estimate import Estimate
    from fffconvert.sources import Source
    from fffconvert.text import Text

# What a command needs beyond click is imported when it runs: `fffconvert --help` must not wait for torch.


class Cli(click.Group):
    """A group whose commands turn every foreseen failure into one line and a non-zero exit."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of the work."""
        return list(self.commands)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a command line; its tables can be shown in a locale without arrows and dashes too."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        try:
            return super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "fffconvert"
            fail(f"{error.format_message().rstrip('.')} (see {path} --help)", code=error.exit_code)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            fail(str(error))
        except KeyboardInterrupt:
            hint = ""
            if ctx.invoked_subcommand in ("run", "finetune", "distill"):
                how = " with --resume" if ctx.invoked_subcommand == "run" else ""
                hint = f"; where it has written a checkpoint, the same command goes on from there{how}"
            fail(f"interrupted{hint}", code=130)
        except OSError as error:
            if error.errno is None:
                raise  # no file's or disk's fault
            fail(f"{error.filename or 'the output'} could not be read or written ({error.strerror})")
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "allocate" not in str(error):
                raise  # PyTorch has no narrower class for memory of the CPU
            fail("there is not enough memory; use a smaller tree, a smaller batch, or fewer tokens")


def fail(message: str, code: int = 1) -> NoReturn:
    """Prints one line on stderr and exits."""
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(code)


def write_json(file: Path | None, value: Any) -> None:
    """Writes a result where `--json` asked for it; before it is shown, which a closed pipe may end."""
    if file is not None and display.is_main_process():
        file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def show_dry_run(model: str, found: Estimate, json_file: Path | None) -> None:
    """Shows what a command would make of a model and cost."""
    write_json(json_file, found.to_dict())
    show_estimate(model, found)


def quiet_libraries() -> None:
    """Keeps the progress bars and loading reports of `transformers` and `datasets` off the screen."""
    import datasets
    import huggingface_hub
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # of weights that are tied, at every checkpoint
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors come as exceptions too
    huggingface_hub.logging.set_verbosity_error()


@click.group(
    "fffconvert",
    cls=Cli,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__)
@click.pass_context
def main(context: click.Context) -> None:
    """Turn a trained BERT-family model into the same model with fast feedforward trees for FFNs.

    Each token then walks one path of a tree and uses about 1% of the neurons. MODEL is a Hub id or a
    folder everywhere.

    \b
    The whole way, from one recipe:
      fffconvert run recipes/minilm-sst2.yaml --output models/sst2
    Step by step:
      fffconvert finetune MODEL teacher --task sst2
      fffconvert convert teacher student --calibration sst2
      fffconvert distill student distilled --teacher teacher --task sst2
      fffconvert evaluate distilled --task sst2 --teacher teacher
      fffconvert benchmark distilled
      fffconvert quantize distilled distilled-int8
      fffconvert export distilled graph
      fffconvert push distilled user/name
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@main.command(short_help="Do all that a recipe says, with controls.")
@click.argument("recipe_file", metavar="RECIPE", type=FILE)
@click.option("--model", metavar="MODEL", help="Use this model instead of the recipe's.")
@click.option("--output", required=True, type=FOLDER, help="New folder for the converted model.")
@option_data_dir
@click.option("--resume", is_flag=True, help="Go on with a run that was killed, from its last checkpoint.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the recipe, as in distill.epochs=2.",
)
@option_min_retention
@option_dry_run
@option_log_with
@option_json
def run(
    recipe_file: Path,
    model: str | None,
    output: Path,
    data_dir: Path | None,
    resume: bool,
    overrides: tuple[str, ...],
    min_retention: float | None,
    dry_run: bool,
    log_with: str | None,
    json_file: Path | None,
) -> None:
    """Do all that a recipe says: fine-tune the teacher, convert, distil, evaluate beside controls, save.

    A run that was killed goes on with --resume. Work in progress lies in OUTPUT.work until the end.

    \b
    fffconvert run recipes/minilm-sst2.yaml --output models/sst2 --set distill.epochs=2
    """
    given = {"model": model, "min_retention": min_retention}
    named = (f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None)
    recipe = load_recipe(recipe_file, (*overrides, *named))
    quiet_libraries()
    from fffconvert import pipeline, workspace
    from fffconvert.accelerator import check_tracker
    from fffconvert.dry_run import estimate_run
    from fffconvert.report import REPORT
    from fffconvert.scores import require_retention

    if dry_run:
        if log_with:
            check_tracker(log_with)
        if not resume:
            workspace.check_outputs(recipe, output)
        show_dry_run(recipe.model, estimate_run(recipe, data_dir), json_file)
        return
    result = pipeline.run(recipe, output, data_dir=data_dir, resume=resume, log_with=log_with)
    if not display.is_main_process():
        return
    write_json(json_file, result.report)
    show_comparison(result.report)
    show_latency(result.report["latency"])
    display.say(
        f"The converted model is in {result.output}"
        + (f", its teacher in {result.teacher}" if result.teacher else "")
    )
    retention = result.report["scores"]["retention"]
    require_retention(retention, recipe.min_retention, result.output / REPORT)


@main.command(short_help="Make a teacher: fine-tune a dense model.")
@click.argument("model")
@click.argument("output", type=FOLDER)
@click.option("--task", help=TASK_HELP)
@data_options
@option_data_dir
@option_max_length
@training_options(FINETUNE)
@option_seed
@option_log_with
def finetune(
    model: str,
    output: Path,
    task: str | None,
    data: DataSource | None,
    data_dir: Path | None,
    max_length: int,
    train_rows: int | None,
    seed: int,
    log_with: str | None,
    **training: Any,
) -> None:
    """Fine-tune a dense MODEL on a task or on your own labelled data, to make a teacher.

    A killed run goes on from its last checkpoint when the same command is given again.

    \b
    fffconvert finetune bert-base-uncased teacher --task mrpc
    fffconvert finetune bert-base-uncased teacher --data train.csv --label-column stars
    """
    quiet_libraries()
    from fffconvert import checkpoint, finetuning, folders
    from fffconvert.data import read_data
    from fffconvert.sources import source_of

    settings = replace(FINETUNE, **training)
    folders.refuse_existing(output)
    found = read_data(
        source_of(task, None, data),
        checkpoint.load_tokenizer(model, checkpoint.load_config(model)),
        None,
        data_dir=data_dir,
        train_rows=train_rows,
        max_length=max_length,
        seed=seed,
    )
    loaded = checkpoint.load_for_task(model, found.task, seed)
    with checkpoints_of(output) as checkpoints:
        finetuning.finetune(
            loaded.model,
            loaded.tokenizer,
            found.rows,
            settings,
            seed=seed,
            checkpoints=checkpoints,
            log_with=log_with,
        )
        checkpoint.save(loaded, output)
    display.say(f"The teacher is in {output}")


@main.command(short_help="Replace FFNs by trees, without any training.")
@click.argument("model")
@click.argument("output", type=FOLDER)
@tree_options
@click.option(
    "--init",
    type=click.Choice(get_args(Init)),
    default="inputs",
    show_default=True,
    help="What is clustered: the FFNs' inputs, their neurons, or nothing.",
)
@click.option(
    "--calibration",
    metavar="FILE|TASK",
    help="Text to calibrate on: one text per line, or a GLUE task. Without it, Python's documentation serves.",
)
@data_options
@option_data_dir
@option_max_length
@click.option(
    "--calibration-tokens",
    type=click.IntRange(1),
    default=CALIBRATION_TOKENS,
    show_default=True,
    help="Calibration tokens to use; more make better trees, and take memory.",
)
@option_seed
@click.option("--int8", is_flag=True, help="Store projections in int8, trees in bfloat16; not for training.")
@option_dry_run
@option_json
def convert(
    model: str,
    output: Path,
    init: Any,
    calibration: str | None,
    data: DataSource | None,
    data_dir: Path | None,
    max_length: int,
    calibration_tokens: int,
    seed: int,
    int8: bool,
    dry_run: bool,
    json_file: Path | None,
    **shape: Any,
) -> None:
    """Replace every FFN of MODEL by a tree, grown and fitted on what the FFN does to text: no training.

    Text like what the model will read makes the best trees; no labels are needed. Distil the result to
    recover accuracy.

    \b
    fffconvert convert bert-base-uncased student --calibration my-texts.txt
    """
    quiet_libraries()
    from fffconvert import checkpoint, conversion, folders
    from fffconvert.configuration import active_neurons, dense_neurons
    from fffconvert.dry_run import estimate_conversion

    if dry_run and int8:
        raise UserError("--dry-run knows no sizes of --int8; leave that one out")
    asked = (TreeShape(**shape), init, calibration_tokens)
    conversion.check_tree(*asked)  # before a model is read
    folders.refuse_existing(output)
    source = calibration_data(calibration, data)
    if dry_run:
        found = estimate_conversion(model, source, *asked, seed, max_length, data_dir=data_dir)
        show_dry_run(model, found, json_file)
        return
    loaded = checkpoint.load(model)
    texts = calibration_texts(source, loaded, data_dir)
    made = conversion.convert(loaded.model, loaded.tokenizer, texts, *asked, seed, max_length)
    report: dict[str, Any] = {"layers": [layer.to_dict() for layer in made.layers]}
    converted = replace(loaded, model=made.model)
    if int8:
        converted, report["int8"] = quantized(converted)
    checkpoint.save(converted, output, report=report)
    write_json(json_file, report)
    show_layers(report["layers"])
    if int8:
        show_int8(report["int8"])
    config = made.model.config
    neurons = active(active_neurons(config), dense_neurons(config))
    display.say(f"The converted model is in {output}; every token uses {neurons} in each layer")


def calibration_data(calibration: str | None, data: DataSource | None) -> Source | None:
    """What `--calibration` or `--data` names; nothing where neither is given."""
    from fffconvert.sources import source_of
    from fffconvert.tasks import TASKS

    if calibration is None:
        return data
    if data is not None:
        raise UserError("--calibration and --data are both given; expected one of them")
    if calibration in TASKS:
        return TASKS[calibration]
    if not Path(calibration).is_file():
        raise UserError(f"--calibration {calibration} is neither a file nor a task ({', '.join(TASKS)})")
    return source_of(None, calibration, None)


def calibration_texts(source: Source | None, loaded: Loaded, data_dir: Path | None) -> Iterable[Text]:
    """The texts of a source, or what serves without one."""
    from fffconvert.data import read_texts
    from fffconvert.python_docs import standard_library_sentences

    if source is not None:
        return read_texts(source, loaded.model.config, data_dir, loaded.prompt)
    display.say("Calibrating on Python's own documentation; --calibration with text like yours works better")
    return (loaded.prompt + sentence for sentence in standard_library_sentences())


@main.command(short_help="Teach a converted model what its teacher does.")
@click.argument("student")
@click.argument("output", type=FOLDER)
@click.option("--teacher", required=True, metavar="MODEL", help="The dense model that the student came from.")
@click.option("--task", help=TASK_HELP)
@click.option("--text", type=FILE, help="Distil on the lines of a text file, without labels.")
@data_options
@option_data_dir
@option_max_length
@training_options(DISTILL)
@option_seed
@option_log_with
def distill(
    student: str,
    output: Path,
    teacher: str,
    task: str | None,
    text: Path | None,
    data: DataSource | None,
    data_dir: Path | None,
    max_length: int,
    train_rows: int | None,
    seed: int,
    log_with: str | None,
    **training: Any,
) -> None:
    """Train STUDENT to give its teacher's logits and hidden states, on a task's texts or your own.

    A killed run goes on from its last checkpoint when the same command is given again. For several
    processes or GPUs: accelerate launch -m fffconvert distill ...

    \b
    fffconvert distill student distilled --teacher teacher --task sst2
    fffconvert distill student distilled --teacher teacher --data train.csv
    """
    settings = replace(DISTILL, **training)
    quiet_libraries()
    from fffconvert import checkpoint, distillation, folders
    from fffconvert.data import read_data
    from fffconvert.pair import check_same_tokenizer
    from fffconvert.report import fits_of
    from fffconvert.sources import source_of

    folders.refuse_existing(output)
    source = source_of(task, text, data)
    loaded, dense = checkpoint.load(student), checkpoint.load(teacher)
    distillation.check_distillable(loaded.model, dense.model)
    check_same_tokenizer(loaded.tokenizer, dense.tokenizer)
    layers = fits_of(student)  # read before the training, should it be no JSON
    found = read_data(
        source,
        loaded.tokenizer,
        loaded.model.config,
        data_dir=data_dir,
        train_rows=train_rows,
        max_length=max_length,
        seed=seed,
        labelled=False,
        prompt=loaded.prompt,
    )
    with checkpoints_of(output) as checkpoints:
        distillation.distill(
            loaded.model,
            dense.model,
            loaded.tokenizer,
            found.rows,
            settings,
            seed=seed,
            checkpoints=checkpoints,
            log_with=log_with,
            pooling=dense.pooling,
        )
        checkpoint.save(replace(loaded, name=teacher), output, report={"layers": layers})
    display.say(f"The distilled model is in {output}")


@contextmanager
def checkpoints_of(output: Path) -> Iterator[Path]:
    """Where the checkpoints of a command that writes `output` lie, for it alone; they go when it is written."""
    from fffconvert.folders import locked
    from fffconvert.resumption import delete_checkpoints

    folder = output.with_name(f"{output.name}.checkpoints")
    with locked(folder):
        yield folder
        delete_checkpoints(folder)


@main.command(short_help="Score a model, beside its teacher.")
@click.argument("model")
@click.option("--task", help=TASK_HELP)
@click.option("--text", type=FILE, help="Judge by the teacher on the lines of a text file, without labels.")
@data_options
@click.option("--teacher", metavar="MODEL", help="The dense original, for retention and agreement.")
@option_data_dir
@option_max_length
@option_min_retention
@option_json
def evaluate(
    model: str,
    task: str | None,
    text: Path | None,
    data: DataSource | None,
    teacher: str | None,
    data_dir: Path | None,
    max_length: int,
    min_retention: float | None,
    json_file: Path | None,
) -> None:
    """Score MODEL on a task or your own data, beside its teacher and for how many neurons.

    Where there are no labels, the teacher is the judge. A sentence encoder is asked --task stsb by the cosine
    of its embeddings.

    \b
    fffconvert evaluate distilled --task sst2 --teacher teacher --json scores.json
    fffconvert evaluate distilled --data test.csv --teacher teacher
    """
    quiet_libraries()
    from fffconvert import checkpoint, evaluation
    from fffconvert.data import check_model, read_validations
    from fffconvert.pair import check_same_tokenizer
    from fffconvert.scores import require_retention
    from fffconvert.sources import source_of
    from fffconvert.tasks import Task, task_for
    from fffconvert.text import readable_length

    if min_retention is not None and teacher is None:
        raise UserError("--min-retention needs a teacher to compare with: name it with --teacher")
    source = source_of(task, text, data)
    loaded = checkpoint.load(model)
    dense = checkpoint.load(teacher) if teacher else None
    if isinstance(source, Task):
        source = task_for(loaded.model.config, source)
    for each in (loaded, dense) if dense else (loaded,):
        check_model(source, each.model.config, each.name)
    if dense:
        check_same_tokenizer(loaded.tokenizer, dense.tokenizer)
    limit = readable_length(loaded.tokenizer, loaded.model.config, max_length)
    judged, splits = read_validations(
        source,
        loaded.tokenizer,
        loaded.model.config,
        data_dir=data_dir,
        max_length=limit,
        prompt=loaded.prompt,
    )
    found = evaluation.evaluate(
        loaded.model, loaded.tokenizer, judged, splits, dense.model if dense else None, loaded.pooling
    )
    read = {"rows": {name: len(rows) for name, rows in splits.items()}, "max_length": limit}
    write_json(json_file, {"model": model, "teacher": teacher, **read, **found.to_dict()})
    show_scores(model, found)
    require_retention(found.retention, min_retention, json_file)


@main.command(short_help="Time a model, beside dense and without FFNs.")
@click.argument("model")
@click.option(
    "--against", metavar="DENSE", help="The dense original. Without it, an untrained model of its size."
)
@option_size
@click.option("--full", is_flag=True, help="Time the whole grid of sizes, which takes half an hour or more.")
@click.option(
    "--seconds",
    type=Finite(min=0),
    help="Time for each size, preparation apart; more of it makes medians steadier.",
)
@option_json
def benchmark(
    model: str,
    against: str | None,
    sizes: tuple[tuple[int, int], ...],
    full: bool,
    seconds: float | None,
    json_file: Path | None,
) -> None:
    """Measure latency: a layer and the whole MODEL, beside the dense original and FFNs removed.

    Also beside both under torch.compile, beside int8, and beside both in ONNX Runtime where that is installed
    (pip install 'fffconvert[onnx]'). All is timed in turn in one run, with one thread and with all
    of them. Close other programs first: where the spread is wide, the table says so.

    \b
    fffconvert benchmark distilled --json latency.json
    fffconvert benchmark distilled --size 1x128 --size 8x128 --seconds 60
    """
    if sizes and full:
        raise UserError("--size and --full are both given; expected one of them")
    quiet_libraries()
    from fffconvert import checkpoint, latency

    dense = checkpoint.load(against).model if against else None
    grid: dict[str, Any] = {"sizes": sizes, "layer_tokens": ()} if sizes else {}
    if full:
        grid = {"sizes": latency.FULL_MODEL_SIZES, "layer_tokens": latency.FULL_LAYER_TOKENS}
    if seconds is not None:
        grid["seconds_per_row"] = seconds
    converted = checkpoint.load(model).model
    measured = latency.benchmark(converted, dense, **grid).to_dict()
    write_json(json_file, {"model": model, "tree": converted.config.fff, **measured})
    show_latency(measured)


@main.command(short_help="Store a converted model in int8, for CPUs.")
@click.argument("model")
@click.argument("output", type=FOLDER)
@option_json
def quantize(model: str, output: Path, json_file: Path | None) -> None:
    """Store the projections of a converted MODEL in int8 and its trees in bfloat16, for inference on a CPU.

    It then times both at two sizes, for about a minute. The last step: an int8 model cannot be trained. What
    it loses on a task is what evaluate says of it with MODEL for a teacher.

    \b
    fffconvert quantize distilled distilled-int8
    fffconvert evaluate distilled-int8 --task sst2 --teacher distilled
    """
    quiet_libraries()
    from fffconvert import checkpoint, folders
    from fffconvert.report import fits_of

    folders.refuse_existing(output)
    layers = fits_of(model)  # read before the work, should it be no JSON
    made, gain = quantized(checkpoint.load(model))
    checkpoint.save(made, output, report={"layers": layers, "int8": gain})
    write_json(json_file, gain)
    show_int8(gain)
    display.say(f"The int8 model is in {output}")


def quantized(loaded: Loaded) -> tuple[Loaded, dict[str, Any]]:
    """A converted model in int8, and what that loses and gains."""
    from fffconvert import latency, quantization
    from fffconvert.python_docs import standard_library_sentences

    loaded.model.float()
    made = replace(loaded, model=quantization.quantize(loaded.model))
    error = quantization.rounding_error(
        loaded.model, made.model, loaded.tokenizer, standard_library_sentences()
    )
    measured = latency.benchmark(loaded.model, sizes=((1, 128), (8, 128)), layer_tokens=(), others=False)
    return made, {"error": error, "latency": measured.to_dict()}


@main.command(short_help="Write a graph for ONNX Runtime.")
@click.argument("model")
@click.argument("output", type=FOLDER)
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["onnx"]),
    default="onnx",
    show_default=True,
    help="The graph's format.",
)
def export(model: str, output: Path, file_format: str) -> None:
    """Write MODEL, dense or converted, as a graph that other programs run.

    OUTPUT then holds model.onnx, of standard operators and with dynamic batch and length, beside the
    configuration and the tokenizer. Needs the extra `onnx`.

    \b
    fffconvert export distilled distilled-onnx --format onnx
    """
    quiet_libraries()
    from fffconvert import checkpoint, folders
    from fffconvert.export import check_exportable, export_onnx

    folders.refuse_existing(output)
    loaded = checkpoint.load(model)
    check_exportable(loaded.model)
    with folders.new_folder(output) as beside:
        display.say("Exporting; this takes a minute")
        export_onnx(loaded.model, beside / f"model.{file_format}")
        loaded.model.config.save_pretrained(beside)
        loaded.tokenizer.save_pretrained(beside)
    display.say(f"The graph is {output / f'model.{file_format}'}")


@main.command(short_help="Upload a converted model to the Hub.")
@click.argument("folder", type=FOLDER)
@click.argument("repo_id")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--dry-run", is_flag=True, help="Only show what would be sent.")
def push(folder: Path, repo_id: str, private: bool, dry_run: bool) -> None:
    """Upload the converted model in FOLDER, with its card, to REPO_ID on the Hub, in one commit.

    \b
    fffconvert push models/sst2 user/bert-sst2-fff --dry-run
    """
    quiet_libraries()
    from fffconvert import hub

    pushed = hub.push(folder, repo_id, private=private, dry_run=dry_run)
    rows = [(name, f"{size / 1e3:,.1f} kB") for name, size in pushed.files.items()]
    display.table(f"{'Would send' if dry_run else 'Sent'} to {repo_id}", ["file", "size"], rows)
    if pushed.url:
        display.say(pushed.url)


@main.command(short_help="Show a model's trees.")
@click.argument("model")
@option_json
def info(model: str, json_file: Path | None) -> None:
    """Show the trees of MODEL: shape, sizes, and how evenly their leaves are used.

    \b
    fffconvert info student
    """
    quiet_libraries()
    from fffconvert import inspection

    found = inspection.info(model)
    write_json(json_file, found.to_dict())
    show_info(found)


@main.command(short_help="Show versions, processor and kernels.")
@option_json
def env(json_file: Path | None) -> None:
    """Show versions, the processor, and which kernels are available or why not.

    \b
    fffconvert env --json env.json
    """
    quiet_libraries()
    from fffconvert import inspection

    found = inspection.env()
    write_json(json_file, found)
    display.table("Environment", ["", ""], found.items())
