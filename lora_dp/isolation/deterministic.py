"""A model without chance: for trials that compare batches of different shapes, in which equal masks are impossible."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Given = Mapping[str, Any]


def _most_likely(given: Given) -> Tensor:
    """Of each row the categories in order of their weights; with replacement, the first of them again and again."""
    weights, number = given["self"], given["num_samples"]
    order: Tensor = weights.sort(dim=-1, descending=True, stable=True).indices
    if given["replacement"]:
        return order[..., :1].expand(*order.shape[:-1], number)
    return order[..., :number]


def _off_centre(drawn: Tensor, centre: Any, offset: Any) -> Tensor:
    """Noise of half a deviation, up and down by turns of features, so that its size is seen behind a LayerNorm too."""
    turns = torch.ones(drawn.shape[-1:], device=drawn.device)
    if drawn.dim() > 2:
        turns[1::2] = -1
    return centre + offset * turns


# What stands for noise: NEFTune's size follows the width of the batch, which must not go unnoticed.
_NOISE: dict[str, Callable[[Given], tuple[Any, Any]]] = {
    "aten::uniform": lambda given: ((given["from"] + given["to"]) / 2, (given["to"] - given["from"]) / 4),
    "aten::normal": lambda given: (given["mean"], given["std"] / 2),
    "aten::cauchy": lambda given: (given["median"], given["sigma"] / 2),
    "aten::rand": lambda given: (0.5, 0.25),
    "aten::rand_like": lambda given: (0.5, 0.25),
    "aten::randn": lambda given: (0.0, 0.5),
    "aten::randn_like": lambda given: (0.0, 0.5),
    "prims::normal": lambda given: (given["mean"], given["std"] / 2),
    "prims::uniform": lambda given: ((given["low"] + given["high"]) / 2, (given["high"] - given["low"]) / 4),
}
# What stands for any other draw, of each row by itself: dropout keeps everything, an order is kept. Also in place.
_VALUES: dict[str, Callable[[Given], Tensor | float]] = {
    "aten::bernoulli": lambda given: 1.0,
    "aten::exponential": lambda given: 1 / given["lambd"],
    "aten::random": lambda given: given.get("from", 0),
    "aten::log_normal": lambda given: math.exp(given["mean"] + 0.5 * given["std"]),
    "aten::geometric": lambda given: 1.0,
    "aten::poisson": lambda given: given["self"].round(),
    "aten::binomial": lambda given: (given["count"] * given["prob"]).round(),
    "aten::_standard_gamma": lambda given: given["self"],
    "aten::_sample_dirichlet": lambda given: given["self"] / given["self"].sum(-1, keepdim=True),
    "aten::multinomial": _most_likely,
    "aten::rand": lambda given: 0.5,
    "aten::rand_like": lambda given: 0.5,
    "aten::randint": lambda given: given.get("low", 0),
    "aten::randint_like": lambda given: given.get("low", 0),
    "aten::randperm": lambda given: torch.arange(given["n"]),
}
_DROPPED = ("dropout_p", "dropout")
# Marked as drawing, and draw nothing: a number that names a kernel, a softmax.
_SURE = ("aten::_fused_sdp_choice", "aten::_nested_tensor_softmax_with_shape")


class Still(TorchDispatchMode):
    """Inside this context torch draws nothing at random.

    Raises:
        RuntimeError: on an op that draws and is not known here.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _draws(func):
            return func(*args, **kwargs)
        name, given = func._schema.name, _given(func, args, kwargs)
        kind = name.removesuffix("_").removesuffix("_functional")
        if kind in _NOISE or kind in _VALUES:
            # Drawn all the same, for what it is like; not from a generator of the model's own, which nobody puts back.
            drawn = _with(func, args, kwargs, ("generator",), None)
            # A few uniform numbers decide more often than they are noise: these are in the middle.
            noise = kind in _NOISE and (drawn.dim() > 2 or kind not in _VALUES)
            value = _off_centre(drawn, *_NOISE[kind](given)) if noise else _VALUES[kind](given)
            return drawn.copy_(value) if isinstance(value, Tensor) else drawn.fill_(value)
        if name in ("aten::native_dropout", "aten::_fused_dropout"):
            return _kept(func, given)
        if name.startswith("aten::rrelu_with_noise"):
            return _rectified(func, given)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        if name in _SURE or any(dropped in given for dropped in _DROPPED):
            return _with(func, args, kwargs, _DROPPED, 0.0)
        raise RuntimeError(
            f"The model draws at random by {name}, which lora_dp does not know how to do without: draw by another "
            "function, torch.rand for example."
        )


def _draws(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags or any(
        argument.name == "generator" for argument in func._schema.arguments
    )


def _given(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name, those left out at their defaults."""
    names = [argument.name for argument in func._schema.arguments]
    defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
    return defaults | dict(zip(names, args, strict=False)) | kwargs


def _with(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str], value: Any) -> Any:
    """What an op returns with this value for the arguments of these names."""
    changed, places = list(args), {argument.name: place for place, argument in enumerate(func._schema.arguments)}
    for name in names:
        if name in kwargs:
            kwargs = {**kwargs, name: value}
        elif places.get(name, len(args)) < len(args):
            changed[places[name]] = value
    return func(*changed, **kwargs)


def _kept(func: Any, given: Given) -> Any:
    """Dropout that keeps everything, with its mask."""
    x = given["input"] if "input" in given else given["self"]
    mask = torch.ones_like(x, dtype=torch.bool if "input" in given else torch.uint8)
    outs = [given[name] for name in ("out0", "out1") if name in given]
    if not outs:
        return x.clone(), mask
    return tuple(out.resize_(value.shape).copy_(value) for out, value in zip(outs, (x, mask), strict=True))


def _rectified(func: Any, given: Given) -> Any:
    """A leaky rectifier of the middle slope, which its backward reads from ``noise``."""
    x, noise, training = given["self"], given["noise"], given["training"]
    slope = (given["lower"] + given["upper"]) / 2
    slopes = torch.where(x > 0, 1.0, slope).to(x.dtype)
    result = x * slopes
    if func._schema.name == "aten::rrelu_with_noise_functional":
        return result, slopes if training else noise.clone()
    if training:
        noise.resize_(x.shape).copy_(slopes)
    if func._schema.name == "aten::rrelu_with_noise_":
        return x.copy_(result)
    return given["out"].resize_(x.shape).copy_(result) if "out" in given else result
