"""What a model is made of: its modules, and the settings among their attributes by which other code runs.

A model that exchanges its modules for good in a forward, as BigBird does at its first batch of short texts, computes
with all later examples as one example decided. One that is switched from outside, as after a warm-up, is tried again.
"""

from collections.abc import Hashable, Mapping
from operator import is_not
from typing import Any

from torch import nn

from lora_dp.errors import IsolationError

# Options of a run rather than a table of data.
_MOST_OPTIONS = 256
# Of a private layer, by an earlier make_private.
_RECORDER = "recorder"


def _state(value: Any) -> Hashable:
    """What of a setting decides which code runs: of a number whether it is 0, of a whole one also its sign and its size
    up to a factor of two."""
    if isinstance(value, str | bool | None):
        return value
    if isinstance(value, int):
        return value < 0, value.bit_length()
    return value != 0 if isinstance(value, float) else None


def _options(value: Any) -> Mapping[str, Any] | None:
    """The settings of a configuration that a module holds: of a dict, or of an object by its attributes."""
    if callable(value):  # modules and classes too
        return None
    found = value if isinstance(value, dict) else getattr(value, "__dict__", None)
    return found if isinstance(found, dict) and len(found) <= _MOST_OPTIONS else None


class ModelParts:
    """Which modules a model is made of, words among their attributes, as by which kernel attention is computed, and
    switches and numbers, in configurations too."""

    def __init__(self, model: nn.Module | None = None):
        self._children: list[tuple[str, dict[str, nn.Module | None], str]] = []
        self._words: list[tuple[str, dict[str, Any], str]] = []
        self._settings: list[tuple[Mapping[str, Any], str]] = []
        self._attributes: list[Mapping[str, Any]] = []
        configurations: dict[int, Mapping[str, Any]] = {}
        for path, module in [] if model is None else model.named_modules():
            self._attributes += [vars(module), module._parameters]
            prefix = f"{path}." if path else ""
            self._children += [(prefix + name, module._modules, name) for name in module._modules]
            for name, value in vars(module).items():
                if isinstance(value, str):
                    self._words.append((prefix + name, vars(module), name))
                elif isinstance(value, bool) or (
                    isinstance(value, int | float) and not type(module).__module__.startswith("torch.")
                ):
                    self._settings.append((vars(module), name))
                elif name != _RECORDER and not name.startswith("_") and (options := _options(value)) is not None:
                    configurations[id(options)] = options
        self._settings += [
            (options, name)
            for options in configurations.values()
            for name, value in options.items()
            if isinstance(value, str | bool | int | float | None)
        ]
        self._before: tuple[list[Any], list[Any]] = [], []
        self._last: tuple[list[Any], tuple[Hashable, ...]] = [], ()

    def _now(self) -> tuple[list[Any], list[Any]]:
        return ([held.get(name) for _, held, name in self._children], [held.get(name) for _, held, name in self._words])

    def standing(self) -> Hashable:
        """As the forward began: another where a module is another, or a setting has changed or come in."""
        modules, words = self._before
        values = [*words, *(held.get(name) for held, name in self._settings)]
        if len(values) != len(self._last[0]) or any(map(is_not, values, self._last[0])):
            self._last = values, tuple(map(_state, values))
        return (*map(id, modules), *map(len, self._attributes), self._last[1])

    def begin(self) -> None:
        """A forward begins."""
        self._before = self._now()

    def check(self) -> None:
        """It has ended.

        Raises:
            IsolationError: it has exchanged a module, or a word among the attributes.
        """
        (modules, words), now = self._before, self._now()
        exchanged = [
            name
            for (name, *_), one, other in zip(self._children, modules, now[0], strict=False)
            if one is not None and other is not one
        ]
        changed = [name for (name, *_), one, other in zip(self._words, words, now[1], strict=False) if other != one]
        if exchanged or changed:
            raise IsolationError(
                f"The model's forward changed its '{(changed + exchanged)[0]}' for good: one batch would decide how "
                "all later examples are computed with. Settle it before make_private (for BigBird by "
                "set_attention_type('original_full'))."
            )
