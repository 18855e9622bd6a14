"""The name of the machine, as files of figures hold it."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from fffconvert.machine import machine_name, processor_name

CPUINFO = "processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\n"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (CPUINFO * 2, "AMD EPYC (family 26, model 2)"),
        ("processor\t: 0\nFeatures\t: fp\n", "a processor"),  # as Arm has it
        (OSError(), "a processor"),
    ],
)
def test_a_processor_is_told_from_others_of_its_name(
    cpuinfo: str | OSError, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> str:
        if isinstance(cpuinfo, OSError):
            raise cpuinfo
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(platform, "processor", lambda: "a processor")
    used = torch.backends.cpu.get_cpu_capability()
    assert processor_name() == f"{expected}, {used}"
    n_threads = torch.get_num_threads()
    assert machine_name() == f"{expected}, {used}, {n_threads} threads, torch {torch.__version__}"
