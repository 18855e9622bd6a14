"""What the FFN is worth, and how much of it a converted model keeps: GLUE tasks, every control, one table.

    python -m benchmarks.accuracy WORK RESULTS.json --model MODEL --data-dir GLUE [--task sst2 --task cola ...]
        [--depth 7] [--leaf-width 12] [--students removed,converted] [--rows 12000] [--epochs 4] [--seed 0]

For each task this fine-tunes a teacher (once: other shapes and seeds find it in WORK), then converts, distils and
scores one student after the other, all with the same data, steps, schedule and loss. What is done is not done again:
the same command goes on after a kill, and one with more tasks or students adds them. RESULTS.json gets the table of
every task, the sums over tasks, the versions and the processor; `benchmarks.picture` draws it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fffconvert import Recipe, Training, TreeShape, load
from fffconvert.checkpoint import read_report, versions
from fffconvert.display import table
from fffconvert.evaluation import value_kept
from fffconvert.inspection import env
from fffconvert.pipeline import (
    CONVERTED,
    TEACHER,
    Stages,
    load_base,
    make_teacher,
    read_recipe_data,
    students_of,
    table_of,
)

EPOCHS = {"sst2": 2, "mrpc": 6, "cola": 6, "stsb": 6, "mnli": 2}  # of the teacher
TEACHER_ROWS = 30_000  # all of MNLI's partial set
CONTROLS = ("removed", "narrow", "random", "neurons")
FIGURES = ("before_distillation", "score", "retention", "agreement", "hidden_error", "value_kept")


def measure(arguments: argparse.Namespace, task: str) -> list[dict[str, Any]]:
    """The rows of one task: the teacher and the students asked for."""
    teacher = teacher_of(arguments, task)
    shape = TreeShape(arguments.depth, arguments.leaf_width)
    epochs = EPOCHS[task] // 2 if arguments.epochs is None else arguments.epochs
    recipe = Recipe(
        model=str(teacher),
        task=task,
        tree=shape,
        train_rows=arguments.rows,
        distill=Training(epochs=epochs),
        controls=CONTROLS,
        seed=arguments.seed,
    )
    run = (
        f"depth{shape.depth}-width{shape.leaf_width}-rows{arguments.rows}-epochs{epochs}-seed{arguments.seed}"
    )
    work = arguments.work / task / run
    work.mkdir(exist_ok=True)
    missing = [name for name in arguments.students if not (work / name).exists()]
    if missing:
        data = read_recipe_data(recipe, recipe.model, new_head=False, data_dir=arguments.data_dir)
        stages = Stages(recipe, load(recipe.model), data, work, log_with=None)
        students = students_of(recipe, stages.teacher.model.config)
        for name in missing:
            stages.make_student(name, *students[name])
    reports = {name: read_report(str(work / name)) for name in arguments.students}
    return table_of(reports)


def teacher_of(arguments: argparse.Namespace, task: str) -> Path:
    """The folder of a task's teacher, made if it is not there."""
    work: Path = arguments.work / task
    work.mkdir(parents=True, exist_ok=True)
    if not (work / TEACHER).exists():
        finetune = Training(epochs=EPOCHS[task], learning_rate=1e-4, weight_decay=0.01)
        recipe = Recipe(model=arguments.model, task=task, train_rows=TEACHER_ROWS, finetune=finetune)
        make_teacher(recipe, *load_base(recipe, work, arguments.data_dir), work, log_with=None)
    return work / TEACHER


def sums(tasks: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Each model over all tasks: mean figures; retention and value kept are ratios of sums, never means of ratios."""
    by_name = {
        row["name"]: [rows[n] for rows in tasks.values()] for n, row in enumerate(next(iter(tasks.values())))
    }
    total = {name: sum(row["score"] for row in rows) for name, rows in by_name.items()}
    return [
        {
            "name": name,
            "active_neurons": rows[0]["active_neurons"],
            **{figure: mean(rows, figure) for figure in FIGURES},
            "retention": total[name] / total[TEACHER],
            "value_kept": value_kept(total[name], total["removed"], total[TEACHER])
            if "removed" in total
            else None,
        }
        for name, rows in by_name.items()
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


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--task", action="append", choices=EPOCHS)
    parser.add_argument(
        "--students", type=lambda names: names.split(","), default=[CONVERTED, *CONTROLS], metavar="A,B"
    )
    parser.add_argument("--depth", type=int, default=7)
    parser.add_argument("--leaf-width", type=int, default=12)
    parser.add_argument("--rows", type=int, default=12_000, help="that a student is distilled on, at most")
    parser.add_argument("--epochs", type=int, help="of a student; not given, half as many as its teacher had")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tasks = {}
    for task in arguments.task or EPOCHS:
        tasks[task] = measure(arguments, task)
        show(task, tasks[task])
    summary = sums(tasks)
    show(f"Over {', '.join(tasks)}", summary)
    asked = {
        name: str(value)
        for name, value in vars(arguments).items()
        if name not in ("work", "data_dir", "model")
    }
    result = {
        "asked": asked,
        "tasks": tasks,
        "sums": summary,
        "versions": versions(),
        "processor": env()["processor"],
    }
    arguments.results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
