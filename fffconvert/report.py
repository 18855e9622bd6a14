"""`report.json` beside a model's weights: what was measured when it was made."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

from fffconvert.conversion import LayerFit
from fffconvert.errors import UserError, first_line

REPORT = "report.json"


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


def fits_of(name: str) -> list[dict[str, Any]]:
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


def versions() -> dict[str, str]:
    """The versions that decide a result."""
    packages = ("fffconvert", "torch", "transformers", "accelerate", "datasets", "scikit-learn", "numpy")
    return {package: metadata.version(package) for package in packages}
