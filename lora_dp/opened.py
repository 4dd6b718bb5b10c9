"""What a model is given otherwise than in tensors, lists and dicts, taken apart for the trials: NumPy arrays, mappings
such as the output of a tokenizer, and objects by their attributes."""

import copy
import functools
import logging
import numbers
import os
import re
import types
import weakref
from collections.abc import Mapping, MutableMapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lora_dp.loss_graph import IsolationError

# Tensors, numbers and texts, which are looked at elsewhere, and what is a setting or code.
_WHOLE = (
    Tensor, numbers.Number, np.generic, str, bytes, types.NoneType, Enum, os.PathLike, re.Pattern, logging.Logger,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator, nn.Module, type, types.FunctionType,
    types.BuiltinFunctionType, types.MethodType, types.ModuleType, functools.partial, weakref.ReferenceType)
# How deep objects in objects are taken apart.
_DEPTH = 8


class NumberArray(Tensor):
    """A NumPy array of a model's arguments, as a tensor of its shape and dtype; int64 for unsigned ones of 16 bits or
    more, float64 for long doubles."""


class Opened(dict[str, Any]):
    """The entries of a mapping or the attributes of an object, by name.

    Attributes:
        like: what they are of.
    """

    like: Any = None


def _opened(like: Any, entries: dict[str, Any]) -> Opened:
    made = Opened(entries)
    made.like = like
    return made


pytree.register_pytree_node(
    Opened, lambda node: (list(node.values()), (node.like, list(node))),
    lambda values, context: _opened(context[0], dict(zip(context[1], values, strict=True))),
    flatten_with_keys_fn=lambda node: (
        [(pytree.MappingKey(key), value) for key, value in node.items()], (node.like, list(node))))


def take_apart(tree: Any) -> Any:
    """The same call with arrays as :class:`NumberArray`, mappings and objects as :class:`Opened`."""
    return _apart(tree, ())


def _apart(tree: Any, around: tuple[int, ...]) -> Any:
    def one(leaf: Any) -> Any:
        if isinstance(leaf, _WHOLE):
            return leaf
        if isinstance(leaf, torch.Size):
            return tuple(leaf)
        if isinstance(leaf, np.ndarray):
            values = tensor_of(leaf)
            return leaf if values is None else values.as_subclass(NumberArray)
        entries = None if id(leaf) in around or len(around) >= _DEPTH else _entries(leaf)
        return leaf if entries is None else _opened(leaf, _apart(entries, (*around, id(leaf))))
    return pytree.tree_map(one, tree)


def tensor_of(array: np.ndarray) -> Tensor | None:
    """A copy of its numbers, as in :class:`NumberArray`; None of other things."""
    if array.dtype.kind not in "biufc":
        return None
    wide = array.dtype.kind == "u" and array.dtype.itemsize > 1
    dtype = np.dtype(np.int64) if wide else np.dtype(np.float64) if array.dtype == np.longdouble else (
        array.dtype.newbyteorder("="))
    return torch.from_numpy(array.astype(dtype, order="C"))


def _entries(leaf: Any) -> dict[str, Any] | None:
    """What it holds by name; None where that cannot be told, or cannot be put back."""
    attributes = dict(vars(leaf)) if hasattr(leaf, "__dict__") else None
    if isinstance(leaf, Mapping):
        entries = dict(leaf)
        return entries if isinstance(leaf, MutableMapping) and _numbers_of(attributes) <= _numbers_of(entries) else None
    try:
        _empty(leaf)
    except TypeError:
        return None
    slots = any(set(_names(base)) - {"__dict__", "__weakref__"} for base in type(leaf).__mro__)
    # A second one like it would close what both hold.
    return None if slots or hasattr(leaf, "__del__") else attributes


def _numbers_of(entries: Any) -> set[int]:
    """Which tensors and arrays there are."""
    return {id(value) for value in pytree.tree_leaves(entries) if isinstance(value, Tensor | np.ndarray)}


def _empty(like: Any) -> Any:
    """One of its class without attributes; Python refuses where the class keeps anything elsewhere than in these."""
    return (types.SimpleNamespace if isinstance(like, types.SimpleNamespace) else object).__new__(type(like))


def _names(base: type) -> tuple[str, ...]:
    slots = vars(base).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def put_together(tree: Any) -> Any:
    """The call as a model takes it."""
    def one(node: Any) -> Any:
        if isinstance(node, NumberArray):
            return node.as_subclass(Tensor).numpy()
        if not isinstance(node, Opened):
            return node
        entries = put_together(dict(node))
        if not isinstance(node.like, Mapping):
            whole = _empty(node.like)
            vars(whole).update(entries)
            return whole
        made: Any = copy.copy(node.like)
        for key, value in entries.items():
            made[key] = value
        return made
    return pytree.tree_map(one, tree, is_leaf=lambda node: isinstance(node, Opened))


def check_opened(tree: Any) -> None:
    """Refuse what could not be taken apart, for what it holds would be the same in every trial.

    Raises:
        IsolationError: naming the argument and its type.
    """
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, _WHOLE) or _holds_texts(leaf):
            continue
        kind = f"{type(leaf).__module__}.{type(leaf).__name__}"
        raise IsolationError(
            f"The model was given a {kind} ({pytree.keystr(path)}), which cannot be taken apart by example, so that "
            "nobody can try whether examples meet by it: pass tensors, or lists or dicts of them.")


def _holds_texts(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind in "SU"
    return isinstance(leaf, set | frozenset) and all(isinstance(entry, str) for entry in leaf)
