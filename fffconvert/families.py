"""Where the FFNs are in each model family. A new family is one row of `FAMILIES` and one test fixture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from fffconvert.dense import DenseFFN
from fffconvert.errors import UserError
from fffconvert.tree import GatedTreeShape, TreeShape

if TYPE_CHECKING:  # importing `transformers` imports `modeling`, which needs this module whole
    from transformers import PreTrainedConfig, PreTrainedModel

PREFIX = "fff-"
"""Before the model type of a converted model."""


@dataclass(frozen=True)
class Family:
    """How to find and replace the FFNs of one family.

    Attributes:
        model_type: The `model_type` of the dense configuration.
        config_class: The name of that configuration in `transformers`.
        layers: Path from the base model to its list of layers; a `*` stands for each member of a list on the way.
        up: Path inside a layer to the linear layer into the neurons.
        gate: In a GLU, path to the linear layer into the gates; the same as `up` where that holds both, the
            neurons' rows first.
        down: Path inside a layer to the linear layer out of the neurons.
        place: Path inside a layer where the FFF goes.
        bypassed: Paths inside a layer that the FFF makes superfluous. Dropout, the residual sum and
            LayerNorm stay the family's own.
        activation: Name of the configuration's activation.
        n_neurons: Name of the configuration's number of neurons.
        n_ffns: Configuration fields whose product is the number of FFNs that are stored.
        offset_positions: Whether positions are counted from behind the padding token's id, as in RoBERTa: so many
            fewer tokens can be read than there are position embeddings.
        pre_norm: Whether an FFN reads the normalized residual, instead of the very tensor that its output is
            added to.
    """

    model_type: str
    config_class: str
    layers: str = "encoder.layer"
    up: str = "intermediate.dense"
    gate: str | None = None
    down: str = "output.dense"
    place: str = "intermediate"
    bypassed: tuple[str, ...] = ("output.dense",)
    activation: str = "hidden_act"
    n_neurons: str = "intermediate_size"
    n_ffns: tuple[str, ...] = ("num_hidden_layers",)
    offset_positions: bool = False
    pre_norm: bool = False

    def with_gates(self, shape: TreeShape) -> TreeShape:
        """A shape as this family's layers have it: in a GLU its neurons have gates."""
        return (TreeShape if self.gate is None else GatedTreeShape)(**shape.to_dict())

    def shape_for(self, config: PreTrainedConfig, shape: TreeShape) -> TreeShape:
        """The shape of every layer of a dense model for one that was asked for, with all of it decided."""
        return self.with_gates(shape).for_width(config.hidden_size)


FAMILIES = {
    family.model_type: family
    for family in (
        Family("bert", "BertConfig"),
        Family("roberta", "RobertaConfig", offset_positions=True),
        Family("xlm-roberta", "XLMRobertaConfig", offset_positions=True),
        Family("camembert", "CamembertConfig", offset_positions=True),
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
        ),
        Family("mpnet", "MPNetConfig", offset_positions=True),
        Family("deberta", "DebertaConfig"),
        Family("deberta-v2", "DebertaV2Config"),  # and v3
        Family(
            "albert",
            "AlbertConfig",
            layers="encoder.albert_layer_groups.*.albert_layers",
            up="ffn",
            down="ffn_output",
            place="ffn",
            bypassed=("activation", "ffn_output"),
            n_ffns=("num_hidden_groups", "inner_group_num"),
        ),
        Family(
            "modernbert",
            "ModernBertConfig",
            layers="layers",
            up="mlp.Wi",
            gate="mlp.Wi",
            down="mlp.Wo",
            place="mlp",
            bypassed=(),
            activation="hidden_activation",
            pre_norm=True,
        ),
        *(
            Family(
                model_type,
                config_class,
                layers="layers",
                up="mlp.gate_proj",  # its rows go through the activation
                gate="mlp.up_proj",
                down="mlp.down_proj",
                place="mlp",
                bypassed=(),
                pre_norm=pre_norm,
            )
            for model_type, config_class, pre_norm in (
                ("nomic_bert", "NomicBertConfig", False),
                ("eurobert", "EuroBertConfig", True),
            )
        ),
        Family(
            "jina_embeddings_v3",
            "JinaEmbeddingsV3Config",
            layers="layers",
            up="mlp.fc1",
            down="mlp.fc2",
            place="mlp",
            bypassed=(),
        ),
        Family("ernie", "ErnieConfig"),
        Family("xlm-roberta-xl", "XLMRobertaXLConfig", offset_positions=True, pre_norm=True),
    )
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a dense or converted model.

    Raises:
        UserError: For a model type without a row in `FAMILIES`.
    """
    model_type = config.model_type.removeprefix(PREFIX)
    if model_type not in FAMILIES:
        raise UserError(
            f"model type {model_type!r} is not supported; expected one of {', '.join(FAMILIES)}. "
            "A new family is one row in fffconvert/families.py."
        )
    return FAMILIES[model_type]


def longest_text(config: PreTrainedConfig) -> int:
    """Tokens that a dense or converted model can read at once. Raises as `family_of` does, and without padding."""
    family = family_of(config)
    if family.offset_positions and config.pad_token_id is None:
        raise UserError(
            "config.json has no pad_token_id; expected one, from behind which positions are counted"
        )
    unused = config.pad_token_id + 1 if family.offset_positions else 0
    return int(config.max_position_embeddings - unused)


def chooses_among_texts(model: PreTrainedModel) -> bool:
    """Whether a model's head reads several texts for one answer, in a dimension of their own."""
    return type(model).__name__.endswith("ForMultipleChoice")


def random_ids(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    """Token ids `(batch, length)`, the same in every run; for a head that chooses among texts `(batch, 1, length)`."""
    size = (batch, 1, length) if chooses_among_texts(model) else (batch, length)
    return torch.randint(5, model.config.vocab_size, size, generator=torch.Generator().manual_seed(0))


def members_at(root: nn.Module, path: str) -> list[nn.Module]:
    """The members of the list at `path`, where a `*` stands for each member of a list on the way."""
    head, _, rest = path.partition(".*.")
    members = list(cast(nn.ModuleList, root.get_submodule(head)))
    return [inner for member in members for inner in members_at(member, rest)] if rest else members


def layers_of(model: PreTrainedModel, family: Family) -> list[nn.Module]:
    """The layers that hold an FFN each, first to last; one that the model uses several times comes once.

    Raises:
        UserError: For a model whose layers are not where its family has them.
    """
    try:
        layers = members_at(model.base_model, family.layers)
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


def ffn_starts_of(model: PreTrainedModel, family: Family) -> list[nn.Module]:
    """The modules whose input is the input of an FFN, first layer to last."""
    return [layer.get_submodule(family.place) for layer in layers_of(model, family)]


def ffn_ends_of(model: PreTrainedModel, family: Family) -> list[nn.Module]:
    """The modules of a dense model whose output is the output of an FFN, first layer to last."""
    return [layer.get_submodule(family.down) for layer in layers_of(model, family)]


def count_ffns(config: PreTrainedConfig, family: Family) -> int:
    """FFNs that a model stores: fewer than it has layers where layers share them."""
    return prod(getattr(config, name) for name in family.n_ffns)


def uses_of_ffn(config: PreTrainedConfig) -> int:
    """How often a model uses each FFN that it stores, at the most: more than once where layers share it (ALBERT)."""
    return -(-config.num_hidden_layers // getattr(config, family_of(config).n_ffns[0]))


def read_ffns(model: PreTrainedModel, family: Family) -> list[DenseFFN]:
    """Copies of the dense FFNs, first layer to last.

    Raises:
        UserError: For a model whose FFNs are not where its family has them, or that are not finite.
    """
    activation = getattr(model.config, family.activation)
    into = (family.up,) if family.gate in (None, family.up) else (family.up, str(family.gate))
    return [
        DenseFFN.read(
            [cast(nn.Linear, layer.get_submodule(path)) for path in into],
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
    """Puts what `make` returns in the place of each `nn.Linear` that a model's layers hold."""
    for layer in layers_of(model, family):
        for path, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                layer.set_submodule(path, make(module))
