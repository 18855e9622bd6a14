"""`report.json` beside a model's weights: what was measured when it was made."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fffconvert.errors import UserError, first_line
from fffconvert.machine import versions

REPORT = "report.json"


@dataclass(frozen=True)
class LayerFit:
    """How well one layer was fitted.

    Attributes:
        layer: Its number, from 0; layers that share one FFN (ALBERT) count once.
        error: Squared error of its output on held-out tokens, relative to that of the mean output (so the
            control without an FFN has about 1). What is asked of a layer includes mending the errors of those below.
        smallest_leaf: Share of the calibration tokens in the leaf with the fewest.
        largest_leaf: Share in the leaf with the most. Balanced leaves have `1 / n_leaves` each.
    """

    layer: int
    error: float
    smallest_leaf: float
    largest_leaf: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `report.json` holds them."""
        return asdict(self)


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Writes what was measured, and with which versions."""
    report = {**report, "versions": versions()}
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def read_report(folder: Path | str) -> dict[str, Any]:
    """What was measured when a folder was made; nothing where it holds no report.

    Raises:
        UserError: For a report that is not JSON.
    """
    file = Path(folder) / REPORT
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is not what fffconvert wrote there ({first_line(error)})") from error


def fits_of(name: Path | str) -> list[dict[str, Any]]:
    """The fit of each layer as the report in a folder has it; none where it holds no report.

    Raises:
        UserError: For a report that says something else.
    """
    layers = read_report(name).get("layers", [])
    try:
        for layer in layers:
            LayerFit(**{key: float(value) for key, value in layer.items()})  # type: ignore[arg-type]
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{Path(name) / REPORT}: `layers` is not what fffconvert wrote there ({error})"
        ) from error
    return list(layers)
