"""The dense model in ONNX Runtime, float32 and dynamic int8: the usual way to a faster BERT on a CPU."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

NAMES = ("ONNX Runtime", "ONNX Runtime int8")
_FILES = dict(zip(NAMES, ("float32.onnx", "int8.onnx"), strict=True))
CLOSE = 1e-3  # of outputs, which are of order 1
_NEEDED = ("onnx", "onnxruntime", "onnxscript")


def missing() -> str | None:
    """Why ONNX Runtime cannot be used here; nothing where it can."""
    lacking = [name for name in _NEEDED if find_spec(name) is None]
    return f"{', '.join(lacking)} not installed; pip install 'fffconvert[onnx]'" if lacking else None


class _FirstOutput(nn.Module):
    """A model as a function from token ids to its first output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        output: Tensor = self.model(input_ids=input_ids)[0]
        return output


def export(model: PreTrainedModel, ids: Tensor, folder: Path) -> None:
    """Writes a model for any batch and length to `folder`, in float32 and in dynamic int8.

    The graph goes through ONNX Runtime's own optimizer for transformers first, which fuses what it knows.

    Raises:
        ValueError: Where the optimizer took the graph for a BERT's that is none, and it gives other numbers.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.optimizer import optimize_model

    plain = folder / "exported.onnx"
    any_size = {"input_ids": {0: "batch", 1: "length"}}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet_logging():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _FirstOutput(model).eval(),
            (ids,),
            plain,
            input_names=["input_ids"],
            dynamic_shapes=any_size,
            dynamo=True,
            verbose=False,
        )
        heads, width = model.config.num_attention_heads, model.config.hidden_size
        optimized = optimize_model(str(plain), model_type="bert", num_heads=heads, hidden_size=width)
        optimized.save_model_to_file(str(folder / _FILES[NAMES[0]]))
        quantize_dynamic(
            folder / _FILES[NAMES[0]],
            folder / _FILES[NAMES[1]],
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
    with torch.no_grad():
        expected = model(input_ids=ids)[0].numpy()
    given = [run()[0] for run in runs(folder, ids, 1).values()]  # int8 is run too: it may fail only then
    if not np.allclose(given[0], expected, atol=CLOSE):
        raise ValueError("ONNX Runtime's optimized graph gives other numbers than PyTorch")


@contextlib.contextmanager
def _quiet_logging() -> Iterator[None]:
    """Keeps the exporters' remarks off the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def runs(folder: Path, ids: Tensor, threads: int) -> dict[str, Callable[[], Any]]:
    """What `export` wrote, ready to be timed on `ids` `(batch, length)` with so many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # after a run; others are timed then
    inputs = {"input_ids": ids.numpy()}

    def run(file: str) -> Callable[[], Any]:
        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(folder / file, options, providers=providers)
        return lambda: session.run(None, inputs)

    return {name: run(file) for name, file in _FILES.items()}
