"""The students of a run: the converted model and its controls, which share teacher, data, calibration and judge."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedConfig

from fffconvert.accelerator import wait_for_everyone
from fffconvert.calibration import Calibration, calibrate
from fffconvert.checkpoint import Loaded, load, save
from fffconvert.conversion import build
from fffconvert.data import Data
from fffconvert.display import is_main_process, say
from fffconvert.distillation import distill
from fffconvert.evaluation import Judge
from fffconvert.families import family_of
from fffconvert.recipe import Init, Recipe
from fffconvert.report import read_report
from fffconvert.resumption import delete_checkpoints
from fffconvert.tree import REMOVED, TreeShape, narrow
from fffconvert.workspace import BEFORE_DISTILLATION

CONVERTED = "converted"


def planned_students(recipe: Recipe, config: PreTrainedConfig) -> dict[str, tuple[TreeShape, Init]]:
    """What to train by name, shape and init: the recipe's tree for a dense model, then its controls."""
    tree = family_of(config).shape_for(config, recipe.tree)
    controls: dict[str, tuple[TreeShape, Init]] = {
        "removed": (REMOVED, "inputs"),
        "narrow": (narrow(tree), "inputs"),
        "random": (tree, "random"),
        "neurons": (tree, "neurons"),
    }
    return {CONVERTED: (tree, recipe.init), **{name: controls[name] for name in recipe.controls}}


@dataclass
class Students:
    """Makes the students of a run, which share teacher, data, calibration and judge."""

    recipe: Recipe
    teacher: Loaded
    data: Data
    work: Path
    log_with: str | None

    @cached_property
    def calibration(self) -> Calibration:
        """Text as the teacher reads it."""
        model, tokenizer = self.teacher.model, self.teacher.tokenizer
        r = self.recipe
        return calibrate(model, tokenizer, self.data.texts, r.calibration_tokens, r.seed, r.max_length)

    @cached_property
    def judge(self) -> Judge:
        """Scores any model beside the teacher."""
        return Judge(
            self.teacher.tokenizer,
            self.data.task,
            self.data.validations,
            self.teacher.model,
            self.teacher.pooling,
        )

    def make(self, name: str, shape: TreeShape, init: Init) -> None:
        """Converts, distils, evaluates and writes one student to the work folder, unless it is there."""
        if (self.work / name).exists():
            return
        say(f"{name}: {shape.active_neurons:g} active neurons per token", style="bold")
        start = self.work / f"{name}{BEFORE_DISTILLATION}"
        self.convert(start, shape, init)
        model = load(start).model
        distill(
            model,
            self.teacher.model,
            self.teacher.tokenizer,
            self.data.rows,
            self.recipe.distill,
            seed=self.recipe.seed,
            checkpoints=self.work / f"{name}.checkpoints",
            log_with=self.log_with,
            pooling=self.teacher.pooling,
        )
        scores = {**self.judge(model).to_dict(), "columns": list(self.data.task.columns)}
        report = {"scores": scores, **read_report(start)}
        save(replace(self.teacher, model=model), self.work / name, report=report)
        wait_for_everyone()
        if is_main_process():
            shutil.rmtree(start)
        delete_checkpoints(self.work / f"{name}.checkpoints")

    def convert(self, folder: Path, shape: TreeShape, init: Init) -> None:
        """Converts a student and scores it before distillation, unless it is there; a resumed run goes on from that."""
        if folder.exists():
            return
        conversion = build(self.calibration, shape, init)
        report = {
            "before_distillation": self.judge(conversion.model).to_dict(),
            "layers": [layer.to_dict() for layer in conversion.layers],
        }
        save(replace(self.teacher, model=conversion.model), folder, report=report)
        wait_for_everyone()
