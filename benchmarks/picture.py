"""Draws the README's pictures: quality against active neurons, latency beside the limit, students over tasks.

python -m benchmarks.picture benchmarks/results/minilm-glue.json benchmarks/results/minilm-glue.svg
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLOURS = {
    "dense": "#9aa5b1",
    "dense oneDNN": "#b0b9c3",
    "dense compiled": "#c3cad1",
    "ONNX Runtime": "#8fa8c8",
    "ONNX Runtime int8": "#5b7fae",
    "converted": "#1f7a5a",
    "converted compiled": "#4fa07f",
    "converted int8": "#0d4d37",
    "narrow": "#e0b878",
}
LIMIT = "FFNs removed"
STUDENTS = {
    "converted": "#1f7a5a",
    "neurons": "#5b7fae",
    "random": "#c3789f",
    "narrow": "#d08c2f",
    "removed": "#44505c",
}

_ABOVE = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center", "fontsize": 9}
_BESIDE = {"xytext": (9, 2), "textcoords": "offset points", "ha": "left", "fontsize": 9}


def draw_quality(axes: Axes, report: dict[str, Any]) -> None:
    """One point per model of the comparison."""
    for row in report["table"]:
        colour = COLOURS["converted"] if row["name"] == "converted" else "#44505c"
        axes.plot(row["active_neurons"], row["score"], "o", color=colour, markersize=8)
        if row["before_distillation"] is not None and row["name"] == "converted":
            axes.plot(row["active_neurons"], row["before_distillation"], "o", mfc="none", color=colour)
            axes.annotate(
                "before distillation", (row["active_neurons"], row["before_distillation"]), **_BESIDE
            )
        axes.annotate(row["name"], (row["active_neurons"], row["score"]), **_ABOVE)
    axes.set_xscale("symlog", linthresh=8)
    axes.set_xlim(-2, 4000)
    axes.margins(y=0.25)
    axes.set_xlabel("active neurons per token, routers included")
    axes.set_ylabel(f"{report['scores']['task']}: {report['scores']['metric']}")


def draw_tasks(axes: Axes, tasks: dict[str, list[dict[str, Any]]]) -> None:
    """What every student keeps of its teacher's score on every task; hollow: before distillation."""
    for place, rows in enumerate(tasks.values()):
        teacher, *students = rows
        for number, row in enumerate(students):
            x = place + (number - (len(students) - 1) / 2) * 0.8 / len(students)
            colour, label = STUDENTS[row["name"]], row["name"] if place == 0 else None
            before, after = (100 * row[key] / teacher["score"] for key in ("before_distillation", "score"))
            axes.plot([x, x], [before, after], color=colour, linewidth=1, alpha=0.5)
            axes.plot(x, before, "o", mfc="none", color=colour)
            axes.plot(x, after, "o", color=colour, label=label)
    axes.axhline(100, color="#44505c", linewidth=1)
    axes.set_xticks(range(len(tasks)), list(tasks))
    axes.set_ylabel("share of the teacher's score, %\n(hollow: before distillation)")
    axes.legend(fontsize=8, frameon=False, loc="lower left")


def draw_shapes(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Score against active neurons of students in several shapes, between two lines: teacher and no FFN."""
    teacher, removed = (next(row for row in rows if row["name"] == name) for name in ("teacher", "removed"))
    for name in dict.fromkeys(row["name"] for row in rows if row["name"] not in ("teacher", "removed")):
        own = sorted((row for row in rows if row["name"] == name), key=lambda row: row["active_neurons"])
        x = [row["active_neurons"] / teacher["active_neurons"] * 100 for row in own]
        axes.plot(x, [100 * row["score"] for row in own], "o-", color=STUDENTS[name], label=name)
        before = [100 * row["before_distillation"] for row in own]
        axes.plot(x, before, "o--", mfc="none", color=STUDENTS[name], linewidth=1)
    for row in (teacher, removed):
        axes.axhline(100 * row["score"], color="#44505c", linewidth=1, linestyle=":")
        axes.annotate(row["name"], (x[-1], 100 * row["score"]), **_ABOVE)
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{share:.2g}%" for share in x])
    axes.minorticks_off()
    axes.set_xlabel("active neurons")
    axes.set_ylabel("score, % (dashed: before distillation)")
    axes.legend(fontsize=8, frameon=False, loc="lower right")


def draw_latency(axes: Axes, latency: dict[str, Any]) -> None:
    """Whole models with all threads, relative to the dense one; a line at the limit, the model without FFNs."""
    threads = max(row["threads"] for row in latency["rows"])
    rows = [row for row in latency["rows"] if row["what"] == "model" and row["threads"] == threads]
    names = [name for name in COLOURS if name in rows[0]["medians"]]
    width = 0.8 / len(names)
    for place, row in enumerate(rows):
        medians = row["medians"]
        for number, name in enumerate(names):
            x, height = place - 0.4 + width * (number + 0.5), medians[name] / medians["dense"]
            label = name if place == 0 else None
            bar = axes.bar(x, height, 0.92 * width, color=COLOURS[name], label=label)
            time = f"{medians[name]:{'.3g' if medians[name] < 1000 else ',.0f'}} ms"
            axes.bar_label(bar, [time], fontsize=7, padding=2, rotation=90)
        limit = medians[LIMIT] / medians["dense"]
        label = f"{LIMIT} (the limit)" if place == 0 else None
        axes.plot([place - 0.44, place + 0.44], [limit] * 2, "--", color="#d08c2f", label=label)
    busy = "" if all(row["steady"] for row in rows) else " (the machine was busy)"
    axes.set_xticks(range(len(rows)), [f"{row['size']} tokens" for row in rows])
    axes.set_ylim(0, 1.6)
    axes.set_ylabel(f"latency, relative to dense{busy}")
    axes.legend(fontsize=8, frameon=False, loc="upper right", ncols=3)


def main(report: str, output: str) -> None:
    """Reads a `report.json`, or what a benchmark wrote, and draws what it holds."""
    values = json.loads(Path(report).read_text(encoding="utf-8"))
    parts: list[Callable[[Axes], None]] = []
    names = [row["name"] for row in values.get("sums", ())]
    if len(names) > len(set(names)):
        parts.append(lambda axes: draw_shapes(axes, values["sums"]))
    elif "tasks" in values:
        parts.append(lambda axes: draw_tasks(axes, values["tasks"]))
    if "table" in values:
        parts.append(lambda axes: draw_quality(axes, values))
    if "rows" in values or "latency" in values:
        parts.append(lambda axes: draw_latency(axes, values.get("latency", values)))
    size = (11, 4) if len(parts) > 1 else (9, 4)
    figure, grid = plt.subplots(1, len(parts), figsize=size, layout="constrained", squeeze=False)
    for draw, axes in zip(parts, grid[0], strict=True):
        draw(axes)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
