"""Device time of a call, by CUDA events around many calls on several sets of inputs."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.kernel_cases import Case

# What one measurement moves at least: a third of a millisecond on an H100, so that events and gaps are one per cent.
_ENOUGH_BYTES = 1 << 30
_MOST_CALLS = 256
_ROUNDS_SECONDS = 0.25
# A copy of so much takes no device less time than that.
_BUSY_BYTES, _BUSY_SECONDS = 1 << 28, 5e-5
# The driver's queue of launches is bounded as well.
_MOST_BUSY = 128


def input_sets(case: Case, device: torch.device) -> list[tuple[Any, ...]]:
    """Fresh random inputs, as many sets as fill the L2 cache twice, so that none is found there again."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return [case.inputs(device) for _ in range(min(2 + 2 * cache // case.bytes_moved, _MOST_CALLS))]


def calls_on(way: Callable[..., Any], case: Case, sets: Sequence[tuple[Any, ...]], **options: Any) -> list[Any]:
    """Calls of ``way`` on each set in turn; of those that a graph can hold, as many as move enough."""
    count = max(len(sets), min(_ENOUGH_BYTES // case.bytes_moved, _MOST_CALLS)) if case.graphed else len(sets)
    return [functools.partial(way, *sets[i % len(sets)], **options) for i in range(count)]


class DeviceTimer:
    """Measures seconds per call over and over, without what a launch costs on the host.

    With ``graphed`` the calls are captured in a CUDA graph. Without, the device is kept busy until the host has
    launched them all: their time is then the device's alone only if nothing in them makes the host wait.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]], graphed: bool):
        self._calls, self._graph = calls, torch.cuda.CUDAGraph() if graphed else None
        for call in calls[:2]:  # compiles, sets libraries up
            call()
        torch.cuda.synchronize()
        if self._graph is not None:
            with torch.cuda.graph(self._graph):
                # Kept, so that every call writes memory of its own, which no earlier one left in the cache.
                self._outputs = [call() for call in calls]
            self._busy = 1
        else:
            begin = time.perf_counter()
            self._launch()
            self._busy = min(1 + int((time.perf_counter() - begin) / _BUSY_SECONDS), _MOST_BUSY)
            torch.cuda.synchronize()
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def _launch(self) -> None:
        for call in self._calls:
            call()

    def __call__(self) -> float:
        # The device is still copying when the host has queued the rest: no wait for the host is in the time.
        _busy_work(self._busy)
        self._start.record()
        if self._graph is None:
            self._launch()
        else:
            self._graph.replay()
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1e3 / len(self._calls)

    def rounds(self, most: int) -> int:
        """How many measurements to take: what a quarter of a second holds, from 3 to ``most``."""
        return max(3, min(most, int(_ROUNDS_SECONDS / (self() * len(self._calls)))))


@functools.cache
def _buffers(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randint(256, (size,), dtype=torch.uint8, device="cuda") for _ in range(2))  # type: ignore


def _busy_work(copies: int) -> None:
    source, target = _buffers(_BUSY_BYTES)
    for _ in range(copies):
        target.copy_(source)


def copy_bandwidth(size: int = 1 << 30, rounds: int = 20) -> float:
    """Bytes a second, read and written both counted, of a large copy on the device: what traffic can reach here."""
    source, target = (torch.randint(256, (size,), dtype=torch.uint8, device="cuda") for _ in range(2))
    seconds = []
    for _ in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return 2 * size / statistics.median(seconds[2:])


def eager_seconds(calls: Sequence[Callable[[], Any]]) -> float:
    """Wall-clock seconds per call, launched one after the other: the host's share, where that is the larger."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls:
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(calls)


_now = 0.0


def device_clock() -> float:
    """A clock for pytest-benchmark that goes on by what :func:`spend` measured, and stands still between."""
    return _now


def spend(timer: Callable[[], float]) -> None:
    """Measure once, and let :func:`device_clock` go on by it."""
    global _now
    _now += timer()
