"""Random generators that a data set or a collate function keeps for itself.

Whoever knows the seed of one knows every draw, and one example more shifts the draws of all others. Those that can be
found are looked at: in attributes, in what a function closes over, and in the globals that its code names.
"""

import contextlib
import functools
import pickle
import random
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

# How far, and among how many objects, generators are looked for.
_DEPTH = 6
_OBJECTS = 5000
_ITEMS = 100
_LIBRARIES = ("torch", "numpy", "datasets", "builtins")
_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)


def own_generators(*roots: Any) -> dict[str, Any]:
    """The generators that these objects hold or name, by the names on the way to them; not all can be found.

    Args:
        roots: a data set, a function.
    """
    found: dict[str, Any] = {}
    waiting = deque((getattr(root, "__name__", type(root).__name__), root, 0) for root in roots)
    seen: set[int] = set()
    while waiting and len(seen) < _OBJECTS:
        name, value, depth = waiting.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, _KINDS):
            found[name] = value
        elif depth < _DEPTH:
            waiting.extend((f"{name}.{part}", inner, depth + 1) for part, inner in _parts(value))
    return found


def states(generators: dict[str, Any]) -> dict[str, bytes]:
    """The state of each, where it has one that can be read: the operating system's has none."""
    found = {}
    for name, generator in generators.items():
        with contextlib.suppress(NotImplementedError):
            found[name] = pickle.dumps(_state(generator))
    return found


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state().tolist()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.BitGenerator):
        return generator.state
    return generator.get_state() if isinstance(generator, np.random.RandomState) else generator.getstate()


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, without running any of its code."""
    if isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, (types.MethodType, staticmethod, classmethod)):
        yield "__func__", value.__func__
        yield "__self__", getattr(value, "__self__", None)
    elif isinstance(value, types.BuiltinMethodType):
        yield "__self__", value.__self__
    elif isinstance(value, types.FunctionType):
        if not _is_of_a_library(value.__module__):
            yield from _closed_over(value)
    elif isinstance(value, (list, tuple, set, frozenset)):
        if len(value) <= _ITEMS:
            yield from ((str(place), item) for place, item in enumerate(value))
    elif isinstance(value, dict):
        if len(value) <= _ITEMS:
            yield from ((key if isinstance(key, str) else "…", item) for key, item in list(value.items()))
    elif not isinstance(value, (types.ModuleType, type)):
        with contextlib.suppress(AttributeError):
            yield from list(object.__getattribute__(value, "__dict__").items())
        for base in type(value).__mro__:
            if not _is_of_a_library(base.__module__):
                yield from list(vars(base).items())


def _is_of_a_library(module: str | None) -> bool:
    return (module or "").split(".")[0] in _LIBRARIES


def _closed_over(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not filled yet
            yield name, cell.cell_contents
    yield from (("defaults", function.__defaults__), ("defaults", function.__kwdefaults__))
    for name in _named(function.__code__):
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _named(code: types.CodeType) -> Iterator[str]:
    """The globals and attributes that code names, that of functions and comprehensions within included."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _named(inner)
