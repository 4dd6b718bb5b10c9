"""Data that several runs of one process share: opened and encoded once, and passed through a frozen front once."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from lora_dp.fed.data.kept_activations import shared_activations

T = TypeVar("T")
_store: dict[str, tuple[object, Any]] | None = None


@contextlib.contextmanager
def data_kept() -> Iterator[None]:
    """Runs inside share what :func:`made_once` has made; at the end it is let go.

    What has changed on the disk meanwhile is not seen inside. Outside nothing is kept.

    >>> made = []
    >>> with data_kept():
    ...     _ = made_once("letters", "a", lambda: made.append("a")), made_once("letters", "a", lambda: made.append("a"))
    >>> made
    ['a']
    """
    global _store
    before, _store = _store, {}
    try:
        with shared_activations():
            yield
    finally:
        _store = before


def made_once(kind: str, key: object, make: Callable[[], T]) -> T:
    """What was made under an equal key within :func:`data_kept`, or what is made now. Of each kind only the newest is
    kept, since data may be large.

    Args:
        kind: of the data.
        key: all that decides how they come out.
        make: makes them.

    >>> made_once("letters", "a", lambda: "A")
    'A'
    """
    if _store is None:
        return make()
    if kind not in _store or _store[kind][0] != key:
        _store.pop(kind, None)  # first, so that two are never held
        _store[kind] = key, make()
    found: T = _store[kind][1]
    return found
