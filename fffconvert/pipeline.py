"""The whole story on one page: from a recipe to a folder that can be published.

Work in progress lies in `OUTPUT.work`: every stage is written there whole, and is not done again when
the run is resumed. The last step gives the result its name and deletes the rest.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fffconvert.accelerator import check_tracker, process_state, wait_for_everyone
from fffconvert.checkpoint import (
    Loaded,
    load,
    load_config,
    load_for_task,
    load_tokenizer,
    save,
)
from fffconvert.comparison import table_of
from fffconvert.configuration import refuse_converted
from fffconvert.conversion import check_tree
from fffconvert.data import Data, check_model, read_data
from fffconvert.display import is_main_process
from fffconvert.errors import UserError
from fffconvert.finetuning import finetune
from fffconvert.folders import locked, write_whole
from fffconvert.latency import benchmark
from fffconvert.recipe import RECIPE, Recipe
from fffconvert.report import read_report
from fffconvert.resumption import delete_checkpoints, digest_of_rows, digest_of_weights, refuse_another
from fffconvert.sentence import read_modules
from fffconvert.sources import source_of
from fffconvert.students import CONVERTED, Students, planned_students
from fffconvert.workspace import (
    INPUTS,
    TEACHER,
    clear,
    clear_if_nothing_to_resume,
    made_by,
    open_work,
    teacher_folder,
)


@dataclass(frozen=True)
class Result:
    """What a run made.

    Attributes:
        output: The converted model's folder.
        teacher: The folder of the fine-tuned teacher, if the recipe asked for one.
        report: What `report.json` holds.
    """

    output: Path
    teacher: Path | None
    report: dict[str, Any]


def run(
    recipe: Recipe,
    output: Path | str,
    *,
    data_dir: Path | str | None = None,
    resume: bool = False,
    log_with: str | None = None,
) -> Result:
    """Runs a recipe: (fine-tune) → convert → distil → evaluate, with controls → measure → save.

    Args:
        recipe: What to do.
        output: A new folder. A fine-tuned teacher is kept beside it, as `OUTPUT-teacher`.
        data_dir: Folder of GLUE as Parquet, `TASK/SPLIT.parquet`; without one it comes from the Hub.
        resume: Goes on with a run that was killed, from its last checkpoint.
        log_with: A tracker that Accelerate knows, such as `tensorboard`.

    Raises:
        UserError: For anything that is wrong with the recipe, its model, its data or the folders.
    """
    if not isinstance(recipe, Recipe):
        raise UserError(f"recipe is {recipe!r}; expected a Recipe, as load_recipe reads it from a file")
    output = Path(output)
    data_dir = None if data_dir is None else Path(data_dir)
    if log_with:
        check_tracker(log_with)  # which else waits for the conversion
    work = open_work(recipe, output, resume)
    with locked(work):
        if is_main_process():
            write_whole(work / RECIPE, recipe.to_yaml())
        if made_by(recipe, output):  # killed after the last thing that it wrote
            return finish(recipe, output, work)
        try:
            return run_in_work(recipe, output, work, data_dir, log_with)
        except Exception as error:  # an interrupt leaves what a kill leaves
            if is_main_process() and not resume:
                clear_if_nothing_to_resume(work, error)
            raise


def run_in_work(
    recipe: Recipe, output: Path, work: Path, data_dir: Path | None, log_with: str | None
) -> Result:
    """As `run`, in a folder for work in progress."""
    base, data = load_base(recipe, work, data_dir)
    students = Students(recipe, make_teacher(recipe, base, data, work, log_with), data, work, log_with)
    check_inputs(students)
    for name, (shape, init) in planned_students(recipe, base.model.config).items():
        students.make(name, shape, init)
    return publish(students, output)


def check_inputs(students: Students) -> None:
    """Raises a `UserError` for a run that is resumed with another teacher or other data than it began with."""
    found = {
        "teacher": digest_of_weights(students.teacher.model),
        "data": digest_of_rows(students.data.rows),
        "set of evaluation rows": {
            split: digest_of_rows(rows) for split, rows in students.data.validations.items()
        },
    }
    file = students.work / INPUTS
    if file.exists():
        refuse_another(file, found)
    wait_for_everyone()
    if is_main_process():
        write_whole(file, json.dumps(found, indent=2))


def load_base(recipe: Recipe, work: Path, data_dir: Path | None) -> tuple[Loaded, Data]:
    """The dense model to start from, with a head for its data: the recipe's, or the teacher made of it.

    On a CPU it is in float32, whatever it was stored in: most are many times slower in half precision.
    """
    made = (work / TEACHER).exists()
    name = str(work / TEACHER) if made else recipe.model
    new_head = recipe.finetune is not None and not made
    data = read_recipe_data(recipe, name, new_head, data_dir)
    base = load_for_task(name, data.task, recipe.seed) if new_head else load(name)
    if process_state().device.type == "cpu":
        base.model.float()
    return replace(base, name=recipe.model), data


def read_recipe_data(recipe: Recipe, name: str, new_head: bool, data_dir: Path | None) -> Data:
    """A recipe's rows to train and evaluate on, tokenized for the model `name`, which may have no head yet."""
    check_tree(recipe.tree, recipe.init, recipe.calibration_tokens)
    source = source_of(recipe.task, recipe.text, recipe.data)
    config = load_config(name)
    refuse_converted(config)
    modules = None if new_head else read_modules(name)
    if modules is not None:
        modules.pooling()  # needs a library: better said now than after the conversion
    if not new_head:
        check_model(source, config, recipe.model)
    return read_data(
        source,
        load_tokenizer(name, config),
        None if new_head else config,
        data_dir=data_dir,
        train_rows=recipe.train_rows,
        held_out=recipe.held_out,
        max_length=recipe.max_length,
        seed=recipe.seed,
        prompt="" if modules is None else modules.prompt,
    )


def make_teacher(recipe: Recipe, base: Loaded, data: Data, work: Path, log_with: str | None) -> Loaded:
    """The teacher: `base` itself, or `base` fine-tuned on the recipe's task."""
    if recipe.finetune is not None and not (work / TEACHER).exists():
        finetune(
            base.model,
            base.tokenizer,
            data.rows,
            recipe.finetune,
            seed=recipe.seed,
            checkpoints=work / f"{TEACHER}.checkpoints",
            log_with=log_with,
        )
        save(base, work / TEACHER, title=teacher_folder(work.with_suffix("")).name)
        wait_for_everyone()
        delete_checkpoints(work / f"{TEACHER}.checkpoints")
    return base


def publish(students: Students, output: Path) -> Result:
    """Compares the students, measures latency, and gives the result its name."""
    work, recipe, config = students.work, students.recipe, students.teacher.model.config
    student = replace(load(work / CONVERTED), name=recipe.model)
    reports = {name: read_report(work / name) for name in planned_students(recipe, config)}
    wait_for_everyone()  # all have read what the first will delete
    report = {**reports[CONVERTED], "table": table_of(reports)}
    if is_main_process():
        report["latency"] = benchmark(student.model, students.teacher.model, others=False).to_dict()
        save(student, output, recipe, report)
    return finish(recipe, output, work)


def finish(recipe: Recipe, output: Path, work: Path) -> Result:
    """Keeps the teacher beside the result, and deletes what else was in progress."""
    teacher = teacher_folder(output) if recipe.finetune is not None else None
    if is_main_process():
        if teacher is not None and (work / TEACHER).exists():
            (work / TEACHER).rename(teacher)
        clear(work)
    wait_for_everyone()
    return Result(output, teacher, read_report(output))
