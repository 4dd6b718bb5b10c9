"""Peak memory of one call: of all that tensors hold at once, above what they held when it began."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(step: Callable[[], None], device: str) -> int:
    """The peak of ``step`` on the device, "cpu" or "cuda".

    It repeats exactly on a CPU, where torch's profiler sees each allocation and release. Scratch memory that a library
    allocates by itself is not in it.
    """
    if device == "cpu":
        return _peak_on_cpu(step)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - held)


def _peak_on_cpu(step: Callable[[], None]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    results = recorded.profiler.kineto_results
    changes = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
