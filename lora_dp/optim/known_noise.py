"""How an optimizer is told the noise in its gradients: by its ``set_noise_std``, which whoever adds noise calls."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

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


class ToldOptimizer(torch.optim.Optimizer):
    """What optimizers that use the noise have in common: they are told it, or have ``noise_std`` in each group.

    A subclass says what becomes of one parameter (:meth:`update`).
    """

    def __init__(self, params: Any, defaults: dict[str, Any]):
        self._told: dict[Tensor, NoiseStd] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._told = {}  # what was told is of the steps of one optimizer, and no copy's

    @abstractmethod
    def update(self, parameter: Tensor, group: dict[str, Any], std: NoiseStd) -> None:
        """One parameter's step on its ``.grad``, whose noise has this deviation."""

    def set_noise_std(self, stds: Mapping[Tensor, NoiseStd]) -> None:
        """Told by the private optimizer: the deviation of the noise of the next step, by parameter.

        Raises:
            ValueError: a group has a ``noise_std`` of its own.

        >>> from lora_dp.optim.adam_bc import AdamBC
        >>> weight = torch.nn.Parameter(torch.zeros(3))
        >>> AdamBC([weight], noise_std=0.5).set_noise_std({weight: 0.4})
        Traceback (most recent call last):
        ValueError: AdamBC is told its noise by the private optimizer: leave out noise_std, here 0.5.
        """
        for group in self.param_groups:
            if group["noise_std"] is not None:
                raise ValueError(
                    f"{type(self).__name__} is told its noise by the private optimizer: leave out noise_std, here "
                    f"{group['noise_std']}."
                )
        self._told = dict(stds)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on what ``.grad`` holds.

        Args:
            closure: runs forward and backward once, as torch's; its value is returned.

        Raises:
            RuntimeError: the noise of a parameter is not known, or its gradient is sparse.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        due = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        stds = [self._std(p, group) for p, group in due]  # refuses before anything has moved
        for (parameter, group), std in zip(due, stds, strict=True):
            self.update(parameter, group, std)
        return value

    def _std(self, parameter: Tensor, group: dict[str, Any]) -> NoiseStd:
        assert parameter.grad is not None
        if parameter.grad.is_sparse:
            raise RuntimeError(f"{type(self).__name__} takes no sparse gradients: set sparse=False.")
        std = self._told.get(parameter, group["noise_std"])
        if std is None:
            raise RuntimeError(
                f"{type(self).__name__} does not know the noise in the gradient of a parameter of shape "
                f"{tuple(parameter.shape)}: give noise_std (0 for none), or let make_private wrap this optimizer."
            )
        return std
