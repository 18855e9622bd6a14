"""Draws the README's picture from a report: quality against active neurons, and latency beside the limit.

python benchmarks/picture.py benchmarks/results/minilm-sst2.json benchmarks/results/minilm-sst2.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLOURS = {"dense": "#9aa5b1", "converted": "#1f7a5a", "removed": "#d08c2f"}


def draw_quality(axes: Axes, report: dict[str, Any]) -> None:
    """One point per model of the comparison."""
    for row in report["table"]:
        colour = COLOURS["converted"] if row["name"] == "converted" else "#44505c"
        axes.plot(row["active_neurons"], row["score"], "o", color=colour, markersize=8)
        if row["before_distillation"] is not None and row["name"] == "converted":
            axes.plot(row["active_neurons"], row["before_distillation"], "o", mfc="none", color=colour)
            axes.annotate(
                "before distillation", (row["active_neurons"], row["before_distillation"]), **_BELOW
            )
        axes.annotate(row["name"], (row["active_neurons"], row["score"]), **_ABOVE)
    axes.set_xscale("symlog", linthresh=8)
    axes.set_xlim(-2, 4000)
    axes.margins(y=0.25)
    axes.set_xlabel("active neurons per token, routers included")
    axes.set_ylabel(f"{report['scores']['task']}: {report['scores']['metric']}")


_ABOVE = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center", "fontsize": 9}
_BELOW = {"xytext": (0, -16), "textcoords": "offset points", "ha": "center", "fontsize": 9}


def draw_latency(axes: Axes, latency: dict[str, Any]) -> None:
    """Whole models with all threads, relative to the dense one; the limit is the model without FFNs."""
    threads = max(row["threads"] for row in latency["rows"])
    rows = [row for row in latency["rows"] if row["removed"] is not None and row["threads"] == threads]
    for offset, key in enumerate(("dense", "converted", "removed")):
        places = [number + 0.27 * (offset - 1) for number in range(len(rows))]
        label = "FFNs removed (the limit)" if key == "removed" else key
        heights = [row[key] / row["dense"] for row in rows]
        bars = axes.bar(places, heights, 0.25, color=COLOURS[key], label=label)
        axes.bar_label(bars, [f"{row[key]:.1f} ms" for row in rows], fontsize=7, padding=2)
    axes.set_xticks(range(len(rows)), [row["what"].removeprefix("model, ") for row in rows])
    axes.set_ylim(0, 1.3)
    axes.set_ylabel("latency, relative to dense")
    axes.legend(fontsize=8, frameon=False, loc="upper right", ncols=3)


def main(report: str, output: str) -> None:
    """Reads a `report.json` and writes the picture."""
    values = json.loads(Path(report).read_text(encoding="utf-8"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    draw_quality(left, values)
    draw_latency(right, values["latency"])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
