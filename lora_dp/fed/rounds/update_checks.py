"""Which updates are left out of a round: what a broken or hostile client may send must not reach the global model."""

import math
from collections.abc import Iterable, Mapping

import torch

from lora_dp.fed.rounds.messages import Task, Update


def fault(
    update: Update | None, task: Task, names: Iterable[str], largest_norm: float, noise_norm: float = 0.0
) -> str | None:
    """What is wrong with an update, in a few words; None if nothing is.

    Args:
        update: a client's answer.
        task: what it was asked.
        names: of the tensors that the turn trains.
        largest_norm: of the whole change, above which it is taken for an accident.
        noise_norm: root mean square norm of the noise that the update brings along, which may come on top; a
            hundred numbers exceed twice that with probability 1e-37.
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
    limit = largest_norm + 2 * noise_norm
    if math.sqrt(squares) > limit:
        return f"sent a change of norm {math.sqrt(squares):.3g}, above {limit:.4g}"
    return None
