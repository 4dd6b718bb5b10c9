"""The kernels' own runs: in Triton's interpreter (TRITON_INTERPRET=1, on a CPU), or compiled, on a GPU."""

import pytest
import torch

from lora_dp.kernels.launching import INTERPRETED

REASON = "kernels run on an NVIDIA GPU, or on a CPU with TRITON_INTERPRET=1"
# What compiles ahead of time needs neither.
ANYWHERE = "test_resources.py"


def pytest_make_collect_report(collector: pytest.Collector) -> pytest.CollectReport | None:
    """Skip whole files where no kernel runs: one line each in the summary, not one for every test."""
    if INTERPRETED or torch.cuda.is_available() or not isinstance(collector, pytest.Module):
        return None
    if collector.path.name == ANYWHERE:
        return None
    return pytest.CollectReport(collector.nodeid, "skipped", (str(collector.path), 0, f"Skipped: {REASON}"), [])


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
