"""How an optimizer is told the noise in its gradients: by its ``set_noise_std``, which whoever adds noise calls."""

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

# Of one parameter: a number, or a tensor that broadcasts to its shape.
NoiseStd = float | Tensor


@runtime_checkable
class NoiseAware(Protocol):
    """An optimizer that uses the standard deviation of the noise.

    :class:`lora_dp.PrivateOptimizer` calls ``set_noise_std`` before each step of an optimizer that has it, and once
    with an empty mapping, when it is made: that is the moment to refuse.
    """

    set_noise_std: Callable[[Mapping[Tensor, NoiseStd]], None]
    """Takes, by parameter, the noise's deviation in the gradient that the next step finds in ``.grad``: independent
    between entries, Gaussian and of mean zero; between steps too, but behind :class:`lora_dp.DiSK`. Parameters that it
    leaves out have no gradient."""


def noise_aware(optimizer: torch.optim.Optimizer) -> NoiseAware | None:
    """The optimizer, if it is to be told the noise.

    >>> noise_aware(torch.optim.SGD([torch.zeros(1)])) is None
    True
    """
    return optimizer if isinstance(optimizer, NoiseAware) and optimizer.set_noise_std is not None else None
