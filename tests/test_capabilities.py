"""What is said of this machine: which ways of computing there are, and where each runs."""

import subprocess
import sys

import pytest
import torch

from lora_dp import backends
from lora_dp.capabilities import describe


def test_the_cpus_library_and_plain_torch_run_everywhere() -> None:
    runs = {(backend.name, backend.device) for backend in backends() if backend.runs}
    assert {("native C++", "cpu"), ("plain torch", "any")} <= runs


def test_where_no_gpu_is_visible_what_needs_one_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    absent = {backend.name: backend for backend in backends() if backend.device == "cuda"}
    assert set(absent) == {"native CUDA", "Triton"}
    assert all(not b.runs and b.detail.startswith("no GPU is visible to torch; ") for b in absent.values())


@pytest.mark.slow
def test_the_table_has_a_line_for_each_and_the_command_prints_it() -> None:
    lines = describe().splitlines()
    assert lines[0].startswith("lora-dp ") and len(lines) == 3 + len(backends())
    for line, backend in zip(lines[3:], backends(), strict=True):
        assert line.startswith(f"{backend.name}  ") and line.endswith(backend.detail)
    done = subprocess.run([sys.executable, "-m", "lora_dp"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[2] == lines[2], done.stderr
