"""Processes of their own, which can be killed, interrupted or given limits.

They are forked from a server that has imported everything once, so that each starts at once.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "fffconvert.pipeline", "fffconvert.hub", "fffconvert.inspection"])
in_processes = pytest.mark.xdist_group("processes")  # whose server takes seconds to start: one for them all


def start(function: Callable[..., object], *arguments: Any) -> BaseProcess:
    """Calls a function in a new process."""
    process = SERVER.Process(target=_call, args=(function, arguments), daemon=True)
    process.start()
    return process


def _call(function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    torch.set_num_threads(1)
    function(*arguments)


def start_command(arguments: list[str], stderr: Path, file_size_limit: int | None = None) -> BaseProcess:
    """Starts `fffconvert` with `arguments`; what it says on stderr goes to a file.

    Args:
        arguments: As on the command line.
        stderr: Where stderr goes.
        file_size_limit: Bytes after which writing a file fails, as on a full disk.
    """
    return start(_command, arguments, stderr, file_size_limit)


def _command(arguments: list[str], stderr: Path, file_size_limit: int | None) -> None:
    with stderr.open("wb") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    if file_size_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))
    from fffconvert import display
    from fffconvert.cli import main

    display.SECONDS_PER_LINE = 0.0  # else it is long silent, and whoever waits for a line waits with it
    main(arguments)


def wait_until(condition: Callable[[], bool], process: BaseProcess, seconds: float = 120) -> None:
    """Waits until something is so; fails if the process ends first."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive(), f"the process ended with {process.exitcode}"
        assert time.monotonic() < end, f"nothing came in {seconds} seconds"
        time.sleep(0.01)


def finish(process: BaseProcess, seconds: float = 120) -> int:
    """Waits for a process and gives its exit status; one that takes too long is killed."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
    assert process.exitcode is not None, f"the process was still running after {seconds} seconds"
    return process.exitcode
