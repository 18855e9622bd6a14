"""What a model holds, and what this machine has to run it."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fffconvert import kernels
from fffconvert.checkpoint import load_config
from fffconvert.configuration import dense_neurons, is_converted, is_int8, shape_of
from fffconvert.families import count_ffns, family_of
from fffconvert.machine import processor_name, versions
from fffconvert.report import fits_of
from fffconvert.tree import TreeShape

OPTIONAL = ("onnxruntime", "sentence-transformers", "triton")


@dataclass(frozen=True)
class Info:
    """What a model's folder says of its FFNs.

    Attributes:
        name: Hub id or folder.
        model_type: As in `config.json`.
        n_layers: Layers that use an FFN.
        n_ffns: FFNs that are stored: fewer where layers share one (ALBERT).
        d_model: Their width.
        dense_neurons: Neurons of a dense FFN.
        gated: Whether its neurons have gates (a GLU).
        tree: The shape of every layer; none for a dense model.
        active_neurons: Neurons that one token uses in a layer.
        int8: Whether its projections are stored in int8, and its trees in bfloat16.
        ffn_parameters: Numbers that one FFN or FFF layer stores.
        dense_ffn_parameters: Numbers that one dense FFN stores.
        layers: The fit of each layer and the shares of its leaves, where the folder's report has them.
    """

    name: str
    model_type: str
    n_layers: int
    n_ffns: int
    d_model: int
    dense_neurons: int
    gated: bool
    tree: TreeShape | None
    active_neurons: float
    int8: bool
    ffn_parameters: int
    dense_ffn_parameters: int
    layers: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `--json` holds them."""
        return asdict(self)


def info(name: str | Path) -> Info:
    """Reads what a model's configuration and report say of its FFNs; no weights are loaded.

    Raises:
        UserError: For a name that cannot be loaded, or a model type without a family.
    """
    config = load_config(name)
    converted = is_converted(config)
    family = family_of(config)
    d_model, n_neurons = int(config.hidden_size), dense_neurons(config)
    dense = family.with_gates(TreeShape(depth=0, leaf_width=n_neurons))
    tree = shape_of(config) if converted else None
    return Info(
        name=str(name),
        model_type=config.model_type,
        n_layers=config.num_hidden_layers,
        n_ffns=count_ffns(config, family),
        d_model=d_model,
        dense_neurons=n_neurons,
        gated=dense.gated,
        tree=tree,
        active_neurons=(tree or dense).active_neurons,
        int8=is_int8(config),
        ffn_parameters=(tree or dense).n_parameters(d_model),
        dense_ffn_parameters=dense.n_parameters(d_model),
        layers=fits_of(name),
    )


def version_of(package: str) -> str:
    """The version of a package that need not be there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def env() -> dict[str, str]:
    """Versions, processor, and for each kernel whether it is available or why not."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    found = {
        **versions(),
        **{package: version_of(package) for package in OPTIONAL},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "threads": str(torch.get_num_threads()),
        "GPU": cuda,
    }
    for kernel in kernels.status().values():
        found[f"kernel {kernel.name}"] = (
            f"{'available' if kernel.available else 'not available'}: {kernel.reason}"
        )
    return found
