"""What the loss of every backward may do, for one private model: :mod:`lora_dp.loss_graph` applied batch by batch.

Calls of ``backward`` are seen at ``torch.autograd.backward``, through which ``Tensor.backward`` goes. A gradient that
reaches a private layer by another way is refused by the step.
"""

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils import _pytree as pytree

from lora_dp.loss_graph import (
    IsolationError,
    LossReduction,
    MixingLoss,
    Outputs,
    Term,
    UnknownLoss,
    is_plain,
    meets,
    scalar_factor,
    terms,
    weight,
)

_REMEDY = "hand the losses of the single examples, (N,), to optimizer.backward (lora_dp.losses has them)"
_RELATIVE = 1e-5


class LossWatch:
    """Follows the losses of one model.

    Attributes:
        reduction: how a scalar loss is declared to join the examples.
        tested: whether examples that meet in the loss are looked for in this pass.
        examined: whether a loss of this pass was seen and found right.
        proven: which of the single numbers that the model returns are losses that keep examples apart.
        vouched: whether a criterion of the user's has passed the isolation check.
    """

    def __init__(self) -> None:
        self.reduction: LossReduction = "mean"
        self.tested = self.examined = self.vouched = False
        self.proven: frozenset[int] = frozenset()
        self._n = 0
        self._outputs: Outputs | None = None
        self._own: list[int] = []
        # Of each backward of a pass, in their order: several may go through one kept graph.
        self._weights: list[list[float]] = []
        self._backwards = 0
        self._scalar: float | None = None
        _show_backward_to(self)

    def begin(self, n: int, tested: bool) -> None:
        """A pass over ``n`` examples begins."""
        self._n, self.tested, self.examined, self._outputs, self._backwards = n, tested, False, None, 0

    def returned(self, output: Any) -> None:
        """The model has returned."""
        tensors = [t for t in _tensors(output) if t.requires_grad]
        self._outputs = Outputs.of(tensors)
        self._own = [place for place, t in enumerate(self._outputs.tensors) if t.dim() == 0]

    def forget(self) -> None:
        """The pass is over: let go of its graph."""
        self._outputs = None

    def scalar(self, loss: Tensor) -> None:
        """Before a backward from ``loss``: refuse what does not keep the examples apart.

        Raises:
            IsolationError: as it says.
        """
        outputs, n = self._outputs, self._n
        if outputs is None:
            return
        if n == 0:
            self.examined = True
            return
        if loss.numel() != 1 and outputs.below(loss.grad_fn, loss.output_nr, {}):
            raise IsolationError(f"backward() of a vector with weights cannot be followed: {_REMEDY}.")
        try:
            found = terms(loss, n, outputs)
            weights = sorted(self._weight(term) for term in found)
        except UnknownLoss as error:
            # One example has nobody to meet.
            if n == 1 or (self.vouched and not isinstance(error, MixingLoss)):
                self.examined = True
                return
            raise IsolationError(
                f"It cannot be told that the loss keeps examples apart: {error}. Instead, {_REMEDY}; or let "
                "engine.check_isolation(model, batch, criterion) test it on a batch first.") from error
        if not found:
            return
        self._check_constant(weights)
        if self.tested:
            for term in found:
                if term.joined is not None:
                    self._check_apart(term.joined, outputs)
        self.examined = True

    def vector(self, losses: Tensor, n: int) -> None:
        """Before the backward of per-example losses: refuse what does not keep the examples apart.

        Raises:
            IsolationError: an entry depends on another example's outputs, or all were divided by a number of the batch.
            ValueError: the losses do not come from what the model returned.
        """
        outputs = self._outputs
        if outputs is None or losses.grad_fn is None or not outputs.below(losses.grad_fn, losses.output_nr, {}):
            raise ValueError(
                "The losses do not depend on what the model returned in its last training forward: compute them from "
                "its outputs, with gradients.")
        if n > 1:
            factor = scalar_factor(losses, outputs)
            if self._scalar is not None and not math.isclose(factor, self._scalar, rel_tol=_RELATIVE):
                raise IsolationError(
                    f"All losses of this batch are multiplied by {factor:.6g}, those of an earlier one by "
                    f"{self._scalar:.6g}: do not divide by what a batch holds; give a public schedule as "
                    "optimizer.backward(losses, weight=…).")
            if math.isclose(factor * n, 1, rel_tol=_RELATIVE):
                raise IsolationError(
                    f"The losses were divided by the number of examples, {n}: hand them over as they are.")
            self._scalar = factor
            if self.tested:
                self._check_apart(GradientEdge(losses.grad_fn, losses.output_nr), outputs)
        self.examined = True

    def _weight(self, term: Term) -> float:
        n = self._n
        if term.kind == "own" and self._own.index(term.own) not in self.proven:
            raise MixingLoss("a number that the model returned, which was not found to be a mean or sum over examples")
        value = weight(term, n, self.reduction)
        if not is_plain(term, value, n, self.reduction):
            raise MixingLoss(
                f"it is a {term.reduction} of {term.elements} numbers times {term.factor:.6g} in a batch of {n} "
                f"examples, but was declared a {self.reduction} over the examples (make_private's loss_reduction)")
        return value

    def _check_constant(self, weights: list[float]) -> None:
        place, self._backwards = self._backwards, self._backwards + 1
        if place >= len(self._weights):
            if self._n > 1:
                self._weights.append(weights)
            return
        before = self._weights[place]
        if len(before) != len(weights) or not all(
                math.isclose(a, b, rel_tol=_RELATIVE) for a, b in zip(before, weights, strict=True)):
            raise IsolationError(
                f"The loss of this batch weighs an example by {_listed(weights)}, that of an earlier one by "
                f"{_listed(before)}: a divisor that counts what a batch holds ties each example to the others; "
                f"{_REMEDY}.")

    def _check_apart(self, joined: GradientEdge, outputs: Outputs) -> None:
        for i in (0, self._n - 1):
            if meets(joined, i, self._n, outputs):
                raise IsolationError(
                    f"The loss mixes examples: that of example {i} depends on the model's outputs for others. Use a "
                    "loss that is a mean or sum of terms of one example each.")


def _listed(weights: Sequence[float]) -> str:
    return " and ".join(f"{value:.6g}" for value in weights)


def _tensors(output: Any) -> list[Tensor]:
    """All tensors in what a model returned, in the order of torch's trees; objects by their attributes."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(dict(output) if isinstance(output, dict) else output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__"):
            found += [value for value in vars(leaf).values() if isinstance(value, Tensor)]
    return found


_watches: "weakref.WeakSet[LossWatch]" = weakref.WeakSet()


_plain_backward = torch.autograd.backward


def _show_backward_to(watch: LossWatch) -> None:
    global _plain_backward
    _watches.add(watch)
    if torch.autograd.backward is not _watched_backward:
        _plain_backward, torch.autograd.backward = torch.autograd.backward, _watched_backward


def backward_unseen(loss: Tensor, *, retain_graph: bool) -> None:
    """A backward from a loss that was examined already."""
    _plain_backward(loss, retain_graph=retain_graph)


def _watched_backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
    """As torch's; losses of private models are examined first."""
    roots = [tensors] if isinstance(tensors, Tensor) else [root for root in tensors if isinstance(root, Tensor)]
    for watch in list(_watches):
        for root in roots:
            watch.scalar(root)
    _plain_backward(tensors, *args, **kwargs)
