"""What a converted sentence encoder is worth: distilled on MNLI's sentences, judged on STS-B's pairs. No label is used.

    python -m benchmarks.encoder WORK RESULTS.json --model MODEL --data-dir GLUE
        [--shape 7x12] [--students removed,converted] [--rows 24000] [--seed 0]

Converts, distils and scores one student after the other, all with the same sentences, steps, schedule and loss. The
score is Spearman's correlation of the embeddings' cosines with what people said of 1,500 pairs, none of which was
read before. What is done is not done again. RESULTS.json is as `benchmarks.accuracy` writes it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.accuracy import CONTROLS, parser_of, show, write_results
from fffconvert import Recipe, Training, TreeShape, load
from fffconvert.checkpoint import Loaded
from fffconvert.comparison import table_of
from fffconvert.data import read_validations
from fffconvert.evaluation import Judge
from fffconvert.folders import write_whole
from fffconvert.pipeline import load_base
from fffconvert.sources import train_split
from fffconvert.students import CONVERTED, Students, planned_students
from fffconvert.tasks import task_for, task_named
from fffconvert.workspace import BEFORE_DISTILLATION, TEACHER


def sentences(work: Path, data_dir: Path | None) -> Path:
    """A file with every sentence of MNLI's pairs once, one a line."""
    file = work / "sentences.txt"
    if not file.exists():
        task = task_named("mnli")
        rows = train_split(task, data_dir)
        texts = dict.fromkeys(" ".join(text.split()) for column in task.columns for text in rows[column])
        write_whole(file, "\n".join(text for text in texts if text) + "\n")
    return file


def judge_of(teacher: Loaded, data_dir: Path | None) -> Judge:
    """Scores an encoder on STS-B, beside its teacher."""
    config = teacher.model.config
    task = task_for(config, task_named("stsb"))
    task, splits = read_validations(task, teacher.tokenizer, config, data_dir=data_dir, prompt=teacher.prompt)
    return Judge(teacher.tokenizer, task, splits, teacher.model, teacher.pooling)


def measure(arguments: argparse.Namespace, shape: TreeShape) -> list[dict[str, Any]]:
    """The rows of the table: the teacher and the students asked for."""
    work = arguments.work / f"{shape.depth}x{shape.leaf_width}-rows{arguments.rows}-seed{arguments.seed}"
    work.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(
        model=arguments.model,
        text=str(sentences(arguments.work, arguments.data_dir)),
        tree=shape,
        train_rows=arguments.rows,
        distill=Training(epochs=1),
        controls=CONTROLS,
        seed=arguments.seed,
    )
    teacher, data = load_base(recipe, work, None)
    students = Students(recipe, teacher, data, work, log_with=None)
    judge = judge_of(teacher, arguments.data_dir)
    planned = planned_students(recipe, teacher.model.config)
    reports = {name: judged(students, judge, name, *planned[name]) for name in arguments.students}
    return [{**row, "name": name} for row, name in zip(table_of(reports), (TEACHER, *reports), strict=True)]


def judged(students: Students, judge: Judge, name: str, *how: Any) -> dict[str, Any]:
    """Makes a student, unless it is there; its scores on STS-B before distillation and after."""
    file, start = students.work / f"{name}.json", students.work / f"{name}{BEFORE_DISTILLATION}"
    if not file.exists():
        before = file.with_suffix(".before.json")
        if not before.exists():
            students.convert(start, *how)
            write_whole(before, json.dumps(judge(load(start).model).to_dict()))
        students.make(name, *how)
        scores = judge(load(students.work / name).model).to_dict()
        found = {"scores": scores, "before_distillation": json.loads(before.read_text())}
        write_whole(file, json.dumps(found))
    report: dict[str, Any] = json.loads(file.read_text())
    return report


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__, [CONVERTED, "removed", "narrow"])
    parser.add_argument("--rows", type=int, default=24_000, help="that a student is distilled on")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tables = {f"{s.depth}x{s.leaf_width}": measure(arguments, s) for s in arguments.shape}
    for shape, rows in tables.items():
        show(f"STS-B, trees of {shape}", rows)
    write_results(arguments, tasks=tables)


if __name__ == "__main__":
    main()
