"""Every kernel against torch at the shapes where it matters: device time, and bandwidth beside that of a copy."""

from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("the kernels run on an NVIDIA GPU, and there is none", allow_module_level=True)
pytest.importorskip("triton")

from benchmarks.kernel_cases import (  # noqa: E402
    ADAPTERS,
    DTYPES,
    Case,
    native_case,
    noise_case,
    products,
    single_kernels,
    whole_update_case,
)
from benchmarks.timing import DeviceTimer, calls_on, copy_bandwidth, device_clock, eager_seconds, input_sets, spend  # noqa: E402
from lora_dp.ops.native import native  # noqa: E402

NATIVE = [native_case(ADAPTERS, dtype) for dtype in DTYPES] if native.cuda else []
UPDATES = [*NATIVE, *(noise_case(ADAPTERS, dtype) for dtype in DTYPES)]
CASES = [*(whole_update_case(ADAPTERS, update) for update in UPDATES), *NATIVE, *single_kernels(), *products()]


@pytest.fixture(scope="session")
def copied() -> float:
    """Bytes a second that a copy reaches in this run."""
    return copy_bandwidth()


@pytest.mark.benchmark(timer=device_clock)
@pytest.mark.parametrize(
    "case, way", [pytest.param(case, way, id=f"{case}, {way}") for case in CASES for way in case.ways]
)
def test_kernel(case: Case, way: str, rounds: int, copied: float, benchmark: Any) -> None:
    torch.manual_seed(0)
    calls = calls_on(case.ways[way], case, input_sets(case, torch.device("cuda")))
    timer = DeviceTimer(calls, case.graphed)
    benchmark.group = case.kernel
    benchmark.pedantic(spend, args=(timer,), rounds=timer.rounds(rounds), warmup_rounds=1)
    bandwidth = case.bytes_moved / benchmark.stats.stats.median
    benchmark.extra_info.update(
        kernel=case.kernel,
        size=case.size,
        dims=case.dims,
        dtype=str(case.dtype).removeprefix("torch."),
        way=way,
        bytes_moved=case.bytes_moved,
        bandwidth=bandwidth,
        copy_bandwidth=copied,
        ratio=bandwidth / copied,
        graphed=case.graphed,
        eager_s=eager_seconds(calls),
        sets=len({id(call.args[0]) for call in calls}),
    )
