"""What `--dry-run` shows: a recipe's or a conversion's names and data are read, and nothing is made of them."""

from __future__ import annotations

from pathlib import Path

from fffconvert.batch import tokens_in
from fffconvert.calibration import read_batches
from fffconvert.checkpoint import give_head, head_class, load_config, load_tokenizer, prompt_of
from fffconvert.conversion import check_tree
from fffconvert.data import read_texts
from fffconvert.estimate import Estimate, Workload, estimate
from fffconvert.pipeline import read_recipe_data
from fffconvert.recipe import MAX_LENGTH, Init, Recipe
from fffconvert.sources import Source
from fffconvert.students import CONVERTED, planned_students
from fffconvert.text import readable_length
from fffconvert.tree import TreeShape


def estimate_run(recipe: Recipe, data_dir: Path | None = None) -> Estimate:
    """What a recipe would make and cost. Reads its model's configuration and its data, and writes nothing.

    Raises:
        UserError: As `run` does of the recipe, its model and its data.
    """
    new_head = recipe.finetune is not None
    data = read_recipe_data(recipe, recipe.model, new_head, data_dir)
    config = load_config(recipe.model)
    dense_class = give_head(config, data.task) if new_head else head_class(recipe.model, config)
    n_tokens = sum(data.rows["length"])
    workload = Workload(
        calibration_tokens=min(recipe.calibration_tokens, n_tokens),
        finetune_tokens=n_tokens * recipe.finetune.epochs if recipe.finetune else 0,
        distill_tokens=n_tokens * recipe.distill.epochs,
        controls=[made for name, made in planned_students(recipe, config).items() if name != CONVERTED],
    )
    check_tree(recipe.tree, recipe.init, workload.calibration_tokens)
    return estimate(dense_class, config, recipe.tree, recipe.init, workload)


def estimate_conversion(
    model: str,
    source: Source | None,
    tree: TreeShape,
    init: Init,
    calibration_tokens: int,
    seed: int = 0,
    max_length: int = MAX_LENGTH,
    *,
    data_dir: Path | None = None,
) -> Estimate:
    """As `estimate_run`, of a conversion alone.

    Args:
        model: Hub id or folder of the dense model.
        source: What to calibrate on; without it there is text enough.
        tree: The shape of every layer.
        init: What would be clustered.
        calibration_tokens: Tokens of it to use.
        seed: Decides the sample of the text.
        max_length: Tokens that a text is cut at.
        data_dir: As for `run`.
    """
    config = load_config(model)
    dense_class, tokenizer = head_class(model, config), load_tokenizer(model, config)
    readable_length(tokenizer, config, max_length)
    if source is not None:
        texts = read_texts(source, config, data_dir, prompt_of(model))
        batches = read_batches(config, tokenizer, texts, calibration_tokens, seed, max_length)
        calibration_tokens = min(calibration_tokens, sum(map(tokens_in, batches)))
        check_tree(tree, init, calibration_tokens)
    return estimate(dense_class, config, tree, init, Workload(calibration_tokens))
