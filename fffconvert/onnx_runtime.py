"""The dense and the converted model in ONNX Runtime, to time: the usual way to a faster BERT on a CPU."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from fffconvert.display import track
from fffconvert.errors import first_line
from fffconvert.export import export_onnx, quiet_logging

DENSE, DENSE_INT8, CONVERTED = NAMES = ("ONNX Runtime", "ONNX Runtime int8", "converted ONNX Runtime")
UNMASKED = "fffconvert-unmasked"
CLOSE = 1e-3  # of outputs, which are of order 1
_NEEDED = ("onnx", "onnxruntime", "onnxscript")


def missing() -> str | None:
    """Why ONNX Runtime cannot be used here; nothing where it can."""
    lacking = [name for name in _NEEDED if find_spec(name) is None]
    return f"{', '.join(lacking)} not installed; pip install 'fffconvert[onnx]'" if lacking else None


def prepare(
    dense: PreTrainedModel, converted: PreTrainedModel, ids: Tensor, folder: Path
) -> tuple[list[str], dict[str, str]]:
    """Writes both models for any batch and length to `folder`, the dense one in dynamic int8 as well.

    Args:
        dense: The dense model.
        converted: The converted one.
        ids: Token ids `(batch, length)` to try each graph on: it must give what PyTorch gives.
        folder: An empty folder.

    Returns:
        Those of `NAMES` that are there, and of the others each with the reason.
    """
    if reason := missing():
        return [], dict.fromkeys(NAMES, reason)
    absent: dict[str, str] = {}
    steps: dict[str, tuple[Callable[[Path], None], PreTrainedModel | None]] = {
        DENSE: (lambda file: write_optimized(dense, file), dense),
        DENSE_INT8: (lambda file: write_int8(_file(folder, DENSE), file), None),
        CONVERTED: (lambda file: write_optimized(converted, file), converted),
    }
    for name, (write, expected) in track([*steps.items()], "Preparing ONNX Runtime"):
        if name == DENSE_INT8 and DENSE in absent:
            absent[name] = absent[DENSE]
            continue
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), quiet_logging():
                warnings.simplefilter("ignore")
                write(_file(folder, name))
            (given, *_) = runner(folder, name, ids, 1)()  # int8 is run too: it may fail only then
            if expected is not None:
                check(given, expected, ids)
        except Exception as error:  # noqa: BLE001 - exporter and optimizer raise whatever they stumble over
            absent[name] = f"not exported: {type(error).__name__} {first_line(error)}"
    return [name for name in NAMES if name not in absent], absent


def write_optimized(model: PreTrainedModel, file: Path) -> None:
    """Writes a model as `export_onnx` does, then lets ONNX Runtime's optimizer for transformers fuse what it knows."""
    from onnxruntime.transformers.optimizer import optimize_model

    if model.dtype != torch.float32:
        raise ValueError(f"graphs are float32, this model is {model.dtype}")
    plain = file.with_suffix(".plain.onnx")
    with recognized_attention(model):
        export_onnx(model, plain, inputs=("input_ids",))
    heads, width = model.config.num_attention_heads, model.config.hidden_size
    optimized = optimize_model(str(plain), model_type="bert", num_heads=heads, hidden_size=width)
    optimized.save_model_to_file(str(file))


def unmasked_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """Attention spelt as ONNX Runtime's optimizer knows it, all `(n_texts, n_heads, n_tokens, d_head)`.

    Masks are left out: it knows none that `transformers` makes, and no text that is timed is padded.
    """
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def recognized_attention(model: PreTrainedModel) -> Iterator[None]:
    """Lets a model attend by `unmasked_attention` for a while, where it takes other attention than its own."""
    config, before = model.config, model.config._attn_implementation
    windowed = any(getattr(config, name, None) for name in ("sliding_window", "local_attention"))
    shared = getattr(config, "num_key_value_heads", None) not in (None, config.num_attention_heads)
    if not windowed and not shared:
        AttentionInterface.register(UNMASKED, unmasked_attention)
        AttentionMaskInterface.register(UNMASKED, lambda *_args, **_kwargs: None)
        model.set_attn_implementation(UNMASKED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def write_int8(file: Path, output: Path) -> None:
    """Writes the graph in `file` with its weights in int8, a scale for each channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(file, output, weight_type=QuantType.QInt8, per_channel=True)


def check(given: Any, model: PreTrainedModel, ids: Tensor) -> None:
    """Raises a `ValueError` where a graph gives other numbers than its model: the optimizer mistook it for a BERT's."""
    with torch.no_grad():
        expected = model(input_ids=ids)[0].numpy()
    if not np.allclose(given, expected, atol=CLOSE):
        raise ValueError("ONNX Runtime's optimized graph gives other numbers than PyTorch")


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(' ', '-')}.onnx"


def runner(folder: Path, name: str, ids: Tensor, threads: int) -> Callable[[], Any]:
    """A call that runs one of the graphs of `prepare` on `ids` `(batch, length)`, with so many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; what its optimizer left over is no news to who asked for a time
    options.add_session_config_entry("session.force_spinning_stop", "1")  # after a run; others are timed then
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(_file(folder, name), options, providers=providers)
    inputs = {"input_ids": ids.numpy()}
    return lambda: session.run(None, inputs)
