"""Shows every backward's losses to whoever watches them, before it runs.

Calls are seen at ``torch.autograd.backward``, through which ``Tensor.backward`` goes. A gradient that reaches a private
layer by another way is refused by the step.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Watch(Protocol):
    """Who is shown the losses.

    Attributes:
        followed: set by :meth:`scalar` where a loss comes from its model.
        after_backward: called when the backward from such a loss has ended.
    """

    followed: bool
    after_backward: Callable[[], None]

    @property
    def waiting(self) -> bool:
        """Whether it expects a loss now."""

    def scalar(self, loss: Tensor, gradient: Tensor | None = None) -> None:
        """Sees a loss, and the gradient that it is given."""


_watches: "weakref.WeakSet[Watch]" = weakref.WeakSet()
_plain_backward = torch.autograd.backward


class _Running(threading.local):
    inside = False


_running = _Running()


def show_backward_to(watch: Watch) -> None:
    """From here on ``watch`` sees what is differentiated, for as long as it lives."""
    global _plain_backward
    _watches.add(watch)
    if torch.autograd.backward is not _watched_backward:
        _plain_backward, torch.autograd.backward = torch.autograd.backward, _watched_backward


def backward_unseen(loss: Tensor, *, retain_graph: bool) -> None:
    """A backward from a loss that was examined already."""
    _run_backward(loss, retain_graph=retain_graph)


def _run_backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
    # Under torch.set_default_device torch's own comes back to torch.autograd.backward.
    before, _running.inside = _running.inside, True
    try:
        _plain_backward(tensors, *args, **kwargs)
    finally:
        _running.inside = before


def _watched_backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
    """As torch's; losses of private models are examined first."""
    if _running.inside:
        _plain_backward(tensors, *args, **kwargs)
        return
    watches = [watch for watch in list(_watches) if watch.waiting]
    met = []
    # Inside a backward, a reentrant checkpoint goes on with what it has run again.
    if watches and torch._C._current_graph_task_id() == -1:
        roots = [tensors] if isinstance(tensors, Tensor) else [root for root in tensors if isinstance(root, Tensor)]
        given = args[0] if args else kwargs.get("grad_tensors", kwargs.get("grad_variables"))
        gradients = list(given) if isinstance(given, list | tuple) else [given] * len(roots)
        for watch in watches:
            watch.followed = False
            for root, gradient in zip(roots, gradients, strict=False):
                watch.scalar(root, gradient)
            met += [watch] * watch.followed
    _run_backward(tensors, *args, **kwargs)
    for watch in met:
        watch.after_backward()
