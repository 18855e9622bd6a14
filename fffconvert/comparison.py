"""Students beside their teacher: one table of what each costs and keeps."""

from __future__ import annotations

from typing import Any

from fffconvert.scores import value_kept
from fffconvert.workspace import TEACHER

COMPARED = ("active_neurons", "share", "score", "retention", "agreement", "hidden_error")


def table_of(reports: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for the teacher and each student: cost, score before and after distillation, value kept."""
    teacher = scores_of_teacher(reports)
    removed = reports.get("removed", {}).get("scores", {}).get("score")
    rows = [
        (TEACHER, teacher, None),
        *((n, r["scores"], r["before_distillation"]) for n, r in reports.items()),
    ]
    return [
        {
            "name": name,
            **{key: scores[key] for key in COMPARED},
            "before_distillation": before and before["score"],
            "value_kept": None if removed is None else value_kept(scores["score"], removed, teacher["score"]),
        }
        for name, scores, before in rows
    ]


def scores_of_teacher(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a teacher would score beside itself, as its students' reports have it: it need not run again."""
    found = next(iter(reports.values()))["scores"]
    return {
        "active_neurons": float(found["dense_neurons"]),
        "share": 1.0,
        "score": found["teacher_score"],
        "retention": 1.0 if found["teacher_score"] > 0 else None,
        "agreement": 1.0,
        "hidden_error": 0.0,
    }
