"""The model card: what the Hub shows of a model, by the template `card.md`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from fffconvert.configuration import dense_neurons, is_int8, shape_of
from fffconvert.heads import Kind, kind_of
from fffconvert.tasks import GLUE, TASKS

TEMPLATE = Path(__file__).with_name("card.md")

PIPELINE_TAG: dict[Kind, str] = {
    "classification": "text-classification",
    "multi-label": "text-classification",
    "regression": "text-classification",
    "tokens": "token-classification",
    "question": "question-answering",
    "masked": "fill-mask",
    "embedding": "feature-extraction",
}
"""What the Hub calls each kind of task."""


def model_card(
    config: PreTrainedConfig,
    *,
    name: str,
    origin: str,
    mask_token: str | None,
    sentence: bool,
    report: dict[str, Any],
    recipe: bool,
) -> ModelCard:
    """The card of a converted model: scores beside controls, share, latency, in the Hub's own format.

    Args:
        config: The model's.
        name: Its folder's.
        origin: The dense model's Hub id or folder.
        mask_token: The tokenizer's.
        sentence: Whether files that sentence-transformers reads lie beside it.
        report: What was measured.
        recipe: Whether a recipe lies beside it.
    """
    shape = shape_of(config)
    scores = report.get("scores")
    tag = PIPELINE_TAG[kind_of(config)]
    sentence = sentence and kind_of(config) == "embedding"
    base_model, licence = origin_of(origin)
    data = ModelCardData(
        model_name=name,
        library_name="sentence-transformers" if sentence else "transformers",
        tags=["fffconvert", "fast-feedforward"],
        base_model=base_model,
        license=licence,
        pipeline_tag=tag,
        datasets=[GLUE] if scores and scores["task"] in TASKS else None,
        eval_results=eval_results(scores, tag) if scores else None,
    )
    card: ModelCard = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        base_model=data.base_model,
        pipeline_tag=data.pipeline_tag,
        sentence=sentence,
        example=json.dumps(example_for(config, mask_token, scores)),
        shape=shape,
        dense_neurons=dense_neurons(config),
        share=shape.active_neurons / dense_neurons(config),
        int8=is_int8(config),
        recipe=recipe,
        report=report,
    )
    return card


def example_for(
    config: PreTrainedConfig, mask_token: str | None, scores: dict[str, Any] | None
) -> str | dict[str, str]:
    """What a model's pipeline may be asked: a text, one with a mask, or a pair where it was judged by pairs."""
    if kind_of(config) == "masked":
        return f"Trees are {mask_token}."
    if scores and len(scores.get("columns", ())) == 2:
        return {"text": "Trees are fast.", "text_pair": "Trees are slow."}
    return "Trees are fast."


def eval_results(scores: dict[str, Any], pipeline_tag: str) -> list[EvalResult]:
    """Every metric of every validation split, for the card's `model-index`."""
    task = scores["task"]
    of_glue = task in TASKS
    return [
        EvalResult(
            task_type=pipeline_tag,
            dataset_type=GLUE if of_glue else task,
            dataset_name=f"GLUE {task}" if of_glue else "held-out text" if task == "text" else task,
            dataset_config=task if of_glue else None,
            dataset_split=split,
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for split, metrics in scores["metrics"].items()
        for metric, value in metrics.items()
    ]


def dense_card(name: str, origin: str) -> ModelCard:
    """The card of a fine-tuned dense model: what it came from, so that what is made of it can say so too."""
    base_model, licence = origin_of(origin)
    data = ModelCardData(model_name=name, library_name="transformers", base_model=base_model, license=licence)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {name}\n\nFine-tuned with fffconvert.\n")


def origin_of(name: str) -> tuple[str | None, str | None]:
    """The model of the Hub that a model goes back to, and its licence, as far as the cards on the way tell."""
    folder = Path(name)
    base = None if folder.exists() else name
    if folder.is_dir() and not (folder / "README.md").is_file():
        return base, None  # else its path would be looked up on the Hub
    try:
        data = ModelCard.load(str(folder / "README.md") if folder.is_dir() else name).data
    except Exception:  # noqa: BLE001 - a card is a courtesy: whatever is wrong with it, it states nothing
        return base, None
    if folder.is_dir() and isinstance(data.get("base_model"), str):
        base = data.get("base_model")
    return base, cast(str | None, data.get("license"))
