"""Which shapes and how many rounds the timings take."""

import pytest
import torch

from benchmarks.models import DEFAULT_SHAPES, SHAPES


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lora-dp benchmarks")
    group.addoption(
        "--shape", action="append", choices=[*SHAPES, "all"],
        help=f"shape to time, repeatable (default: {', '.join(DEFAULT_SHAPES)})")
    group.addoption("--rounds", type=int, default=10, help="timed rounds of each variant (default: 10)")
    group.addoption("--threads", type=int, default=1, help="torch's threads (default: 1, which repeats best)")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--shape") or DEFAULT_SHAPES
        metafunc.parametrize("shape", list(SHAPES) if "all" in chosen else chosen)


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    """How many timed rounds each variant gets."""
    return int(request.config.getoption("--rounds"))
