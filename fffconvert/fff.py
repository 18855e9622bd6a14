"""The fast feedforward layer: the module that stands where a dense FFN stood."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fffconvert.errors import UserError
from fffconvert.kernels import ACTIVATIONS, FFFWeights, fff_forward, route
from fffconvert.tree import TreeShape

ROUTED_AT_ONCE = 2048  # tokens whose routers, a row of weights each, stay in the processor's cache


class FFF(nn.Module):
    """A fast feedforward layer (Belcak & Wattenhofer, arXiv 2308.14711 and 2311.10770), hard routed.

    Routers that do not emit are buffers, fixed after conversion: a hard choice passes them no gradient.

    Args:
        shape: The shape of the tree or trees.
        d_model: Width of inputs and outputs.
        activation: The dense model's, a name in `fffconvert.kernels.ACTIVATIONS`; a linear shape does without.

    Shapes:
        Input and output are `(..., d_model)`.

    Raises:
        UserError: For an activation that the kernels do not know.
    """

    router_weight: Tensor
    router_bias: Tensor
    node_out_weight: Tensor
    leaf_in_weight: Tensor
    leaf_in_bias: Tensor
    leaf_out_weight: Tensor
    leaf_out_bias: Tensor
    trunk_in_weight: Tensor
    trunk_in_bias: Tensor
    trunk_out_weight: Tensor

    def __init__(self, shape: TreeShape, d_model: int, activation: str) -> None:
        super().__init__()
        self.shape = shape
        self.d_model = d_model
        self.activation = "identity" if shape.linear else activation
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        for name, size in self.parameter_shapes().items():
            stored = 0 not in size  # else a part that this shape lacks
            trained = shape.emitting or not name.startswith("router_")
            if stored and trained:
                self.register_parameter(name, nn.Parameter(torch.empty(size)))
            else:
                skeleton = torch.empty(0).is_meta and not stored  # nothing will be loaded into this part
                part = torch.empty(size, device="cpu" if skeleton else None)
                self.register_buffer(name, part, persistent=stored)
        self.reset_parameters()

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The size of each tensor of `FFFWeights`; a part that the shape lacks has a dimension of 0."""
        s, d_model = self.shape, self.d_model
        leaf = (s.trees, s.n_leaves)
        return {
            "router_weight": (s.trees, s.n_nodes, d_model),
            "router_bias": (s.trees, s.n_nodes),
            "node_out_weight": (s.trees, s.n_nodes if s.emitting else 0, d_model),
            "leaf_in_weight": (*leaf, s.n_inputs * s.leaf_width, d_model),
            "leaf_in_bias": (*leaf, s.n_inputs * s.leaf_width),
            "leaf_out_weight": (*leaf, s.leaf_width, d_model),
            "leaf_out_bias": (*leaf, d_model),
            "trunk_in_weight": (s.n_inputs * s.trunk, d_model),
            "trunk_in_bias": (s.n_inputs * s.trunk,),
            "trunk_out_weight": (s.trunk, d_model),
        }

    def reset_parameters(self) -> None:
        """Draws every number as `nn.Linear` would draw it for as many inputs; output biases are 0."""
        active = max(1.0, self.shape.active_neurons)
        for name in self.parameter_shapes():
            fan_in = active if "_out_" in name else self.d_model
            bound = 0.0 if name == "leaf_out_bias" else fan_in**-0.5
            nn.init.uniform_(getattr(self, name), -bound, bound)

    @property
    def weights(self) -> FFFWeights:
        """The layer's tensors as the kernels take them."""
        held = {**self._parameters, **self._buffers}  # ten `getattr`s take 10 µs
        # those of a replica in `nn.DataParallel`, and parametrized ones, are elsewhere
        parts = [held[n] if n in held else getattr(self, n) for n in FFFWeights._fields]
        return FFFWeights(*parts)  # type: ignore[arg-type]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Runs the layer on `(..., d_model)`."""
        return fff_forward(hidden_states, self.weights, self.activation)

    @torch.no_grad()
    def leaf_of(self, hidden_states: Tensor) -> Tensor:
        """The leaf each token reaches, `(n_tokens, n_trees)`, from `(..., d_model)`."""
        tokens = hidden_states.reshape(-1, self.d_model)
        pieces = tokens.split(ROUTED_AT_ONCE)
        trees = range(self.shape.trees)
        return torch.cat(
            [torch.stack([route(some, self.weights, tree) for tree in trees], 1) for some in pieces]
        )

    def extra_repr(self) -> str:
        """Shape, width and activation, for `print(model)`."""
        facts = {**self.shape.to_dict(), "gated": self.shape.gated}
        shape = ", ".join(f"{name}={value}" for name, value in facts.items())
        return f"d_model={self.d_model}, {shape}, activation={self.activation!r}"


def fffs_of(model: nn.Module) -> list[FFF]:
    """The fast feedforward layers of a converted model, first to last."""
    return [module for module in model.modules() if isinstance(module, FFF)]
