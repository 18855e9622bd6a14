"""What a configuration says of a model's FFNs, dense or converted."""

from __future__ import annotations

from transformers import PreTrainedConfig

from fffconvert.errors import UserError
from fffconvert.families import PREFIX, family_of
from fffconvert.tree import TreeShape


def is_converted(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a converted model."""
    return config.model_type.startswith(PREFIX)


def is_int8(config: PreTrainedConfig) -> bool:
    """Whether a model's projections are stored in int8; of a dense model they never are."""
    return bool(getattr(config, "int8_projections", False))


def shape_of(config: PreTrainedConfig) -> TreeShape:
    """The tree's shape in a converted model's configuration.

    Raises:
        UserError: For a configuration without one, or with one that no tree can have.
    """
    try:
        return family_of(config).with_gates(TreeShape(**config.fff))
    except (AttributeError, TypeError, UserError) as error:
        raise UserError(f"config.json: `fff` does not hold the shape of a tree ({error})") from error


def dense_neurons(config: PreTrainedConfig) -> int:
    """Neurons of one dense FFN of the original model."""
    return int(getattr(config, family_of(config).n_neurons))


def active_neurons(config: PreTrainedConfig) -> float:
    """Neurons that one token uses in each layer of a converted or a dense model."""
    return shape_of(config).active_neurons if is_converted(config) else float(dense_neurons(config))


def refuse_converted(config: PreTrainedConfig) -> None:
    """Raises a `UserError` for a model that has trees already."""
    if is_converted(config):
        raise UserError(f"{config.name_or_path or 'the model'} is converted already; expected a dense model")


def refuse_dense(config: PreTrainedConfig) -> None:
    """Raises a `UserError` for a model that has no trees."""
    if not is_converted(config):
        raise UserError(
            f"{config.name_or_path or 'the model'} is dense; expected a converted model (fffconvert convert)"
        )
