"""What a model is given otherwise than in tensors, lists and dicts, taken apart for the trials: NumPy arrays, mappings
such as the output of a tokenizer, and objects by their attributes."""

import collections
import datetime
import functools
import logging
import numbers
import operator
import os
import re
import threading
import types
import uuid
import weakref
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lora_dp.errors import IsolationError


class Settings(tuple[Any, ...]):
    """The entries of a dict of many settings, as pairs: one setting, equal to another with the same."""

    __slots__ = ()


# What is a setting or code; numbers and texts are looked at elsewhere.
WHOLE = (
    str,
    int,
    float,
    types.NoneType,
    numbers.Number,
    np.generic,
    bytes,
    Enum,
    Settings,
    range,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    datetime.tzinfo,
    uuid.UUID,
    os.PathLike,
    re.Pattern,
    logging.Logger,
    types.EllipsisType,
    types.NotImplementedType,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    np.dtype,
    torch.Generator,
    nn.Module,
    type,
    types.GenericAlias,
    types.UnionType,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    functools.partial,
    functools._lru_cache_wrapper,
    operator.attrgetter,
    operator.itemgetter,
    operator.methodcaller,
    np.ufunc,
    torch._ops.OperatorBase,
    torch._ops.OpOverloadPacket,
    weakref.ReferenceType,
)
_LOCKS = (type(threading.Lock()), type(threading.RLock()))
# Arrays whose rows are all that they hold: others have a mask, a unit or another product.
_ARRAYS = (np.ndarray, np.memmap)
# How deep objects in objects are taken apart, and how many: those that know each other are met again and again.
_DEPTH = 8
_OPENED, _TIMES = 10_000, 100
_TANGLED = (
    "The model was given objects, lists or dicts that hold each other, too often to be taken apart by example: "
    "pass tensors, or lists or dicts of them."
)
# Dicts of so many settings, such as a vocabulary, are one: each would be looked at in every pass.
_MANY = 64
_SETTINGS = {int, float, complex, bool, str, bytes, types.NoneType}


class _Part(Enum):
    """What a dict of a class of its own has."""

    ENTRIES = "entries"
    ATTRIBUTES = "attributes"

    def __repr__(self) -> str:
        return self.value


class NumberArray(Tensor):
    """A NumPy array of a model's arguments, as a tensor of its shape and dtype; int64 for unsigned ones of 16 bits or
    more, float64 for long doubles."""


class Again:
    """An object that one of its parts knows, or a lock: nothing to be looked at.

    Attributes:
        like: that.
    """

    __slots__ = ("like",)

    def __init__(self, like: Any):
        self.like = like


class Opened(dict[Any, Any]):
    """The attributes of an object by name, or what a dict of a class of its own has.

    Attributes:
        like: what they are of.
    """

    like: Any = None


def _opened(like: Any, entries: dict[Any, Any]) -> Opened:
    made = Opened(entries)
    made.like = like
    return made


pytree.register_pytree_node(
    Opened,
    lambda node: (list(node.values()), (node.like, list(node))),
    lambda values, context: _opened(context[0], dict(zip(context[1], values, strict=True))),
    flatten_with_keys_fn=lambda node: (
        [(pytree.MappingKey(key), value) for key, value in node.items()],
        (node.like, list(node)),
    ),
)
pytree.register_pytree_node(
    Again, lambda node: ([], node.like), lambda _, like: Again(like), flatten_with_keys_fn=lambda node: ([], node.like)
)


def take_apart(tree: Any) -> Any:
    """The same call with arrays as :class:`NumberArray`, mappings and objects as :class:`Opened`.

    Raises:
        IsolationError: so many objects know each other, or a list or dict itself, that they cannot be taken apart.
    """
    try:
        return _Walk().apart(tree, ())
    except RecursionError:
        raise IsolationError(_TANGLED) from None


class _Walk:
    """Through one call.

    Attributes:
        opened: how many objects have been taken apart.
        known: which.
        settings: by its place in memory, each large dict, and what it is as one setting, if it is.
    """

    def __init__(self) -> None:
        self.opened = 0
        self.known: set[int] = set()
        self.settings: dict[int, tuple[Any, Settings | None]] = {}

    def apart(self, tree: Any, around: tuple[int, ...]) -> Any:
        def one(leaf: Any) -> Any:
            if isinstance(leaf, types.MethodType) and id(leaf.__self__) in around:
                return _opened(leaf, {"self": Again(leaf.__self__)})
            if isinstance(leaf, (Tensor, WHOLE)) or type(leaf) is object:
                return leaf
            if isinstance(leaf, torch.Size):
                return tuple(leaf)
            if isinstance(leaf, np.ndarray):
                values = tensor_of(leaf)
                return leaf if values is None else values.as_subclass(NumberArray)
            if id(leaf) in around or isinstance(leaf, _LOCKS):
                return Again(leaf)
            if self.is_one_setting(leaf):
                return self.settings[id(leaf)][1]
            entries = None if len(around) >= _DEPTH else _entries(leaf)
            if entries is None:
                return leaf
            self.opened += 1
            self.known.add(id(leaf))
            if self.opened > _OPENED + _TIMES * len(self.known):
                raise IsolationError(_TANGLED)
            return _opened(leaf, self.apart(entries, (*around, id(leaf))))

        return pytree.tree_map(one, tree, is_leaf=self.is_one_setting)

    def is_one_setting(self, node: Any) -> bool:
        if type(node) is not dict or len(node) < _MANY:
            return False
        if id(node) not in self.settings:
            plain = all(type(key) in _SETTINGS and type(value) in _SETTINGS for key, value in node.items())
            self.settings[id(node)] = node, Settings(node.items()) if plain else None
        return self.settings[id(node)][1] is not None


def tensor_of(array: np.ndarray) -> Tensor | None:
    """A copy of its numbers, as in :class:`NumberArray`; None of other things."""
    if array.dtype.kind not in "biufc" or type(array) not in _ARRAYS:
        return None
    wide = array.dtype.kind == "u" and array.dtype.itemsize > 1
    dtype = (
        np.dtype(np.int64)
        if wide
        else np.dtype(np.float64)
        if array.dtype == np.longdouble
        else (array.dtype.newbyteorder("="))
    )
    return torch.from_numpy(array.astype(dtype, order="C"))


def _entries(leaf: Any) -> dict[Any, Any] | None:
    """What it holds by name; None where that cannot be told, or cannot be put back."""
    if isinstance(leaf, slice):
        return {"start": leaf.start, "stop": leaf.stop, "step": leaf.step}
    try:
        _empty(leaf)
    except TypeError:
        return None
    slots = any(set(_names(base)) - {"__dict__", "__weakref__"} for base in type(leaf).__mro__)
    # A second one like it would close what both hold.
    if slots or hasattr(type(leaf), "__del__"):
        return None
    attributes = _attributes(leaf)
    if not issubclass(_base(leaf), dict):
        return None if attributes is None else dict(attributes)
    entries: dict[Any, Any] = {_Part.ENTRIES: dict(_base(leaf).items(leaf))}
    return {**entries, _Part.ATTRIBUTES: attributes} if attributes else entries


def _attributes(leaf: Any) -> dict[str, Any] | None:
    """As they are kept, whatever its class says when it is asked for them; None where it has no place for any."""
    return object.__getattribute__(leaf, "__dict__") if type(leaf).__dictoffset__ else None


def _base(like: Any) -> Any:
    """The class of Python that keeps what is no attribute."""
    return next(
        base
        for base in (collections.OrderedDict, collections.defaultdict, dict, types.SimpleNamespace, object)
        if issubclass(type(like), base)
    )


def _empty(like: Any) -> Any:
    """One of its class that holds nothing; Python refuses where the class keeps anything that is not known."""
    made = _base(like).__new__(type(like))
    if _base(like) is collections.defaultdict:
        made.default_factory = like.default_factory
    return made


def _names(base: type) -> tuple[str, ...]:
    slots = vars(base).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def put_together(tree: Any) -> Any:
    """The call as a model takes it, which shares no list, dict or object with the one that was taken apart."""
    return _together(tree, {})


def _together(tree: Any, made: dict[int, Any]) -> Any:
    def one(node: Any) -> Any:
        if isinstance(node, NumberArray):
            return node.as_subclass(Tensor).numpy()
        if isinstance(node, Settings):
            return dict(node)
        if isinstance(node, Again):
            return made.get(id(node.like), node.like)
        return _whole(node, made) if isinstance(node, Opened) else node

    return pytree.tree_map(one, tree, is_leaf=lambda node: isinstance(node, Opened | Again))


def _whole(node: Opened, made: dict[int, Any]) -> Any:
    like = node.like
    if isinstance(like, slice):
        return slice(*_together(list(node.values()), made))
    if isinstance(like, types.MethodType):
        return types.MethodType(like.__func__, made[id(like.__self__)])
    whole = made[id(like)] = _empty(like)  # before its parts, for they may know it
    entries = _together(dict(node), made)
    if _Part.ENTRIES not in entries:
        _attributes(whole).update(entries)  # type: ignore[union-attr]
        return whole
    for key, value in entries[_Part.ENTRIES].items():
        _base(whole).__setitem__(whole, key, value)
    if _Part.ATTRIBUTES in entries:
        object.__setattr__(whole, "__dict__", entries[_Part.ATTRIBUTES])
    return whole


def check_opened(tree: Any) -> None:
    """Refuse what could not be taken apart, for what it holds would be the same in every trial.

    Raises:
        IsolationError: naming the argument and its type.
    """
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, (Tensor, WHOLE)) or type(leaf) is object or _holds_texts(leaf):
            continue
        kind = f"{type(leaf).__module__}.{type(leaf).__name__}"
        raise IsolationError(
            f"The model was given a {kind} ({pytree.keystr(path)}), which cannot be taken apart by example, so that "
            "nobody can try whether examples meet by it: pass tensors, or lists or dicts of them."
        )


def _holds_texts(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind in "SU" and type(leaf) in _ARRAYS
    return isinstance(leaf, set | frozenset) and all(isinstance(entry, str) for entry in leaf)
