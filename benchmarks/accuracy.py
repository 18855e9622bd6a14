"""What the FFN is worth, and how much of it a converted model keeps: GLUE tasks, every control, one table.

    python -m benchmarks.accuracy WORK RESULTS.json --model MODEL --data-dir GLUE [--task sst2 --task cola ...]
        [--depth 7] [--leaf-width 12] [--train-rows 20000] [--seed 0]

For each task this fine-tunes a teacher (once: other shapes and seeds find it in WORK) and runs `fffconvert run` with
every control. What is done is not done again: the same command goes on after a kill. RESULTS.json gets the table of
every task, the sums over tasks, the versions and the processor; `benchmarks.picture` draws it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fffconvert import Recipe, Training, TreeShape, run
from fffconvert.checkpoint import read_report, versions
from fffconvert.display import table
from fffconvert.evaluation import value_kept
from fffconvert.inspection import env

TASKS = ("sst2", "mrpc", "cola", "stsb", "mnli")
EPOCHS = {"sst2": 2, "mnli": 2, "stsb": 4, "cola": 4, "mrpc": 4}  # of the teacher; half as many of a student
CONTROLS = ("removed", "narrow", "random", "neurons")
FIGURES = ("before_distillation", "score", "retention", "agreement", "value_kept")


def measure(arguments: argparse.Namespace, task: str) -> list[dict[str, Any]]:
    """The rows of one task: teacher, converted and controls."""
    shape = TreeShape(arguments.depth, arguments.leaf_width)
    name = f"{task}-depth{shape.depth}-width{shape.leaf_width}-seed{arguments.seed}"
    output, teacher = arguments.work / name, arguments.work / f"{task}-teacher"
    if not output.exists():
        recipe = Recipe(
            model=str(teacher if teacher.exists() else arguments.model),
            task=task,
            tree=shape,
            train_rows=arguments.train_rows,
            finetune=None
            if teacher.exists()
            else Training(epochs=EPOCHS[task], learning_rate=1e-4, weight_decay=0.01),
            distill=Training(epochs=EPOCHS[task] // 2),
            controls=CONTROLS,
            seed=arguments.seed,
        )
        work = output.with_name(f"{name}.work")
        made = run(recipe, output, data_dir=arguments.data_dir, resume=work.exists())
        if made.teacher is not None:
            made.teacher.rename(teacher)
    rows: list[dict[str, Any]] = read_report(str(output))["table"]
    return rows


def sums(tasks: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Each model over all tasks: mean figures, and the value kept as a ratio of sums, never a mean of ratios."""
    by_name = {
        row["name"]: [rows[n] for rows in tasks.values()] for n, row in enumerate(next(iter(tasks.values())))
    }
    total = {name: sum(row["score"] for row in rows) for name, rows in by_name.items()}
    return [
        {
            "name": name,
            "active_neurons": rows[0]["active_neurons"],
            **{
                figure: None
                if any(row[figure] is None for row in rows)
                else sum(row[figure] for row in rows) / len(rows)
                for figure in FIGURES[:-1]
            },
            "value_kept": value_kept(total[name], total["removed"], total["teacher"]),
        }
        for name, rows in by_name.items()
    ]


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
    parser.add_argument("--task", action="append", choices=TASKS)
    parser.add_argument("--depth", type=int, default=7)
    parser.add_argument("--leaf-width", type=int, default=12)
    parser.add_argument("--train-rows", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tasks = {}
    for task in arguments.task or TASKS:
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
