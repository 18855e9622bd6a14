"""The CPU kernel: `cpu.cpp`, built on first use, as operators that autograd and `torch.compile` know.

Built against PyTorch's stable C++ interface and a few small headers of ATen and c10, which compile in seconds, with
whatever C++ compiler the machine has, for the very processor it runs on. The library is kept in the user's
cache under a name that says what it was built from, so a new PyTorch, another processor or an edited source
never meet an old build; for another compiler, delete it. Builders write beside it and rename: several processes
may start at once, and one that is killed leaves nothing that another would wait for.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fffconvert.kernels.reference import FFFWeights

SOURCE = Path(__file__).with_name("cpu.cpp")
DTYPES = (torch.float32, torch.bfloat16)

# The numbers that `with_activation` in cpu.cpp gives to functions; several names may mean one function.
_NUMBERS = {"gelu": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1, "relu": 2, "silu": 3, "tanh": 4, "identity": 5}


_lock = threading.Lock()
_loaded = False
_infer: Callable[..., bool] | None = None


class Unavailable(Exception):
    """Raised where the kernel cannot serve; the message says why in one line."""


# ---- Building


def cache_dir() -> Path:
    """Where built libraries are kept: `XDG_CACHE_HOME`, else `~/.cache`, and in it `fffconvert`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fffconvert"


def _flags() -> list[str]:
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    fast = [
        native,
        "-O3",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-fno-trapping-math",
    ]  # each keeps the meaning of NaN
    shared = ["-shared", "-fPIC"]
    if platform.system() == "Darwin":
        shared += ["-undefined", "dynamic_lookup"]
    return ["-std=c++20", *fast, *shared]


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def library_path() -> Path:
    """The library's place in the cache; its name depends on source, flags, PyTorch and processor."""
    parts = [SOURCE.read_text(), " ".join(_flags()), torch.__version__, _processor()]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return cache_dir() / f"cpu-{digest}.so"


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise Unavailable("no C++ compiler was found (looked for $CXX, c++, g++, clang++)")


def _compile(target: Path) -> None:
    """Compiles beside `target` and renames, so that nobody ever sees half a library."""
    root = Path(torch.__file__).parent
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="building-") as folder:
        built = Path(folder) / target.name
        command = [_compiler(), *_flags(), f"-I{root / 'include'}", str(SOURCE), "-o", str(built), *libraries]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr.strip()]
            raise Unavailable(f"{command[0]} could not compile {SOURCE.name}: {errors[0]}")
        built.replace(target)


def load() -> None:
    """Loads the operators `fffconvert::fff`, `fff_train` and `fff_backward`, building them if need be.

    Raises:
        Unavailable: Where they can be neither built nor loaded.
    """
    global _infer, _loaded
    with _lock:
        if _loaded:
            return
        try:
            library = library_path()
            if not library.exists():
                _compile(library)
            torch.ops.load_library(library)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            raise Unavailable(f"{type(error).__name__}: {error}".splitlines()[0]) from error
        _register()
        _infer = _short_way(library)
        _loaded = True


def _short_way(library: Path) -> Callable[..., bool] | None:
    """`fffconvert_infer` of the library, where PyTorch lets C see its tensors."""
    exported = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if exported is None:
        return None
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.argtypes, pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    api = ctypes.c_void_p(pointer(exported, b"dlpack_exchange_api"))
    infer = ctypes.PyDLL(str(library)).fffconvert_infer
    tensor = ctypes.py_object
    infer.argtypes, infer.restype = [ctypes.c_void_p, tensor, tensor, ctypes.c_int64, tensor], ctypes.c_bool
    return partial(infer, api)


# ---- What autograd and torch.compile must know


def _fake_fff(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_train(x: Tensor, weights: list[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    w = FFFWeights(*weights)
    trees, _leaves, rows, _d_model = w.leaf_in_weight.shape
    trunk = w.trunk_in_weight.shape[0]
    # pre-activations of a token, those of gates too
    kept = trees * (rows + (w.depth if w.emitting else 0)) + trunk
    n_tokens = math.prod(x.shape[:-1])
    paths = x.new_empty((trees + (1 if trunk else 0), 2, n_tokens), dtype=torch.int32)
    return x.new_empty(x.shape), paths, x.new_empty(n_tokens * kept, dtype=torch.float32)


def _differentiable(weights: Sequence[Tensor]) -> list[bool]:
    """Which weights the output depends on smoothly: not the routers, unless their nodes emit."""
    w = FFFWeights(*weights)
    return [w.emitting] * 3 + [True] * 4 + [w.trunk_in_weight.shape[0] > 0] * 3


def _fake_backward(_: Tensor, x: Tensor, weights: list[Tensor], *rest: Any) -> list[Tensor]:
    need_weights = rest[-1]
    kept = _differentiable(weights) if need_weights else [False] * len(weights)
    shapes = [w.shape if keep else (0,) for w, keep in zip(weights, kept, strict=True)]
    return [x.new_empty(x.shape), *(w.new_empty(shape) for w, shape in zip(weights, shapes, strict=True))]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weights, ctx.activation = inputs
    _, paths, pre = output
    ctx.save_for_backward(x, *weights, paths, pre)
    ctx.need_weights = any(w.requires_grad for w in weights)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x, *weights, paths, pre = ctx.saved_tensors
    if grad is None:
        return None, [None] * len(weights), None
    backward = torch.ops.fffconvert.fff_backward.default
    grad_x, *grads = backward(grad, x, weights, paths, pre, ctx.activation, ctx.need_weights)
    kept = _differentiable(weights) if ctx.need_weights else [False] * len(weights)
    return grad_x, [g if keep else None for g, keep in zip(grads, kept, strict=True)], None


def _backward_twice(*_: Any) -> None:
    raise RuntimeError("the CPU kernel has no second derivative; FFFCONVERT_KERNEL=reference has")


def _register() -> None:
    torch.library.register_fake("fffconvert::fff", _fake_fff)
    torch.library.register_fake("fffconvert::fff_train", _fake_train)
    torch.library.register_fake("fffconvert::fff_backward", _fake_backward)
    torch.library.register_autograd("fffconvert::fff_train", _backward, setup_context=_setup)
    torch.library.register_autograd("fffconvert::fff_backward", _backward_twice)


# ---- Use


def infer(x: Tensor, weights: FFFWeights, activation: str) -> Tensor | None:
    """`fff_forward` without gradients and without the dispatcher, whose call costs more than a token does.

    None where the dispatcher is needed, or the kernel has to be asked in another way: inputs in a dtype it does not
    take, memory that is not contiguous or not a CPU's, tracing, transformations, modes, wrong shapes.
    """
    if _infer is None or x.is_neg():  # memory that holds -x
        return None
    y = torch.empty_like(x)
    return y if _infer(x, weights, _NUMBERS[activation], y) else None


def fff_forward(x: Tensor, weights: FFFWeights, activation: str) -> Tensor:
    """`reference.fff_forward` by the kernel; float32 and bfloat16 on a CPU, or bfloat16 weights for float32 inputs."""
    tensors, number = list(weights), _NUMBERS[activation]
    if torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in tensors)):
        y: Tensor = torch.ops.fffconvert.fff_train.default(x, tensors, number)[0]
        return y
    result: Tensor = torch.ops.fffconvert.fff.default(x, tensors, number)
    return result
