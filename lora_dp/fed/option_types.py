"""Options of a run are what their annotations say: a wrong type or a choice that is none is refused in one sentence."""

import dataclasses
import os
import reprlib
import sys
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# One of a kind, and several.
_NAMES: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "truth values"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    Path: ("a path", "paths"),
    Any: ("", "options"),
}


def check_types(options: Any, names: dict[str, str] | None = None) -> None:
    """Refuse the first option of a dataclass whose value is not of its annotation's kind, or none of its choices.

    A whole number is a number, a truth value is neither, and NumPy's numbers become Python's.

    Args:
        options: an instance of a dataclass.
        names: what users call a field, where that is not its own name.

    Raises:
        ValueError: naming the option, what it may be, and what was given.
    """
    hints = get_type_hints(type(options))
    for field in dataclasses.fields(options):
        value, hint = getattr(options, field.name), hints[field.name]
        if not _fits(value, hint):
            name, kinds = (names or {}).get(field.name, field.name), _kinds(hint)
            listed = f"{', '.join(kinds[:-1])} or {kinds[-1]}" if len(kinds) > 1 else kinds[0]
            raise ValueError(f"{name} must be {listed}, not {reprlib.repr(value)}.")
        # NumPy's numbers, which no file of a run's options takes; the dataclass may be frozen.
        if hasattr(value, "dtype") and hasattr(value, "item"):
            object.__setattr__(options, field.name, value.item())


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is list:
        return isinstance(value, list) and all(_fits(each, parts[0]) for each in value)
    if origin is dict:  # in YAML a name may look like a number: {4: 0.75}
        return isinstance(value, dict) and all(_fits(each, parts[1]) for each in value.values())
    if isinstance(value, bool):
        return hint is bool
    if hint is float and isinstance(value, Integral):
        return abs(value) <= sys.float_info.max  # type: ignore[operator]
    return isinstance(value, {int: Integral, float: Real, Path: os.PathLike | str}.get(hint, hint))


def _kinds(hint: Any) -> list[str]:
    """What a value may be, in words; None, which stands for an option that is left out, is not named."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return [kind for part in parts if part is not NoneType for kind in _kinds(part)]
    if origin is Literal:
        return list(parts)
    if origin is list:
        return [f"a list of {_NAMES[parts[0]][1]}"]
    if origin is dict:
        return [f"a mapping of names to {_NAMES[parts[1]][1]}"]
    return [_NAMES[hint][0]]
