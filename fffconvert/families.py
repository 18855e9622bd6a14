"""Where the FFNs are in each model family. A new family is one row of `FAMILIES` and one test fixture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fffconvert.dense import DenseFFN
from fffconvert.errors import UserError


@dataclass(frozen=True)
class Family:
    """How to find and replace the FFNs of one family.

    Attributes:
        model_type: The `model_type` of the dense configuration.
        config_class: The name of that configuration in `transformers`.
        layers: Path from the base model to its list of layers.
        up: Path inside a layer to the linear layer into the neurons.
        down: Path inside a layer to the linear layer out of the neurons.
        place: Path inside a layer where the FFF goes.
        bypassed: Paths inside a layer that the FFF makes superfluous. Dropout, the residual sum and
            LayerNorm stay the family's own.
        activation: Name of the configuration's activation.
        n_neurons: Name of the configuration's number of neurons.
        d_model: Name of the configuration's width.
    """

    model_type: str
    config_class: str
    layers: str = "encoder.layer"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    place: str = "intermediate"
    bypassed: tuple[str, ...] = ("output.dense",)
    activation: str = "hidden_act"
    n_neurons: str = "intermediate_size"
    d_model: str = "hidden_size"


FAMILIES = {
    family.model_type: family
    for family in (
        Family("bert", "BertConfig"),
        Family("roberta", "RobertaConfig"),
        Family("xlm-roberta", "XLMRobertaConfig"),
        Family("camembert", "CamembertConfig"),
        Family("electra", "ElectraConfig"),
        Family(
            "distilbert",
            "DistilBertConfig",
            layers="transformer.layer",
            up="ffn.lin1",
            down="ffn.lin2",
            place="ffn.lin1",
            bypassed=("ffn.activation", "ffn.lin2"),
            activation="activation",
            n_neurons="hidden_dim",
            d_model="dim",
        ),
    )
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a dense model's configuration.

    Raises:
        UserError: For a model type without a row in `FAMILIES`.
    """
    if config.model_type not in FAMILIES:
        raise UserError(
            f"model type {config.model_type!r} is not supported; expected one of {', '.join(FAMILIES)}. "
            "A new family is one row in fffconvert/families.py."
        )
    return FAMILIES[config.model_type]


def base_of(model: PreTrainedModel) -> nn.Module:
    """The encoder inside a model with a head; the model itself where it has none."""
    return cast(nn.Module, getattr(model, model.base_model_prefix, model))


def layers_of(model: PreTrainedModel, family: Family) -> list[nn.Module]:
    """The layers that hold an FFN each, first to last.

    Raises:
        UserError: For a model whose layers are not where its family has them.
    """
    try:
        layers = list(cast(nn.ModuleList, base_of(model).get_submodule(family.layers)))
        if not layers:
            raise AttributeError("it has no layers")
        for layer in layers:
            layer.get_submodule(family.place)
    except AttributeError as error:
        raise UserError(
            f"{type(model).__name__} has no FFNs at {family.layers}[i].{family.place}, "
            f"where the {family.model_type} family has them ({error})"
        ) from error
    return layers


def ffn_inputs_of(model: PreTrainedModel, family: Family) -> list[nn.Module]:
    """The modules whose input is the input of an FFN, first layer to last."""
    return [layer.get_submodule(family.place) for layer in layers_of(model, family)]


def read_ffns(model: PreTrainedModel, family: Family) -> list[DenseFFN]:
    """Copies of the dense FFNs, first layer to last.

    Raises:
        UserError: For a model whose FFNs are not where its family has them, or that are not finite.
    """
    activation = getattr(model.config, family.activation)
    return [
        DenseFFN.read(
            cast(nn.Linear, layer.get_submodule(family.up)),
            cast(nn.Linear, layer.get_submodule(family.down)),
            activation,
            name=f"layer {number}",
        )
        for number, layer in enumerate(layers_of(model, family))
    ]


def replace_ffns(model: PreTrainedModel, family: Family, make: Callable[[], nn.Module]) -> None:
    """Puts what `make` returns in the place of each dense FFN, and nothing where the rest of it was."""
    for layer in layers_of(model, family):
        for path in family.bypassed:
            layer.set_submodule(path, nn.Identity())
        layer.set_submodule(family.place, make())


def replace_projections(
    model: PreTrainedModel, family: Family, make: Callable[[nn.Linear], nn.Module]
) -> None:
    """Puts what `make` returns in the place of each `nn.Linear` that a converted model's layers still hold."""
    for layer in layers_of(model, family):
        for path, module in list(layer.named_modules()):
            if type(module) is nn.Linear:
                layer.set_submodule(path, make(module))
