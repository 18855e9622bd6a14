"""The folder on disk: loading a model by name, and writing a converted one whole or not at all."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fffconvert import modeling
from fffconvert.card import dense_card, model_card
from fffconvert.configuration import is_converted, refuse_converted, shape_of
from fffconvert.display import is_main_process
from fffconvert.errors import NotWritten, UserError, first_line
from fffconvert.families import family_of, longest_text
from fffconvert.folders import new_folder
from fffconvert.heads import HEAD_BY_KIND, Kind, as_saved, kind_of, labels_of, names_labels, reordered
from fffconvert.recipe import RECIPE, Recipe
from fffconvert.report import write_report
from fffconvert.sentence import SentenceModules, pools, read_modules
from fffconvert.tasks import Task

FARTHEST = 2  # levels of folders that a mistyped name is looked for below the first that is there
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError)
"""What `transformers` raises for files that are missing, malformed, or make no sense together."""


PROBLEM_TYPE: dict[Kind, Any] = {
    "classification": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
"""What `transformers` calls them where a head's loss depends on it."""


@dataclass(frozen=True)
class Loaded:
    """A model and its tokenizer, the name that they were loaded by, and what sentence-transformers adds."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sentence: SentenceModules | None = None

    @cached_property
    def pooling(self) -> nn.Module | None:
        """How the model itself makes sentence embeddings, where it says so and has no other head."""
        if self.sentence is None or kind_of(as_saved(self.model)) != "embedding":
            return None
        ids = self.tokenizer(self.prompt)["input_ids"] if self.prompt else []
        return self.sentence.pooling(len(ids) - (ids[-1:] == [self.tokenizer.sep_token_id]))

    @property
    def prompt(self) -> str:
        """What stands before every text that the model embeds."""
        return self.sentence.prompt if self.sentence is not None else ""


def load(name: str | Path) -> Loaded:
    """Loads a dense or converted model, with the head that it was saved with.

    Args:
        name: A Hub id or a folder.

    Raises:
        UserError: For a name that is neither, no access to the Hub, an unknown model type, weights that are
            missing or disagree with `config.json`, or a tokenizer that cannot be read.
    """
    name = str(name)
    config = load_config(name)
    model = load_weights(name, config, head_class(name, config))
    tokenizer, sentence = load_tokenizer(name, config), read_modules(name)
    if sentence is not None:
        sentence.check_case(tokenizer)
    return Loaded(name, model, tokenizer, sentence)


def prompt_of(name: str) -> str:
    """What a Hub id or a folder has before every text that it embeds; in most models nothing."""
    modules = read_modules(name)
    return modules.prompt if modules is not None else ""


def load_for_task(name: str, task: Task, seed: int) -> Loaded:
    """Loads a dense model with the head that a task asks for, a new one where the model has none.

    Raises:
        UserError: As `load` does, and for a converted model.
    """
    config = load_config(name)
    refuse_converted(config)
    family_of(config)
    before = labels_of(config)
    cls = give_head(config, task)
    transformers.set_seed(seed)  # a new head is drawn
    model = load_weights(name, config, cls, new_head=True)
    reorder_outputs(model, before, labels_of(config))
    return Loaded(name, model, load_tokenizer(name, config))


def give_head(config: PreTrainedConfig, task: Task) -> Any:
    """The class of a model of this configuration with the head that a task asks for; `config` is told of it.

    Raises:
        UserError: For a head that `transformers` has not for this type of model.
    """
    numbered = task.labels == tuple(str(number) for number in range(len(task.labels)))
    keeps_names = numbered and config.num_labels == task.n_outputs and names_labels(config)
    config.num_labels = task.n_outputs
    if task.labels and not keeps_names:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: number for number, label in enumerate(task.labels)}
    config.problem_type = PROBLEM_TYPE.get(task.kind)  # what an earlier head left there would decide the loss
    auto = f"AutoModel{HEAD_BY_KIND[task.kind]}"
    classes = getattr(transformers, auto)._model_mapping
    if type(config) not in classes:
        raise UserError(f"{config.model_type} has no {auto} in transformers, which {task.name} asks for")
    config.architectures = [classes[type(config)].__name__]
    return classes[type(config)]


def reorder_outputs(model: PreTrainedModel, before: tuple[str, ...], now: tuple[str, ...]) -> None:
    """Puts the outputs of a head that came with its model in the order in which they are named now."""
    if not reordered(before, now):
        return
    place_of = {label.lower(): place for place, label in enumerate(before)}
    order = [place_of[label.lower()] for label in now]
    encoder = set(model.base_model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter not in encoder and len(parameter) == len(order):
                parameter.copy_(parameter[order])


def load_config(name: str | Path) -> PreTrainedConfig:
    """The configuration of a Hub id or a folder. Raises as `load` does."""
    name = str(name)
    if Path(name).is_file():
        raise UserError(f"{name!r} is a file; expected the folder of a saved model")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UserError(f"{name!r} has no config.json; expected the folder of a saved model")
    try:
        config = cast(PreTrainedConfig, AutoConfig.from_pretrained(name, trust_remote_code=False))
    except (*UNREADABLE, HFValidationError, StrictDataclassError) as error:
        near = near_folder(name)
        raise UserError(
            f"{name} could not be loaded; "
            + (f"did you mean {near}? " if near else "")
            + f"expected the folder of a saved model, or a Hub id and access to the Hub ({first_line(error)})"
        ) from error
    if pools(name) and type(config) in transformers.MODEL_MAPPING:
        # of sentence-transformers; where it was made from a model with a head, the configuration names that still
        encoder: Any = transformers.MODEL_MAPPING[type(config)]
        config.architectures = [encoder.__name__]
    return config


def near_folder(name: str) -> str | None:
    """The folder of a saved model whose name is nearly `name`, for a mistyped one looks like a Hub id."""
    path = Path(name)
    if path.is_dir():
        return None
    home = next(parent for parent in path.parents if parent.is_dir())
    depth = len(path.parts) - len(home.parts)
    folders: list[str] = []
    if depth <= FARTHEST:
        with suppress(OSError):  # of folders that are not ours to read
            folders = [str(file.parent) for file in home.glob("*/" * depth + "config.json")]
    return next(iter(get_close_matches(name, folders, n=1)), None)


def head_class(name: str, config: PreTrainedConfig) -> Any:
    """The class that a model was saved with.

    Raises:
        UserError: For a class that is not there, or a model type without a family.
    """
    architecture = config.architectures[0] if config.architectures else None
    if is_converted(config):
        shape_of(config)
        home: Any = modeling
    else:
        family_of(config)
        home = transformers
    cls = getattr(home, str(architecture), None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)) or cls.config_class is not type(
        config
    ):
        raise UserError(
            f"{name}: config.json names the architecture {architecture!r}, "
            f"which is no model of type {config.model_type!r}; expected `architectures` to hold the class that "
            "the model was saved from, such as 'BertModel'"
        )
    return cls


def load_weights(name: str, config: PreTrainedConfig, cls: Any, new_head: bool = False) -> PreTrainedModel:
    """The weights of `name` in a model of class `cls`; those of a new head are drawn. Raises as `load` does."""
    # another kind of attention gives none, and could not be saved with a configuration that asks for them
    attention = {"attn_implementation": "eager"} if config.output_attentions else {}
    try:
        model, info = cls.from_pretrained(
            name,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **attention,
        )
    except (UnpicklingError, EOFError) as error:
        raise UserError(
            f"{name}: its weights are not what PyTorch writes; were they cut short, or cloned without git-lfs?"
        ) from error
    except (*UNREADABLE, RuntimeError, SafetensorError) as error:
        whole = "; were they cut short, or cloned without git-lfs?" * isinstance(error, SafetensorError)
        raise UserError(f"{name}: its weights could not be loaded ({first_line(error)}){whole}") from error
    if (
        info["missing_keys"]
        and model.base_model is model
        and all(key.startswith("pooler.") for key in info["missing_keys"])
    ):
        model.pooler, info["missing_keys"] = None, set()  # an encoder that was saved without one
    check_weights(name, model, info, new_head)
    return cast(PreTrainedModel, model)


def check_weights(name: str, model: PreTrainedModel, info: dict[str, Any], new_head: bool) -> None:
    """Raises a `UserError` for weights that disagree with `config.json`, or are not finite.

    Args:
        name: What an error message calls the model.
        model: The model with its weights.
        info: What `from_pretrained` says of them.
        new_head: Whether weights outside the encoder and its embeddings may be new.
    """
    config = model.config
    layers = family_of(config).layers.partition(".*")[0]

    def in_encoder(key: str) -> bool:
        return f".{layers}." in f".{key}" or (".embeddings." in f".{key}" and "position_ids" not in key)

    for key, stored, expected in sorted(info["mismatched_keys"]):
        if in_encoder(key) or not new_head:
            raise UserError(
                f"{name}: {key} is {list(stored)} in the weights and {list(expected)} by config.json; "
                "expected the same shape"
            )
    missing = sorted(key for key in info["missing_keys"] if in_encoder(key) or not new_head)
    if missing:
        raise UserError(f"{name}: the weights lack {missing[0]}{and_more(missing)} that config.json asks for")
    unexpected = sorted(key for key in info["unexpected_keys"] if f".{layers}." in f".{key}")
    if unexpected:
        raise UserError(
            f"{name}: the weights hold {unexpected[0]}{and_more(unexpected)} that config.json has no place for"
        )
    for key, tensor in model.state_dict().items():  # routers are buffers
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{name}: {key} holds NaN or infinity; expected finite numbers. "
                "Take a checkpoint from before training diverged."
            )


def and_more(keys: list[str]) -> str:
    """How many keys there are beyond the first, in words."""
    return f" and {len(keys) - 1} more" if len(keys) > 1 else ""


def load_tokenizer(name: str, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hub id or a folder, which must fit the model's configuration. Raises as `load` does."""
    try:
        tokenizer = cast(
            PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        )
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(f"{name}: its tokenizer could not be loaded ({first_line(error)})") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of no files at all
        raise UserError(f"{name} holds no tokenizer; expected one beside the weights, such as tokenizer.json")
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{name}: its tokenizer has {len(tokenizer)} tokens and the model {config.vocab_size}; "
            "expected no more than the model has"
        )
    if "attention_mask" not in tokenizer.model_input_names:  # without it padding counts as text
        tokenizer.model_input_names = [*tokenizer.model_input_names, "attention_mask"]
    limit: Any = tokenizer.model_max_length
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 1:
        raise UserError(
            f"{name}: its tokenizer's model_max_length is {limit!r}; expected a number of tokens, 1 at least"
        )
    tokenizer.model_max_length = int(min(limit, longest_text(config)))
    return tokenizer


def save(
    loaded: Loaded,
    folder: Path | str,
    recipe: Recipe | None = None,
    report: dict[str, Any] | None = None,
    title: str | None = None,
) -> None:
    """Writes a model as a folder that stock `transformers` loads.

    The folder holds `model.safetensors`, `config.json`, the tokenizer's files and, where the model came with
    them, those that sentence-transformers reads, the model card `README.md`, for a converted model the code that
    `trust_remote_code` runs, and `recipe.yaml` and `report.json` where these are given.

    Args:
        loaded: The model, its tokenizer, and the name of the model that it was made from.
        folder: Must not exist, or be empty.
        recipe: How it was made.
        report: What was measured.
        title: What its card calls it; the folder's name if not given.

    Raises:
        UserError: For a folder that is not empty.
        NotWritten: For weights that cannot be written, as to a full disk.
        OSError: For any other file that cannot.
    """
    if not isinstance(loaded, Loaded):
        raise UserError(
            f"{type(loaded).__name__} is nothing to save; expected what `load` gives, or `replace(loaded, model=model)`"
        )
    if not is_main_process():
        return
    folder = Path(folder)
    with new_folder(folder) as beside:
        try:
            loaded.model.save_pretrained(beside)
        except (SafetensorError, StrictDataclassError) as error:
            raise NotWritten(
                f"{folder} could not be written ({first_line(error)}); nothing was left behind"
            ) from error
        loaded.tokenizer.save_pretrained(beside)
        if loaded.sentence is not None:
            loaded.sentence.write(beside)
        if recipe is not None:
            (beside / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
        if report is not None:
            write_report(beside, report)
        converted = is_converted(loaded.model.config)
        if converted:
            card = model_card(
                loaded.model.config,
                name=title or folder.name,
                origin=loaded.name,
                mask_token=loaded.tokenizer.mask_token,
                sentence=loaded.sentence is not None,
                report=report or {},
                recipe=recipe is not None,
            )
        else:
            card = dense_card(title or folder.name, loaded.name)
        (beside / "README.md").write_text(str(card), encoding="utf-8")
