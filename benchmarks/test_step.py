"""One whole training step of every variant against PEFT's plain step, in turn and in one process."""

import dataclasses
import functools
import gc
import statistics
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.memory import peak_bytes
from benchmarks.models import SHAPES, Shape
from benchmarks.variants import VARIANTS, YARDSTICK, NotInstalled, Step


def _make(variant: str, shape: Shape) -> Step:
    """A step that ends when the device has ended it, after two that warm up."""
    try:
        step = VARIANTS[variant](shape)
    except NotInstalled as missing:
        pytest.skip(str(missing))

    def ended() -> None:
        step()
        if shape.device == "cuda":
            torch.cuda.synchronize()

    # Opacus and PyTorch warn about hooks in every step.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            ended()
    return ended


_yardstick = functools.cache(functools.partial(_make, YARDSTICK))


@pytest.fixture(autouse=True)
def emptied() -> Iterator[None]:
    """No variant finds the memory of the one before it."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


def test_step(variant: str, shape: str, device: str, rounds: int, benchmark: Any) -> None:
    on_device = dataclasses.replace(SHAPES[shape], device=device)
    benchmark.group = shape
    benchmark.extra_info.update(
        variant=variant,
        shape=str(on_device),
        device=device,
        dtype=str(on_device.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )
    plain = _yardstick(on_device)
    try:
        step = _make(variant, on_device)
    except Exception as stopped:
        if not variant.startswith("Opacus"):
            raise
        # That a rival stops is a result: its row says so.
        benchmark.pedantic(lambda: None)
        benchmark.extra_info["stops"] = f"{type(stopped).__name__}: {str(stopped).partition(chr(10))[0]}"
        return
    yardstick: list[float] = []

    def plain_in_turn() -> None:
        start = time.perf_counter()
        plain()
        yardstick.append(time.perf_counter() - start)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        benchmark.pedantic(step, setup=plain_in_turn, rounds=rounds, warmup_rounds=1)
        peak, plain_peak = peak_bytes(step, device), peak_bytes(plain, device)
    times = benchmark.stats.stats.data
    ratio = statistics.median(mine / its for mine, its in zip(times, yardstick[-len(times) :], strict=True))
    benchmark.extra_info.update(ratio=ratio, plain_median_s=statistics.median(yardstick))
    # A graph holds its memory between the steps, where this does not see it.
    if not variant.endswith("graphed"):
        benchmark.extra_info.update(peak_mb=peak / 1e6, peak_ratio=peak / plain_peak)
    print(f"\n{shape}: {variant}: {ratio:.3f} × PEFT's plain step, {peak / plain_peak:.3f} × its peak memory")
