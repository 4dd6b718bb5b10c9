"""What a collated batch is made of, by name: tensors and arrays of any kind, numbers, texts, and objects by their
attributes; and the numbers by which two of these are compared."""

import array
import contextlib
import datetime
import decimal
import logging
import os
import types
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils import _pytree as pytree

from lora_dp.errors import IsolationError
from lora_dp.isolation.batches.objects import tensor_of

# How deep objects in objects are looked into, and how deep where they lead to each other.
_DEPTHS = (8, 4)
# Objects that know each other are found again on every way from one to another: so often, for each, they may be.
_AGAIN = 64
_FREE = 1000
# A dict of more numbers or texts is one leaf, within whatever holds it.
_MANY = 100
# A sparse tensor of more numbers is compared by where it has which.
_DENSE = 2**24
# Compared by what it is called.
_NAMED = (os.PathLike, Enum, decimal.Decimal, datetime.date, datetime.time, datetime.timedelta, uuid.UUID)
_BUFFERS = (bytearray, memoryview, array.array)
# Code and settings.
_CLOSED = (
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    nn.Module,
    logging.Logger,
    torch.Generator,
)
_TEXT = (str, bytes, *_NAMED)


def leaves(batch: Any) -> list[tuple[str, Any]]:
    """What a batch is made of, by name; a list of numbers or texts is one leaf.

    Args:
        batch: whatever a collate function returns.

    Raises:
        IsolationError: its objects lead to each other on too many ways.
    """
    for depth in _DEPTHS:
        with contextlib.suppress(_LeadToEachOther):
            return list(_leaves(batch, depth, (), Counter()))
    raise IsolationError(
        "The collate function returns objects that lead to each other, so that nobody can tell what belongs to which "
        "example: return tensors, or lists or dicts of them."
    )


class _LeadToEachOther(Exception):
    """More ways through a batch than anybody can go."""


def _leaves(tree: Any, depth: int, around: tuple[int, ...], opened: Counter[int]) -> Iterator[tuple[str, Any]]:
    for path, leaf in pytree.tree_flatten_with_path(tree, is_leaf=_is_one)[0]:
        name = pytree.keystr(path)
        inner = None if id(leaf) in around or len(around) > depth else _inner(leaf)
        if inner is None:
            yield name, leaf
            continue
        opened[id(leaf)] += 1
        if opened.total() > _AGAIN * len(opened) + _FREE:
            raise _LeadToEachOther
        for part, value in _leaves(inner, depth, (*around, id(leaf)), opened):
            yield name + part, value


def _is_one(node: Any) -> bool:
    return isinstance(node, PackedSequence) or _are_numbers(node) or are_texts(node) or _is_table(node)


def _inner(leaf: Any) -> Any:
    """What is within a leaf that holds more; None if it is one by itself."""
    if isinstance(leaf, PackedSequence):
        return pad_packed_sequence(leaf, batch_first=True)
    if isinstance(leaf, Tensor):
        return _inner_of_tensor(leaf)
    if isinstance(leaf, np.ndarray | np.generic):
        return _inner_of_array(leaf)
    if isinstance(leaf, (*_TEXT, *_BUFFERS, *_CLOSED)) or _is_one(leaf):
        return None
    if isinstance(leaf, set | frozenset):
        return sorted(leaf, key=repr)
    attributes = _attributes(leaf)
    if isinstance(leaf, Mapping):
        return {**attributes, **dict(leaf)}
    if isinstance(leaf, list | tuple):  # of a class of its own
        return {**attributes, "entries": list(leaf)} if attributes else list(leaf)
    return _inner_of_array(np.asarray(leaf)) if _is_like_array(leaf) else attributes or None


def _inner_of_tensor(leaf: Tensor) -> Any:
    if leaf.is_nested:
        return list(leaf.unbind())
    if leaf.layout is torch.strided or leaf.numel() <= _DENSE:
        return None
    found = leaf.detach().to_sparse_coo().coalesce()
    return {"indices": found.indices(), "values": found.values()}


def _inner_of_array(leaf: Any) -> Any:
    if isinstance(leaf, np.ma.MaskedArray):
        known = leaf.filled(0) if leaf.dtype.kind in "biufc" else np.ma.getdata(leaf)
        return {"data": known, "mask": np.ma.getmaskarray(leaf)}
    if leaf.dtype.names:
        return {name: leaf[name] for name in leaf.dtype.names}
    return leaf.tolist() if leaf.dtype.kind in "OSUT" and leaf.ndim else None


def _attributes(leaf: Any) -> dict[str, Any]:
    found = {}
    for base in type(leaf).__mro__:
        slots = vars(base).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else tuple(slots):
            hidden = slot.startswith("__") and not slot.endswith("__")
            name = f"_{base.__name__.lstrip('_')}{slot}" if hidden else slot
            if slot not in ("__dict__", "__weakref__") and hasattr(leaf, name):
                found[name] = getattr(leaf, name)
    return {**found, **vars(leaf)} if hasattr(leaf, "__dict__") else found


def _is_like_array(leaf: Any) -> bool:
    """An array of another library, a data frame, an image."""
    return hasattr(type(leaf), "__array__") or hasattr(type(leaf), "__array_interface__")


def _are_numbers(node: Any) -> bool:
    return type(node) in (list, tuple) and all(isinstance(entry, int | float | np.number | np.bool_) for entry in node)


def are_texts(node: Any) -> bool:
    return type(node) in (list, tuple) and len(node) > 0 and all(isinstance(entry, _TEXT) for entry in node)


def _is_table(node: Any) -> bool:
    return (
        isinstance(node, dict)
        and len(node) > _MANY
        and all(entry is None or isinstance(entry, str | bytes | int | float) for entry in node.values())
    )


def stands_alone(leaf: Any) -> bool:
    """Whether it belongs to one example, or to nobody: a text, a table of words."""
    return isinstance(leaf, _TEXT) or _is_table(leaf)


def as_tensor(leaf: Any) -> Tensor | None:
    """The numbers by which it is compared; None if there are none.

    A text is its letters, so that it may be padded. Of several texts each is a number that nobody can foretell.
    """
    if isinstance(leaf, Tensor):
        return _plain(leaf)
    if isinstance(leaf, _TEXT):
        return _letters(leaf)
    if are_texts(leaf):
        return torch.tensor([hash(_text(entry)) for entry in leaf])
    if _is_table(leaf):  # what is no number has another hash each time
        return torch.tensor([hash((key, entry if entry == entry else None)) for key, entry in leaf.items()])
    if isinstance(leaf, _BUFFERS):
        return tensor_of(np.asarray(memoryview(leaf)))
    if isinstance(leaf, int | float | complex | np.ndarray | np.generic) or _are_numbers(leaf) or _is_like_array(leaf):
        found = np.asarray(leaf)
        tensor = tensor_of(found.astype(np.int64) if found.dtype.kind in "mM" else found)
        return None if tensor is None else _plain(tensor)
    return None


def _text(leaf: Any) -> str | bytes:
    return leaf if isinstance(leaf, str | bytes) else str(leaf)


def _letters(leaf: Any) -> Tensor:
    text = _text(leaf)
    if isinstance(text, str):
        return torch.from_numpy(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.int32).copy())
    return torch.from_numpy(np.frombuffer(text, np.uint8).copy())


def _plain(tensor: Tensor) -> Tensor | None:
    """Dense, and of a dtype that can be compared; None where there is no value at all."""
    if tensor.is_meta:
        return None
    tensor = tensor.detach()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    if tensor.is_floating_point():
        return tensor.float() if tensor.element_size() == 1 else tensor
    return tensor.long() if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64) else tensor
