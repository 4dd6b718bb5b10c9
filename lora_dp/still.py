"""A model without chance: for trials that compare batches of different shapes, in which equal masks are impossible."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Whatever draws fills in one value instead: dropout keeps everything, noise is at its mean, an order is kept.
_MEANS: dict[str, Callable[..., float]] = {
    "aten::bernoulli_": lambda tensor, p=0.5, **_: 1.0,
    "aten::uniform_": lambda tensor, low=0.0, high=1.0, **_: (low + high) / 2,
    "aten::normal_": lambda tensor, mean=0.0, std=1.0, **_: mean,
    "aten::exponential_": lambda tensor, rate=1.0, **_: 1 / rate,
    "aten::random_": lambda tensor, *_, **__: 0.0,
    "aten::cauchy_": lambda tensor, median=0.0, *_, **__: median,
    "aten::log_normal_": lambda tensor, mean=1.0, *_, **__: mean,
    "aten::geometric_": lambda tensor, p=0.5, **_: 1.0,
}
_FACTORIES = {"aten::rand": 0.5, "aten::rand_like": 0.5, "aten::randn": 0.0, "aten::randn_like": 0.0}
_DROPPED = ("dropout_p", "dropout")


class Still(TorchDispatchMode):
    """Inside this context torch draws nothing at random."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name == "aten::native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if name == "aten::bernoulli":
            return torch.ones_like(args[0])
        if name in _MEANS:
            return args[0].fill_(_MEANS[name](*args, **kwargs))
        if name in _FACTORIES:
            return _filled(func(*args, **kwargs), _FACTORIES[name])
        if name == "aten::randperm":
            return func(*args, **kwargs).sort().values
        args, kwargs = _without_dropout(func, args, kwargs)
        return func(*args, **kwargs)


def _filled(tensor: Tensor, value: float) -> Tensor:
    return tensor.fill_(value)


def _without_dropout(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    for place, argument in enumerate(func._schema.arguments):
        if argument.name in _DROPPED and str(argument.type) == "float":
            if place < len(args):
                args = (*args[:place], 0.0, *args[place + 1:])
            elif argument.name in kwargs:
                kwargs = {**kwargs, argument.name: 0.0}
    return args, kwargs
