"""The whole story on one page: from a recipe to a folder that can be published.

Work in progress lies in `OUTPUT.work`: every stage is written there whole, and is not done again when
the run is resumed. The last step gives the result its name and deletes the rest.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from fffconvert.accelerator import check_tracker, process_state, wait_for_everyone
from fffconvert.calibration import Calibration, calibrate
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
from fffconvert.conversion import build, check_tree
from fffconvert.data import Data, check_model, read_data
from fffconvert.display import is_main_process, say
from fffconvert.distillation import distill
from fffconvert.errors import UserError
from fffconvert.evaluation import Judge
from fffconvert.families import family_of
from fffconvert.finetuning import finetune
from fffconvert.folders import locked, write_whole
from fffconvert.latency import benchmark
from fffconvert.recipe import RECIPE, Init, Recipe
from fffconvert.report import read_report
from fffconvert.resumption import delete_checkpoints, digest_of_rows, digest_of_weights, refuse_another
from fffconvert.sentence import read_modules
from fffconvert.sources import source_of
from fffconvert.tree import REMOVED, TreeShape, narrow
from fffconvert.workspace import (
    BEFORE_DISTILLATION,
    INPUTS,
    TEACHER,
    clear,
    clear_if_nothing_to_resume,
    made_by,
    open_work,
    teacher_folder,
)

CONVERTED = "converted"


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


def planned_students(recipe: Recipe, config: PreTrainedConfig) -> dict[str, tuple[TreeShape, Init]]:
    """What to train by name, shape and init: the recipe's tree for a dense model, then its controls."""
    tree = family_of(config).shape_for(config, recipe.tree)
    controls: dict[str, tuple[TreeShape, Init]] = {
        "removed": (REMOVED, "inputs"),
        "narrow": (narrow(tree), "inputs"),
        "random": (tree, "random"),
        "neurons": (tree, "neurons"),
    }
    return {CONVERTED: (tree, recipe.init), **{name: controls[name] for name in recipe.controls}}


@dataclass
class Students:
    """Makes the students of a run, which share teacher, data, calibration and judge."""

    recipe: Recipe
    teacher: Loaded
    data: Data
    work: Path
    log_with: str | None

    @cached_property
    def calibration(self) -> Calibration:
        """Text as the teacher reads it."""
        model, tokenizer = self.teacher.model, self.teacher.tokenizer
        r = self.recipe
        return calibrate(model, tokenizer, self.data.texts, r.calibration_tokens, r.seed, r.max_length)

    @cached_property
    def judge(self) -> Judge:
        """Scores any model beside the teacher."""
        return Judge(
            self.teacher.tokenizer,
            self.data.task,
            self.data.validations,
            self.teacher.model,
            self.teacher.pooling,
        )

    def make(self, name: str, shape: TreeShape, init: Init) -> None:
        """Converts, distils, evaluates and writes one student to the work folder, unless it is there."""
        if (self.work / name).exists():
            return
        say(f"{name}: {shape.active_neurons:g} active neurons per token", style="bold")
        start = self.work / f"{name}{BEFORE_DISTILLATION}"
        self.convert(start, shape, init)
        model = load(start).model
        distill(
            model,
            self.teacher.model,
            self.teacher.tokenizer,
            self.data.rows,
            self.recipe.distill,
            seed=self.recipe.seed,
            checkpoints=self.work / f"{name}.checkpoints",
            log_with=self.log_with,
            pooling=self.teacher.pooling,
        )
        scores = {**self.judge(model).to_dict(), "columns": list(self.data.task.columns)}
        report = {"scores": scores, **read_report(start)}
        save(replace(self.teacher, model=model), self.work / name, report=report)
        wait_for_everyone()
        if is_main_process():
            shutil.rmtree(start)
        delete_checkpoints(self.work / f"{name}.checkpoints")

    def convert(self, folder: Path, shape: TreeShape, init: Init) -> None:
        """Converts a student and scores it before distillation, unless it is there; a resumed run goes on from that."""
        if folder.exists():
            return
        conversion = build(self.calibration, shape, init)
        report = {
            "before_distillation": self.judge(conversion.model).to_dict(),
            "layers": [layer.to_dict() for layer in conversion.layers],
        }
        save(replace(self.teacher, model=conversion.model), folder, report=report)
        wait_for_everyone()


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
