"""Peak memory of one call, by torch's own account of what it allocates and frees."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(step: Callable[[], None]) -> int:
    """The most CPU bytes that tensors held at once during ``step``, above what they held when it began.

    It is exact and the same in every run: torch's profiler sees each allocation and release. Scratch memory that a
    math library allocates by itself is not in it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    results = recorded.profiler.kineto_results  # type: ignore[union-attr]
    changes = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
