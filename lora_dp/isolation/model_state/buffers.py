"""Buffers that a forward writes to in some batches only, such as the running centre of a rare class.

What every forward writes is tried with the first batch. What one forward is the first to write is tried then, on all of
its examples: the value must not change with them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

Buffers = dict[str, Tensor | None]


class _Mark(NamedTuple):
    buffer: Tensor | None
    writes: tuple[int, int] = (0, 0)


def _mark(buffer: Tensor | None) -> _Mark:
    if buffer is None:
        return _Mark(None)
    # Nothing that trains can write to one that was made in torch.inference_mode.
    return _Mark(buffer, (0 if buffer.is_inference() else buffer._version, buffer.data_ptr()))


class KeptBuffers:
    """Which buffers of a model its forwards have written to, and whether that changed them.

    A write to the ``.data`` of a buffer is not seen.

    Attributes:
        refused: why no forward may come any more: what was written stays in the buffer.
    """

    def __init__(self, model: nn.Module | None = None):
        self._held: list[tuple[str, Buffers]] = (
            []
            if model is None
            else [(f"{path}." if path else "", module._buffers) for path, module in model.named_modules()]
        )
        self._before: list[dict[str, _Mark]] = []
        self._values: dict[str, Tensor] = {}
        self._known: set[tuple[str, bool | None]] = set()
        self.refused: str | None = None

    def begin(self) -> None:
        """A forward begins."""
        written = {name for name, _ in self._known}
        self._before = [{name: _mark(buffer) for name, buffer in held.items()} for _, held in self._held]
        self._values = (
            {}
            if not written
            else {
                prefix + name: buffer.clone()
                for prefix, held in self._held
                for name, buffer in held.items()
                if buffer is not None and prefix + name in written
            }
        )

    def unknown(self) -> set[tuple[str, bool | None]]:
        """The buffers to which the forward that has ended wrote as none did before: at all (None), to change it, or to
        leave it as it is."""
        found: set[tuple[str, bool | None]] = set()
        for (prefix, held), before in zip(self._held, self._before, strict=False):
            for name, buffer in held.items():
                mark, now = before.get(name, _mark(None)), _mark(buffer)
                if buffer is not None and (buffer is not mark.buffer or mark.writes != now.writes):
                    value = self._values.get(prefix + name)
                    found.add((prefix + name, None if value is None else not same(value, buffer)))
        return found - self._known

    def know(self, found: set[tuple[str, bool | None]]) -> None:
        """These have been tried."""
        self._known |= found

    @contextmanager
    def put_back(self, fill: float | None) -> Iterator[None]:
        """Inside, the model holds the buffers that it held as the forward began, not those put in their place. Those
        that it wrote to, whose values nobody has kept, hold ``fill``, or what they hold by now."""
        after = [dict(held) for _, held in self._held]
        try:
            for (_, held), before in zip(self._held, self._before, strict=False):
                held.clear()
                held.update(
                    {
                        name: mark.buffer
                        if fill is None or mark.buffer is None or mark.writes == _mark(mark.buffer).writes
                        else torch.full_like(mark.buffer, fill)
                        for name, mark in before.items()
                    }
                )
            yield
        finally:
            for (_, held), values in zip(self._held, after, strict=True):
                held.clear()
                held.update(values)


def same(one: Tensor, other: Tensor) -> bool:
    """To the bit; NaN is the same as NaN alone."""
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
