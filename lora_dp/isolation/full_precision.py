"""Trials in full precision: rounding to half of it looks like an influence of other examples, and hides a small one.

In bfloat16 a text of a 30-layer language model comes out up to 3 % different in a batch of another shape, by the order
of sums alone. In float32 it is a millionth.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lora_dp.errors import IsolationError
from lora_dp.isolation.batches.calls import tensors_in
from lora_dp.isolation.batches.tables import Table

T = TypeVar("T")
_HALF = (torch.float16, torch.bfloat16)
_DEVICES = ("cpu", "cuda")
_BACKENDS: Any = torch.backends
# Where float32 may be rounded in products: to TF32, on a CPU to bfloat16.
_PRODUCTS = (
    _BACKENDS.cuda.matmul,
    _BACKENDS.cudnn.conv,
    _BACKENDS.cudnn.rnn,
    _BACKENDS.mkldnn.matmul,
    _BACKENDS.mkldnn.conv,
    _BACKENDS.mkldnn.rnn,
)


def in_full_precision(model: nn.Module, call: Any, check: Callable[[Any], T]) -> T:
    """What ``check`` says of ``call`` in float32: without autocast, and of copies of weights in half precision.

    A model that does not take that, or does not fit the memory, is tried as it is.

    Args:
        model: whose parameters and buffers are others in the meantime.
        call: (args, kwargs, targets).
        check: given the call.

    Raises:
        IsolationError: by ``check``; where the model was tried as it is, with the reason.

    >>> model, x = nn.Linear(4, 2, dtype=torch.bfloat16), torch.ones(1, 4, dtype=torch.bfloat16)
    >>> in_full_precision(model, ((x,), {}, None), lambda call: model(*call[0]).dtype), model.weight.dtype
    (torch.float32, torch.bfloat16)
    """
    with ExitStack() as stack:
        reduced = False
        for kind in filter(torch.is_autocast_enabled, _DEVICES):
            stack.enter_context(torch.autocast(kind, enabled=False))
            reduced = True
        reduced |= stack.enter_context(_widened(model)) | any(leaf.dtype in _HALF for leaf in tensors_in(call))
        stack.enter_context(_exact_products())
        try:
            return check(pytree.tree_map(_wide, call))
        except IsolationError:
            raise
        except Exception as error:  # whatever a model says to another dtype, or a device to its size
            if not reduced:
                raise
            why = type(error).__name__
    try:
        return check(call)
    except IsolationError as error:
        raise IsolationError(
            f"{error} (Tried in half precision, whose rounding can look the same, for in float32 the model raised "
            f"{why}.)"
        ) from error


def _wide(leaf: Any) -> Any:
    if isinstance(leaf, Table):
        return Table(_wide(leaf.tensor), leaf.free)
    return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in _HALF else leaf


@contextmanager
def _widened(model: nn.Module) -> Iterator[bool]:
    """Parameters and buffers of half precision stand in float32 copies; whether there were any."""
    held: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (tensors, dict(tensors)) for module in model.modules() for tensors in (module._parameters, module._buffers)
    ]
    copies: dict[int, Tensor] = {}

    def wide(tensor: Any) -> Any:
        if tensor is None or tensor.dtype not in _HALF:
            return tensor
        if id(tensor) not in copies:
            copy = tensor.detach().float()
            is_parameter = isinstance(tensor, nn.Parameter)
            copies[id(tensor)] = nn.Parameter(copy, requires_grad=tensor.requires_grad) if is_parameter else copy
        return copies[id(tensor)]

    try:
        for tensors, before in held:
            tensors.update({name: wide(tensor) for name, tensor in before.items()})
        yield bool(copies)
    finally:
        for tensors, before in held:
            tensors.clear()
            tensors.update(before)


@contextmanager
def _exact_products() -> Iterator[None]:
    before = [(products, products.fp32_precision) for products in _PRODUCTS]
    try:
        for products, _ in before:
            products.fp32_precision = "ieee"
        yield
    finally:
        for products, precision in before:
            products.fp32_precision = precision
