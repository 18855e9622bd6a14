"""Converted models as ordinary `transformers` models, one configuration per family and one class per head.

For each family this derives a configuration (`fff-bert` from `bert`, holding the tree's shape under
`fff`) and, for each head that the family has, a class that differs from the dense one only in its FFNs.
Both are registered with the Auto classes, the way `transformers` documents for custom models, so that
`from_pretrained`, `pipeline`, `Trainer` and `save_pretrained` treat a converted model like any other.
A registered quantization method would take less code, but `transformers` would treat the model as quantized
and refuse `.half()`, `Trainer` and `deepcopy`; with a model type of its own, a program without fffconvert
asks before it runs the model's code, and never loads a BERT with random FFNs.
Where fffconvert is not installed the same code is read from one file beside the weights (see `fffconvert.remote`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import guard_torch_init_functions

from fffconvert.configuration import is_int8, shape_of
from fffconvert.errors import UserError
from fffconvert.families import (
    FAMILIES,
    PREFIX,
    Family,
    family_of,
    replace_ffns,
    replace_projections,
)
from fffconvert.fff import FFF, fffs_of
from fffconvert.int8 import Int8Linear
from fffconvert.onednn import OneDNNLinear
from fffconvert.remote import flat_source

CODE_MODULE = "modeling_fff"  # the flat file beside the weights, without `.py`


def check_is_model(model: Any) -> None:
    """Raises a `UserError` for what is no model, such as the name of one, or what `load` gives."""
    if not isinstance(getattr(model, "config", None), PreTrainedConfig):
        raise UserError(
            f"{type(model).__name__} is no model of transformers; expected one, such as `load(name).model`"
        )


def refuse_inference(model: PreTrainedModel) -> None:
    """Raises a `UserError` for a model whose weights nothing can be differentiated by."""
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise UserError(
            "the model was made under torch.inference_mode(); expected one that was loaded outside of it"
        )


class _FFFConfigMixin(PreTrainedConfig if TYPE_CHECKING else object):  # type: ignore[misc]
    """What a converted configuration adds to the dense one, besides its fields."""

    def __post_init__(self, **kwargs: Any) -> None:
        """As ever; before a model can be made or loaded, the Auto classes know its heads."""
        register_heads(family_of(self))
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As ever; models save their configuration here. The code for `trust_remote_code` goes beside it."""
        self.auto_map = auto_map(family_of(self))
        super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / f"{CODE_MODULE}.py").write_text(flat_source(), encoding="utf-8")


@cache
def config_class(family: Family) -> type[PreTrainedConfig]:
    """The configuration class of a converted family: the dense one, `fff` and `int8_projections`."""
    dense = getattr(transformers, family.config_class)
    name = f"FFF{family.config_class}"
    fields = {
        "__module__": __name__,
        "__doc__": f"`{family.config_class}`, with `fff`, the shape of the trees (see `fffconvert.TreeShape`), and "
        "`int8_projections`, whether the attention's projections are stored in int8, and the trees in bfloat16.",
        "__annotations__": {"fff": dict[str, Any] | None, "int8_projections": bool},
        "model_type": PREFIX + family.model_type,
        "fff": None,
        "int8_projections": False,
    }
    return cast(type[PreTrainedConfig], type(name, (_FFFConfigMixin, dense), fields))


def config_with(config: PreTrainedConfig, cls: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """The values of one configuration in another class, some of them changed."""
    own = ("model_type", "fff", "int8_projections", "auto_map")
    values = {key: value for key, value in config.to_dict().items() if key not in own}
    changes["attn_implementation"] = config._attn_implementation
    return cls(**values, **changes)


class _FFFMixin(PreTrainedModel if TYPE_CHECKING else object):  # type: ignore[misc]
    """What a converted class changes in the dense one: FFF layers for FFNs, and int8 where that is asked."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        install(self, family_of(config))

    @guard_torch_init_functions()  # what was loaded is left alone
    def initialize_weights(self) -> None:
        """Draws what a checkpoint lacks; `transformers` knows no FFF layer and would leave what memory holds."""
        super().initialize_weights()
        for fff in fffs_of(self):
            fff.reset_parameters()


def install(model: PreTrainedModel, family: Family) -> None:
    """Replaces the FFNs of `model` by what its configuration names, and the projections by faster ones or by int8."""
    config = model.config
    shape = shape_of(config)
    d_model, activation = config.hidden_size, getattr(config, family.activation)
    replace_ffns(model, family, lambda: FFF(shape, d_model, activation))
    if config.int8_projections:
        replace_projections(model, family, lambda layer: Int8Linear(layer.in_features, layer.out_features))
        trees_to_bfloat16(model)
    else:
        replace_projections(model, family, OneDNNLinear.from_linear)


def trees_to_bfloat16(model: PreTrainedModel) -> None:
    """Stores the trees of an int8 model in bfloat16; `from_pretrained` keeps the dtype that it finds in a new model."""
    for fff in fffs_of(model):
        fff.bfloat16()


@cache
def model_class(dense_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The converted counterpart of a dense model class, head included.

    Raises:
        UserError: For a class of a family without a row in `FAMILIES`.
    """
    family = family_of(cast(PreTrainedConfig, dense_class.config_class))
    fields = {
        "__module__": __name__,
        "__doc__": f"`{dense_class.__name__}` with fast feedforward trees for FFNs.",
        "config_class": config_class(family),
    }
    return cast(type[PreTrainedModel], type(f"FFF{dense_class.__name__}", (_FFFMixin, dense_class), fields))


def counterpart(
    model: PreTrainedModel, cls: type[PreTrainedModel], config: PreTrainedConfig
) -> PreTrainedModel:
    """An untrained model of another class in the dtype of `model`, without a pooler where that has none."""
    made: Any = cls._from_config(config, dtype=model.dtype)  # rotary frequencies stay in float32
    if not is_int8(config):
        for parameter in made.parameters():
            parameter.data = parameter.data.to(model.dtype)  # DeBERTa has some in float32 whatever it is told
    if getattr(model, "pooler", made) is None:
        made.pooler = None
    if getattr(model, "generation_config", None) is not None:  # of a decoder
        made.generation_config = deepcopy(model.generation_config)
    return cast(PreTrainedModel, made)


def dense_class_of(cls: type[PreTrainedModel]) -> Any:
    """The class of `transformers` that a class, such as a converted model's, is derived from; none if there is none."""
    return next((each for each in cls.__mro__ if each.__module__.startswith("transformers.")), None)


def __getattr__(name: str) -> Any:
    """`FFFBertModel`, `FFFBertConfig` and the others, so that pickle and `auto_map` find them by name."""
    dense: Any = getattr(transformers, name.removeprefix("FFF"), None) if name.startswith("FFF") else None
    config = getattr(dense, "config_class", dense)  # of a model or, for a configuration, itself
    if getattr(config, "model_type", None) in FAMILIES:
        return config_class(FAMILIES[config.model_type]) if dense is config else model_class(dense)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def heads_of(family: Family) -> Iterator[tuple[Any, Any]]:
    """Every Auto class that knows the dense family, with the dense class that it gives."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    dense_config = getattr(transformers, family.config_class)
    for value in list(vars(modeling_auto).values()):
        if isinstance(value, type) and issubclass(value, _BaseAutoModelClass):
            mapping = value._model_mapping
            if mapping is not None and dense_config in mapping:
                found: Any = mapping[dense_config]
                for dense_class in found if isinstance(found, tuple) else (found,):
                    yield value, dense_class


def auto_map(family: Family) -> dict[str, str]:
    """What `config.json` says for `trust_remote_code`: for each Auto class a class of the flat file."""
    heads = {auto_class.__name__: dense_class.__name__ for auto_class, dense_class in heads_of(family)}
    names = {"AutoConfig": family.config_class, **heads}
    return {auto_class: f"{CODE_MODULE}.FFF{name}" for auto_class, name in names.items()}


def register() -> None:
    """Makes `AutoConfig` know every converted family. Called once, when this is imported."""
    for family in FAMILIES.values():
        converted_config = config_class(family)
        AutoConfig.register(converted_config.model_type, converted_config)


@cache
def register_heads(family: Family) -> None:
    """Makes the Auto classes know every head of a family.

    Called when the first configuration is made, and not at the import of the Auto classes: that may come
    from the import of the dense models, which are then not there yet.
    """
    for auto_class, dense_class in heads_of(family):
        auto_class.register(config_class(family), model_class(dense_class), exist_ok=True)


if __name__ == "fffconvert.modeling":  # and not the flat file
    register()
