"""One whole training step of every variant against PEFT's plain step, in turn and in one process."""

import statistics
import time
import warnings
from typing import Any

import pytest
import torch

from benchmarks.memory import peak_bytes
from benchmarks.models import SHAPES
from benchmarks.variants import VARIANTS, YARDSTICK, NotInstalled, Step


def _make(variant: str, shape: str) -> Step:
    try:
        step = VARIANTS[variant](SHAPES[shape])
    except NotInstalled as missing:
        pytest.skip(str(missing))
    # Opacus and PyTorch warn about hooks in every step.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            step()
    return step


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_step(variant: str, shape: str, rounds: int, benchmark: Any) -> None:
    plain, step = _make(YARDSTICK, shape), _make(variant, shape)
    yardstick: list[float] = []

    def plain_in_turn() -> None:
        start = time.perf_counter()
        plain()
        yardstick.append(time.perf_counter() - start)

    benchmark.group = shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        benchmark.pedantic(step, setup=plain_in_turn, rounds=rounds, warmup_rounds=1)
        peak, plain_peak = peak_bytes(step), peak_bytes(plain)
    times = benchmark.stats.stats.data
    ratio = statistics.median(mine / its for mine, its in zip(times, yardstick[-len(times):], strict=True))
    benchmark.extra_info.update(
        variant=variant, shape=str(SHAPES[shape]), ratio=ratio, plain_median_s=statistics.median(yardstick),
        peak_mb=peak / 1e6, peak_ratio=peak / plain_peak, threads=torch.get_num_threads())
    print(f"\n{shape}: {variant}: {ratio:.3f} × PEFT's plain step, {peak / plain_peak:.3f} × its peak memory")
