"""Peak memory of a process during inference: dense, converted and converted int8, each in a fresh process.

    python -m benchmarks.memory DENSE CONVERTED [--size 8x128]

DENSE and CONVERTED are folders of saved models; the int8 row is CONVERTED with its projections in int8. The
peak is what the operating system counts, the libraries included; `import` is the process that has only
imported them.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

PASSES = 5


def peak(model: str, batch: int, length: int) -> float:
    """Loads a model, runs it, and says how much memory this process has had at most, in MiB."""
    import torch

    from fffconvert.checkpoint import load
    from fffconvert.families import random_ids

    if model:
        loaded = load(model).model.eval()
        with torch.inference_mode():
            for _ in range(PASSES):
                loaded(input_ids=random_ids(loaded, batch, length))
    return peak_of_this_process()


def peak_of_this_process() -> float:
    """In MiB. Linux's `ru_maxrss` will not do: a process inherits that of the one which started it."""
    with suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts in bytes


def in_fresh_process(model: str, size: str) -> float:
    """`peak` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", model, "--size", size]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="DENSE CONVERTED")
    parser.add_argument("--size", default="8x128", help="batch and length")
    parser.add_argument("--one", metavar="MODEL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        batch, length = map(int, arguments.size.split("x"))
        print(peak(arguments.one, batch, length))
        return
    if len(arguments.models) != 2:
        parser.error("expected two folders: DENSE CONVERTED")
    dense, converted = arguments.models
    from fffconvert.checkpoint import load, save
    from fffconvert.display import table
    from fffconvert.quantization import quantize

    with tempfile.TemporaryDirectory() as folder:
        loaded = load(converted)
        int8 = str(Path(folder) / "int8")
        save(replace(loaded, model=quantize(loaded.model)), Path(int8))
        named = {"import": "", "dense": dense, "converted": converted, "converted int8": int8}
        rows = [(name, in_fresh_process(model, arguments.size)) for name, model in named.items()]
    table(f"Peak memory in MiB, {arguments.size} tokens", ["model", "MiB"], rows)


if __name__ == "__main__":
    main()
