"""The tables that commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fffconvert import display

if TYPE_CHECKING:  # they import torch
    from fffconvert.estimate import Estimate
    from fffconvert.inspection import Info
    from fffconvert.scores import Scores


def show_estimate(model: str, found: Estimate) -> None:
    """What a dry run found."""
    arrow = "{} → {}".format
    sizes = (f"{size / 1e6:.1f} MB" for size in (found.bytes_before, found.bytes_after))
    display.table(
        f"{model}: what would be made",
        ["", ""],
        [
            ("layers to convert", found.n_layers),
            ("active per token", active(found.active_neurons, found.dense_neurons)),
            ("parameters", arrow(f"{found.parameters_before:,}", f"{found.parameters_after:,}")),
            ("model.safetensors", arrow(*sizes)),
            ("memory, without activations", f"{found.memory_bytes / 1e9:.2f} GB"),
            *((f"time: {stage}", f"{seconds / 60:.1f} min") for stage, seconds in found.seconds.items()),
        ],
    )
    display.say("Nothing was written")


def percent(value: float | None) -> str | None:
    """A share as people read it."""
    return None if value is None else f"{100 * value:.1f}%"


def rounded(value: float, digits: int) -> str:
    """A number with so many digits that count, and large ones not as powers of ten."""
    shown = f"{value:.{digits}g}"
    return f"{float(shown):.0f}" if "e+" in shown else shown


def active(neurons: float, dense: int) -> str:
    """Active neurons beside those of a dense FFN."""
    return f"{neurons:g} of {dense} neurons ({percent(neurons / dense)})"


def show_info(found: Info) -> None:
    """What a model's folder says of its FFNs."""
    tree = found.tree.to_dict() if found.tree is not None else {}
    stored = f"{found.ffn_parameters:,}" + (f" (dense: {found.dense_ffn_parameters:,})" if tree else "")
    rows = [
        ("model type", found.model_type),
        ("layers", found.n_layers),
        ("FFNs stored", found.n_ffns),
        ("d_model", found.d_model),
        ("active per token", active(found.active_neurons, found.dense_neurons)),
        ("gates (GLU)", "yes" if found.gated else "no"),
        ("numbers in an FFN", stored),
        ("int8 projections", "yes" if found.int8 else "no"),
        *((f"tree: {key}", value) for key, value in tree.items()),
    ]
    display.table(found.name, ["", ""], rows)
    if found.layers:
        show_layers(found.layers)


def show_layers(layers: list[dict[str, Any]]) -> None:
    """How well each layer was fitted."""
    display.table(
        "Fit of each layer on held-out tokens, when the trees were grown (0 = exact, 1 = the mean output)",
        ["layer", "error", "smallest leaf", "largest leaf"],
        [(x["layer"], x["error"], percent(x["smallest_leaf"]), percent(x["largest_leaf"])) for x in layers],
    )


def show_scores(name: str, scores: Scores) -> None:
    """One model's scores."""
    rows = [
        ("active per token", active(scores.active_neurons, scores.dense_neurons)),
        ("teacher's score", scores.teacher_score),
        ("retention", percent(scores.retention)),
        ("agreement", percent(scores.agreement)),
        ("hidden error", scores.hidden_error),
    ]
    metrics = [
        (f"{m}, {split}", value) for split, found in scores.metrics.items() for m, value in found.items()
    ]
    shown = [(what, value) for what, value in rows if value is not None]
    display.table(f"{name} on {scores.task}", ["", ""], [*metrics, *shown])
    if scores.teacher_score is None:
        display.say("Retention, agreement and hidden error need the dense original: --teacher MODEL")


def show_comparison(report: dict[str, Any]) -> None:
    """The converted model beside its teacher and controls."""
    metric = report["scores"]["metric"]
    agreement = "neighbours agree" if metric == "cosine" else "agreement"
    display.table(
        f"{report['scores']['task']}: {metric}",
        [
            "model",
            "active neurons",
            "share",
            "before distillation",
            "after",
            "retention",
            agreement,
            "hidden error",
            "FFN value kept",
        ],
        [
            (
                row["name"],
                row["active_neurons"],
                percent(row["share"]),
                row["before_distillation"],
                row["score"],
                percent(row["retention"]),
                percent(row["agreement"]),
                row["hidden_error"],
                percent(row["value_kept"]),
            )
            for row in report["table"]
        ],
    )


def show_latency(latency: dict[str, Any]) -> None:
    """Medians side by side, and which of them not to trust."""
    display.say(latency["machine"])
    for what, unit, scale in (("layer", "microseconds", 1000), ("model", "milliseconds", 1)):
        rows = [row for row in latency["rows"] if row["what"] == what]
        for threads in sorted({row["threads"] for row in rows}):
            shown = [row for row in rows if row["threads"] == threads]
            show_timings(f"One {what} in {unit}, threads: {threads}", shown, scale)
    show_absent(latency["absent"])
    if not all(row["steady"] for row in latency["rows"]):
        display.say(
            "The machine was busy: what is marked ~, or ± its spread, means little. Measure again.",
            style="yellow",
        )


def show_absent(absent: dict[str, str]) -> None:
    """What was not timed, and why."""
    for name, reason in absent.items():
        display.say(f"{name} was not timed: {reason}")


def show_timings(title: str, rows: list[dict[str, Any]], scale: float) -> None:
    """One line for each that was timed, one column for each size; beside it how many times faster than dense.

    How near a converted model is to the limit, by the ratios within the rounds, is in a line of its own.
    """
    from fffconvert.latency import WIDE_SPREAD
    from fffconvert.twins import LIMIT

    def cell(row: dict[str, Any], name: str) -> str | None:
        if name not in row["medians"]:
            return None
        median, spread = row["medians"][name], row["spreads"][name]
        if max(spread, row["spreads"]["dense"]) >= WIDE_SPREAD:
            return f"{rounded(scale * median, 2)} ± {percent(spread)}"
        return f"{rounded(scale * median, 4)} ({rounded(row['medians']['dense'] / median, 3)}x)"

    def to_limit(row: dict[str, Any]) -> str:
        busy = max(row["spreads"]["converted"], row["spreads"][LIMIT]) >= WIDE_SPREAD
        return f"{'~' if busy else ''}{row['to_limit']:.2f}"

    columns = ["", *(f"{row['size']} token{'s' * (row['size'] != '1')}" for row in rows)]
    names = dict.fromkeys(name for row in rows for name in row["medians"])
    lines = [(name, *(cell(row, name) for row in rows)) for name in names]
    if LIMIT in names:
        lines.append((f"converted ÷ {LIMIT}", *map(to_limit, rows)))
    display.table(title, columns, lines)


def show_int8(gain: dict[str, Any]) -> None:
    """What int8 loses beside what it gains."""
    show_latency(gain["latency"])
    display.say(
        f"int8 moves the last hidden states by {percent(gain['error'])} of their size "
        "(sentences of Python's documentation)"
    )
