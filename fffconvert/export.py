"""ONNX: a dense or converted model as a graph of standard operators, for ONNX Runtime and the like.

A graph cannot take tokens leaf by leaf as the reference does, so it takes them in blocks: tokens are sorted
by leaf, cut into blocks of a few that share a leaf, and a batched matrix product gives each block its leaf's
weights. Few tokens are not worth the sorting: each is then a block of its own. In ONNX Runtime this was
faster than a loop over the leaves, than its mixture-of-experts operator, and than computing every leaf.
"""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fffconvert.configuration import is_int8
from fffconvert.errors import UserError, first_line
from fffconvert.families import chooses_among_texts
from fffconvert.fff import FFF
from fffconvert.kernels import FFFWeights, reference
from fffconvert.modeling import check_is_model
from fffconvert.modes import undivided

BLOCK = 8  # tokens
FEW_TOKENS = 256  # up to so many, a block is one token
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
LARGEST_FILE = 2**31  # bytes, protobuf's limit; past it the weights lie in a second file


def export_onnx(model: PreTrainedModel, file: Path | str, inputs: Sequence[str] = INPUTS) -> None:
    """Writes a model, dense or converted, as ONNX with dynamic batch and length.

    Inputs and outputs have the names that `transformers` gives them.

    Args:
        model: Any head. Left as it was; exported in float32.
        file: The new file; weights past protobuf's 2 GB go beside it, as `FILE.data`.
        inputs: Those of `INPUTS` that the graph is to take, as far as the model does.

    Raises:
        UserError: Where the extra `onnx` is not installed, there is no folder for the file, or the model cannot be
            exported, as no int8 model can.
    """
    check_exportable(model)
    if not Path(file).parent.is_dir():
        raise UserError(f"there is no folder {Path(file).parent} to write {file} in")
    exported = _Exported(model, inputs)
    names = exported.input_names
    examples = tuple(torch.ones(2, 8, dtype=torch.long) for _ in names)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    size = sum(t.nbytes for t in exported.state_dict().values())
    try:
        with warnings.catch_warnings(), quiet_logging(), undivided(exported), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                exported,
                examples,
                file,
                input_names=names,
                output_names=list(exported.outputs(examples)),
                dynamic_shapes=(tuple(axes for _ in names),),
                external_data=size >= LARGEST_FILE,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"{type(model).__name__} could not be exported ({first_line(error)})") from error


def check_exportable(model: PreTrainedModel) -> None:
    """Raises a `UserError` for a model that cannot be exported, or where the extra `onnx` is not installed."""
    check_is_model(model)
    if is_int8(model.config):
        raise UserError("an int8 model has no graph; export the model that it was made from")
    if chooses_among_texts(model):
        raise UserError("a head that chooses among several texts has no graph yet; expected any other head")
    try:
        import onnxscript  # noqa: F401 - what the exporter needs
    except ImportError as error:
        raise UserError("ONNX needs more packages: pip install 'fffconvert[onnx]'") from error


@contextmanager
def quiet_logging() -> Iterator[None]:
    """Keeps the exporter's remarks off the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class _Exported(nn.Module):
    """A copy of a model in float32, from tensors in a fixed order to tensors in a fixed order."""

    def __init__(self, model: PreTrainedModel, inputs: Sequence[str]) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).cpu().float().eval()
        for path, module in list(self.model.named_modules()):
            if isinstance(module, FFF):
                self.model.set_submodule(path, _ExportedFFF(module))
        known = inspect.signature(model.forward).parameters
        kinds = getattr(model.config, "type_vocab_size", 0)
        self.input_names = [n for n in inputs if n in known and (n != "token_type_ids" or kinds > 1)]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.outputs(inputs).values())

    def outputs(self, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """What the graph gives, by name."""
        found = self.model(**dict(zip(self.input_names, inputs, strict=True)), return_dict=True)
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}


class _ExportedFFF(nn.Module):
    """The reference, with its leaves taken in blocks."""

    def __init__(self, layer: FFF) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor) -> Tensor:
        tokens = hidden_states.reshape(-1, self.layer.d_model)  # (n_tokens, d_model)
        y = reference.fff_forward(tokens, self.layer.weights, self.layer.activation, leaves_in_blocks)
        return y.reshape(hidden_states.shape)


def leaves_in_blocks(x: Tensor, leaf: Tensor, weights: FFFWeights, tree: int, activation: str) -> Tensor:
    """`reference.leaves_forward` without a loop: `(n_tokens, d_model)`, from `leaf` `(n_tokens,)`."""

    def few(x: Tensor, leaf: Tensor, *tables: Tensor) -> Tensor:
        return block_ffn(x[:, None], leaf, tables, activation)[:, 0]

    def many(x: Tensor, leaf: Tensor, *tables: Tensor) -> Tensor:
        return blocks(x, leaf, tables, activation)

    return torch.cond(x.shape[0] <= FEW_TOKENS, few, many, (x, leaf, *weights.leaves(tree)))


def block_ffn(x: Tensor, leaf: Tensor, tables: Sequence[Tensor], activation: str) -> Tensor:
    """Blocks of tokens `(n_blocks, n, d_model)`, each through its leaf's `reference.dense_ffn`, `(n_blocks,)`."""
    in_weight, in_bias, out_weight, out_bias = (table[leaf] for table in tables)
    scores = x @ in_weight.mT + in_bias[:, None]  # (n_blocks, n, leaf_width), or as many gates more
    neurons = reference.ACTIVATIONS[activation](scores[..., : out_weight.shape[1]])
    if scores.shape[-1] > out_weight.shape[1]:
        neurons = neurons * scores[..., out_weight.shape[1] :]
    return neurons @ out_weight + out_bias[:, None]


def blocks(x: Tensor, leaf: Tensor, tables: Sequence[Tensor], activation: str) -> Tensor:
    """Tokens `(n_tokens, d_model)` sorted by leaf, cut into blocks, run, and put back in their order."""
    n_leaves = tables[0].shape[0]
    sorted_leaf, order = leaf.sort()
    counts = torch.zeros(n_leaves, dtype=torch.long).scatter_add(0, leaf, torch.ones_like(leaf))
    n_blocks = (counts + BLOCK - 1) // BLOCK  # of each leaf
    first_token, first_block = counts.cumsum(0) - counts, n_blocks.cumsum(0) - n_blocks
    slot = torch.arange(x.shape[0]) + (first_block * BLOCK - first_token)[sorted_leaf]  # of each sorted token
    total = int(n_blocks.sum().item())
    torch._check(total >= 1)
    token = torch.zeros(total * BLOCK, dtype=torch.long).scatter(0, slot, order)  # empty slots run token 0
    leaf_of_block = torch.zeros(total, dtype=torch.long).scatter(0, slot // BLOCK, sorted_leaf)
    y = block_ffn(x[token].unflatten(0, (total, BLOCK)), leaf_of_block, tables, activation)
    return y.flatten(0, 1)[torch.zeros_like(slot).scatter(0, order, slot)]
