"""Which updates are left out of a round: what a broken or hostile client may send must not reach the global model."""

import math
from collections.abc import Iterable, Mapping

import torch

from lora_dp.fed.exchange import Task, Update


class TooFewClients(RuntimeError):
    """So many clients of a round failed that it cannot be combined."""


def fault(update: Update | None, task: Task, names: Iterable[str], largest_norm: float) -> str | None:
    """What is wrong with an update, in a few words; None if nothing is.

    Args:
        update: a client's answer.
        task: what it was asked.
        names: of the tensors that the turn trains.
        largest_norm: of the whole change, above which it is taken for an accident.
    """
    if not isinstance(update, Update) or not isinstance(update.tensors, Mapping):
        return "sent nothing"
    expected, tensors = set(names), update.tensors
    if set(tensors) != expected:
        odd = sorted(map(str, set(tensors) ^ expected))
        return f"sent other tensors than were asked for: {', '.join(odd[:3])}"
    squares = 0.0
    for name, tensor in tensors.items():
        start = task.state[name]
        if not isinstance(tensor, torch.Tensor) or tensor.shape != start.shape:
            return f"sent {name} with shape {tuple(getattr(tensor, 'shape', ()))} for {tuple(start.shape)}"
        if tensor.dtype != start.dtype:
            return f"sent {name} as {tensor.dtype}"
        squares += float((tensor.double() - start.double()).square().sum())
    if not math.isfinite(squares):
        return "sent values that are not finite"
    if math.sqrt(squares) > largest_norm:
        return f"sent a change of norm {math.sqrt(squares):.3g}, above {largest_norm:g}"
    return None
