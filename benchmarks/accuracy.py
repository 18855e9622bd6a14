"""What the FFN is worth, and how much of it a converted model keeps: GLUE tasks, every control, one table.

    python -m benchmarks.accuracy WORK RESULTS.json --model MODEL --data-dir GLUE [--task sst2 --task cola ...]
        [--shape 7x12,7x27] [--seed 0,1,2] [--students removed,converted] [--rows 12000] [--epochs-of-teacher 1.5]
        [--calibration-tokens 131072] [--teacher-rows 30000]

For each task this fine-tunes a teacher (once: other students, shapes and seeds find it), then converts, distils and
scores one student after the other, all with the same data, steps, schedule and loss; for each seed, and those
that have a shape for each shape. What is done is not done again: the same command goes on after a kill, and one
with more tasks or students adds them. RESULTS.json gets the table of every task and seed, the sums over them, the
versions and the processor; `benchmarks.picture` draws it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from fffconvert import Recipe, Training, TreeShape
from fffconvert.comparison import table_of
from fffconvert.display import table
from fffconvert.folders import write_whole
from fffconvert.machine import processor_name, versions
from fffconvert.pipeline import load_base, make_teacher
from fffconvert.recipe import CALIBRATION_TOKENS, Control
from fffconvert.report import read_report
from fffconvert.scores import value_kept
from fffconvert.students import CONVERTED, Students, planned_students
from fffconvert.tree import DEFAULT_TREE
from fffconvert.workspace import TEACHER

EPOCHS = {"sst2": 2, "mrpc": 6, "cola": 6, "stsb": 6, "mnli": 2}  # of the teacher
TEACHER_ROWS = 30_000
CONTROLS = get_args(Control)
FIGURES = ("before_distillation", "score", "retention", "agreement", "hidden_error", "value_kept")


def measure(arguments: argparse.Namespace, task: str, seed: int) -> list[dict[str, Any]]:
    """The rows of one task: the teacher, and the students asked for in every shape."""
    teacher = teacher_of(arguments, task)
    epochs = round(EPOCHS[task] * arguments.epochs_of_teacher)
    budget = f"rows{arguments.rows}-epochs{epochs}-tokens{arguments.calibration_tokens}"
    work = folder_of_task(arguments, task) / f"{budget}-seed{seed}"
    work.mkdir(exist_ok=True)
    wanted = {
        folder_of(name, shape): (name, shape) for shape in arguments.shape for name in arguments.students
    }
    recipe = Recipe(
        model=str(teacher),
        task=task,
        train_rows=arguments.rows,
        distill=Training(epochs=epochs),
        controls=CONTROLS,
        calibration_tokens=arguments.calibration_tokens,
        seed=seed,
    )
    if any(not (work / folder).exists() for folder in wanted):
        students = Students(recipe, *load_base(recipe, work, arguments.data_dir), work, log_with=None)
        for folder, (name, shape) in wanted.items():
            planned = planned_students(replace(recipe, tree=shape), students.teacher.model.config)
            students.make(folder, *planned[name])
    rows = table_of({folder: read_report(work / folder) for folder in wanted})
    names = [TEACHER, *(name for name, _ in wanted.values())]
    return [{**row, "name": name} for row, name in zip(rows, names, strict=True)]


def folder_of_task(arguments: argparse.Namespace, task: str) -> Path:
    """Where a teacher of one task and its students lie."""
    work: Path = arguments.work
    return work / arguments.model.strip("/").replace("/", "--") / f"{task}-of-{arguments.teacher_rows}-rows"


def folder_of(student: str, shape: TreeShape) -> str:
    """Where a student lies; the model without FFNs is the same for every shape."""
    return student if student == "removed" else f"{student}-{shape.depth}x{shape.leaf_width}"


def teacher_of(arguments: argparse.Namespace, task: str) -> Path:
    """The folder of a task's teacher, made if it is not there."""
    work = folder_of_task(arguments, task)
    work.mkdir(parents=True, exist_ok=True)
    if not (work / TEACHER).exists():
        finetune = Training(epochs=EPOCHS[task], learning_rate=1e-4, weight_decay=0.01)
        recipe = Recipe(
            model=arguments.model, task=task, train_rows=arguments.teacher_rows, finetune=finetune
        )
        make_teacher(recipe, *load_base(recipe, work, arguments.data_dir), work, log_with=None)
    return work / TEACHER


def sums(tasks: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Each model over all tasks: mean figures; retention and value kept are ratios of sums, never means of ratios."""
    models = list(zip(*tasks.values(), strict=True))  # for each model its row of every task
    totals = [sum(row["score"] for row in rows) for rows in models]
    removed = next(
        (total for total, rows in zip(totals, models, strict=True) if rows[0]["name"] == "removed"), None
    )
    return [
        {
            "name": rows[0]["name"],
            "active_neurons": rows[0]["active_neurons"],
            **{figure: mean(rows, figure) for figure in FIGURES},
            "retention": total / totals[0],
            "value_kept": None if removed is None else value_kept(total, removed, totals[0]),
        }
        for total, rows in zip(totals, models, strict=True)
    ]


def mean(rows: list[dict[str, Any]], figure: str) -> float | None:
    """The mean of one figure; none where a row has none."""
    found = [row[figure] for row in rows]
    return None if None in found else sum(found) / len(found)


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Prints one table."""
    columns = ("name", "active_neurons", *FIGURES)
    table(
        title, [column.replace("_", " ") for column in columns], [[row[c] for c in columns] for row in rows]
    )


def shapes(asked: str) -> list[TreeShape]:
    """Tree shapes from `7x12,7x27`: depth and leaf width."""
    return [TreeShape(*map(int, shape.split("x"))) for shape in asked.split(",")]


def parser_of(description: str | None, students: list[str]) -> argparse.ArgumentParser:
    """The command line of a benchmark of students, of which some are made where none are named."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--students", type=lambda names: names.split(","), default=students, metavar="A,B")
    parser.add_argument("--shape", type=shapes, default=[DEFAULT_TREE], metavar="DEPTHxWIDTH,...")
    return parser


def write_results(arguments: argparse.Namespace, **found: Any) -> None:
    """Writes what was found, beside what was asked and on what."""
    asked = {
        name: str(value)
        for name, value in vars(arguments).items()
        if name not in ("work", "results", "data_dir", "model")
    }
    result = {"asked": asked, **found, "versions": versions(), "processor": processor_name()}
    write_whole(arguments.results, json.dumps(result, indent=2) + "\n")


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__, [CONVERTED, *CONTROLS])
    parser.add_argument("--task", action="append", choices=EPOCHS)
    parser.add_argument("--rows", type=int, default=12_000, help="that a student is distilled on, at most")
    parser.add_argument(
        "--epochs-of-teacher",
        type=float,
        default=0.5,
        help="epochs of a student, for each that its teacher had",
    )
    parser.add_argument(
        "--calibration-tokens", type=int, default=CALIBRATION_TOKENS, help="that trees are fitted on"
    )
    parser.add_argument(
        "--teacher-rows", type=int, default=TEACHER_ROWS, help="that a new teacher is fine-tuned on, at most"
    )
    parser.add_argument("--seed", type=lambda seeds: [int(s) for s in seeds.split(",")], default=[0])
    arguments = parser.parse_args()
    tasks = {}
    for task in arguments.task or EPOCHS:
        for seed in arguments.seed:
            title = task if len(arguments.seed) == 1 else f"{task}, seed {seed}"
            tasks[title] = measure(arguments, task, seed)
            show(title, tasks[title])
    summary = sums(tasks)
    show(f"Over {', '.join(tasks)}", summary)
    write_results(arguments, tasks=tasks, sums=summary)


if __name__ == "__main__":
    main()
