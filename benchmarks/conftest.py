"""Which shapes the timings take, where, and how many rounds."""

import importlib.metadata
from typing import Any

import pytest
import torch

from benchmarks.models import CPU_SHAPES, DEFAULT_SHAPES, GPU_SHAPES, SHAPES
from benchmarks.variants import CUDA_ONLY, VARIANTS

PACKAGES = ("torch", "triton", "transformers", "timm", "peft", "opacus")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lora-dp benchmarks")
    group.addoption(
        "--device",
        choices=list(DEFAULT_SHAPES),
        default="cpu",
        help="cpu (default), in float32, or cuda, in bfloat16 and at the shapes of whole models",
    )
    group.addoption(
        "--shape",
        action="append",
        choices=[*SHAPES, "all"],
        help=f"shape to time, repeatable (default: {', '.join(DEFAULT_SHAPES['cpu'])}; on cuda, all of its own)",
    )
    group.addoption("--rounds", type=int, default=10, help="timed rounds of each variant (default: 10)")
    group.addoption("--threads", type=int, default=1, help="torch's threads (default: 1, which repeats best)")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = metafunc.config.getoption("--device")
    if "shape" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--shape") or DEFAULT_SHAPES[device]
        every = list(CPU_SHAPES if device == "cpu" else GPU_SHAPES)
        metafunc.parametrize("shape", every if "all" in chosen else chosen)
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", [name for name in VARIANTS if device == "cuda" or name not in CUDA_ONLY])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Compiling takes longer than all else: where time runs out, it runs out there. A capture that fails can leave the
    # process unfit for others.
    items.sort(key=lambda item: ("compiled" in item.name, "graphed" in item.name))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What the figures are of: versions, and the GPU."""
    machine_info["packages"] = {name: version for name in PACKAGES if (version := _version(name))}
    if torch.cuda.is_available():
        machine_info["gpu"] = {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    """How many timed rounds each variant gets."""
    return int(request.config.getoption("--rounds"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where whole steps are timed."""
    return str(request.config.getoption("--device"))
