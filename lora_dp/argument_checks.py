"""What users give: a wrong type is refused in one sentence that names the argument, and settings stay as they were."""

import math
import numbers
import os
from typing import Any, Generic, NoReturn, TypeVar, overload

from lora_dp.lazy_torch import torch

T = TypeVar("T")


def check_number(name: str, value: object, remedy: str = "") -> None:
    """Refuse what is no real number; NaN and infinity are for the caller to judge.

    Args:
        name: of the argument.
        value: what was given for it.
        remedy: what to do instead, after a colon.

    Raises:
        TypeError: a string, None, a truth value, a list, a tensor, a complex number.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {_shown(value)}{f': {remedy}' if remedy else ''}.")


def check_count(name: str, value: object, least: int | None = 1) -> None:
    """Refuse what is no whole number from ``least`` on, if there is a least.

    Raises:
        TypeError: no whole number; 10.0 is none.
        ValueError: a smaller one.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        whole = isinstance(value, float) and math.isfinite(value)
        remedy = f": write {name}={round(value)}" if whole else ""  # type: ignore[call-overload]
        raise TypeError(f"{name} must be a whole number, got {_shown(value)}{remedy}.")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_alpha(alpha: float | None) -> None:
    """Refuse an alpha that scales nothing; None, which stands for the rank, is taken.

    Raises:
        TypeError: no number.
        ValueError: not above 0, or infinite.
    """
    if alpha is None:
        return
    check_number("alpha", alpha)
    if not alpha > 0:
        raise ValueError(f"alpha must be above 0, got {alpha}: leave it out for alpha = r.")
    if alpha == math.inf:
        raise ValueError("alpha must be finite, got inf: leave it out for alpha = r.")


def check_kind(name: str, value: object, kind: type, remedy: str) -> None:
    """Refuse an object of another class.

    Raises:
        TypeError: it is not of ``kind``.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {_shown(value)}: {remedy}.")


def check_flag(name: str, value: object) -> None:
    """Refuse what is no truth value.

    Raises:
        TypeError: a string, None, a number.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {_shown(value)}.")


def check_path(name: str, value: object) -> None:
    """Refuse what names no file or folder.

    Raises:
        TypeError: None, a number, bytes.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path, got {_shown(value)}: a string or a pathlib.Path.")


def check_callable(name: str, value: object, arguments: str) -> None:
    """Refuse what cannot be called.

    Raises:
        TypeError: a string, a number, a tensor.
    """
    if not callable(value):
        raise TypeError(f"{name} must be a function of {arguments}, got {_shown(value)}.")


def check_tensors(function: str, **given: object) -> None:
    """Refuse lists, arrays and None among the tensors that a function takes, by name.

    Raises:
        TypeError: one is no tensor.
    """
    for name, value in given.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{function} takes tensors, got {name} = {_shown(value)}: torch.as_tensor makes one.")


def _shown(value: object) -> str:
    shown = repr(value)
    if len(shown) > 40 or "\n" in shown:
        return f"a {type(value).__name__}"
    return shown if value is None else f"{shown} ({type(value).__name__})"


class Fixed(Generic[T]):
    """An attribute that can be set once: what noise, clipping and accounting were matched to must not change alone."""

    def __init__(
        self,
        refusal: str = (
            "'{name}' is fixed, for noise, clipping and accounting are matched to it: "
            "call make_private again for another."
        ),
    ):
        self.refusal = refusal

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.key = name, f"_{name}"

    @overload
    def __get__(self, holder: None, owner: type) -> "Fixed[T]": ...
    @overload
    def __get__(self, holder: object, owner: type) -> T: ...
    def __get__(self, holder: object | None, owner: type) -> Any:
        if holder is None:
            return self
        try:
            return vars(holder)[self.key]
        except KeyError:
            raise AttributeError(f"'{owner.__name__}' has no '{self.name}' yet.") from None

    def __set__(self, holder: object, value: T) -> None:
        if self.key in vars(holder):
            raise AttributeError(self.refusal.format(name=self.name))
        vars(holder)[self.key] = value


class Elsewhere:
    """An attribute that there is not, under a name by which settings are looked for: assigning it would change nothing.

    Args:
        refusal: where it is set instead.
    """

    def __init__(self, refusal: str):
        self.refusal = refusal

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, holder: object | None, owner: type) -> NoReturn:
        raise AttributeError(f"'{owner.__name__}' has no '{self.name}'.")

    def __set__(self, holder: object, value: object) -> NoReturn:
        raise AttributeError(f"'{self.name}' would be without effect here: {self.refusal}.")
