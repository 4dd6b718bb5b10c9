"""What the loss of every backward may do, for one private model: :mod:`lora_dp.loss_graph` applied batch by batch.

Calls of ``backward`` are seen at ``torch.autograd.backward``, through which ``Tensor.backward`` goes. A gradient that
reaches a private layer by another way is refused by the step.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lora_dp.batch_parts import tensors_in
from lora_dp.loss_graph import (
    Followed,
    IsolationError,
    LossReduction,
    MixingLoss,
    Outputs,
    Term,
    UnknownLoss,
    follow,
    is_constant,
    is_plain,
    meets,
    own_count,
    terms,
    weight,
)

_REMEDY = "hand the losses of the single examples, (N,), to optimizer.backward (lora_dp.losses has them)"
_RELATIVE = 1e-5
_ELSEWHERE = ("The losses do not depend on what the model returned in its last training forward: compute them from its "
              "outputs, with gradients.")


class _Seen(NamedTuple):
    """What a loss of one shape was like in an earlier batch."""

    n: int
    weights: tuple[float, ...]
    factors: tuple[float, ...]


class LossWatch:
    """Follows the losses of one model.

    Attributes:
        reduction: how a scalar loss is declared to join the examples.
        tested: whether examples that meet in the loss are looked for in this pass.
        examined: whether a loss of this pass was seen and found right.
        proven: which of the single numbers that the model returns are losses that keep examples apart.
        vouched: shapes of graphs of criteria that have passed the isolation check.
    """

    def __init__(self) -> None:
        self.reduction: LossReduction = "mean"
        self.tested = self.examined = False
        self.proven: frozenset[int] = frozenset()
        self.vouched: set[int] = set()
        self._n = 0
        self._outputs: Outputs | None = None
        self._own: list[int] = []
        self._leaves: Callable[[], set[int]] = set
        self._seen: dict[int, _Seen] = {}
        self._counts: dict[int, float] = {}
        _show_backward_to(self)

    def begin(self, n: int, tested: bool, leaves: Callable[[], set[int]] = set) -> None:
        """A pass over ``n`` examples begins; ``leaves`` tells the ids of those that take its gradients."""
        self._n, self.tested, self.examined, self._outputs, self._leaves = n, tested, False, None, leaves

    def returned(self, output: Any) -> None:
        """The model has returned."""
        tensors = [t for t in tensors_in(output) if t.requires_grad]
        self._outputs = Outputs.of(tensors)
        self._own = [place for place, t in enumerate(self._outputs.tensors) if t.dim() == 0]

    def forget(self) -> None:
        """The pass is over: let go of its graph."""
        self._outputs, self._leaves = None, set

    def scalar(self, loss: Tensor) -> None:
        """Before a backward from ``loss``: refuse what does not keep the examples apart.

        Raises:
            IsolationError: as it says.
        """
        outputs, n = self._outputs, self._n
        if outputs is None or loss.grad_fn is None:
            return
        if n == 0:
            self.examined = True
            return
        followed = follow([(loss.grad_fn, loss.output_nr)], outputs)
        self._check_way(followed)
        if loss.numel() != 1 and followed.factors:
            raise IsolationError(f"backward() of a vector with weights cannot be followed: {_REMEDY}.")
        before = self._seen.get(followed.shape)
        try:
            found = terms(loss, n, outputs)
            values = [self._weight(term, before) for term in found]
        except UnknownLoss as error:
            # One example has nobody to meet.
            if not isinstance(error, MixingLoss) and (n == 1 or followed.shape in self.vouched):
                self._compare(before, (), followed.factors)
                self._remember(followed.shape, (), followed.factors)
                return
            raise IsolationError(
                f"It cannot be told that the loss keeps examples apart: {error}. Instead, {_REMEDY}; or let "
                "engine.check_isolation(model, batch, criterion) test it on a batch first.") from error
        if not found:
            return
        joined = [term.joined for term in found if term.joined is not None]
        # Below what joins them: a division by N above it is in the weights.
        inside = follow([(edge.node, edge.output_nr) for edge in joined], outputs)
        if before is None:
            self._check_linear(inside.linear)
        weights = tuple(sorted(values))
        self._compare(before, weights, inside.factors)
        if n > 1 and (self.tested or before is None or before.n == 1):
            for edge in joined:
                self._check_apart(edge, outputs)
        self._remember(followed.shape, weights, inside.factors)

    def vector(self, losses: Tensor, n: int) -> None:
        """Before the backward of per-example losses: refuse what does not keep the examples apart.

        Raises:
            IsolationError: an entry depends on another example's outputs, or all were divided by a number of the batch.
            ValueError: the losses do not come from what the model returned.
        """
        outputs = self._outputs
        if outputs is None or losses.grad_fn is None:
            raise ValueError(_ELSEWHERE)
        followed = follow([(losses.grad_fn, losses.output_nr)], outputs)
        if not followed.factors:
            raise ValueError(_ELSEWHERE)
        self._check_way(followed)
        before = self._seen.get(followed.shape)
        weights = tuple(sorted(followed.linear))
        self._compare(before, weights, followed.factors)
        if before is None:
            if n > 1 and any(math.isclose(abs(factor) * n, 1, rel_tol=_RELATIVE) for factor in followed.linear):
                raise IsolationError(
                    f"The losses were divided by the number of examples, {n}: hand them over as they are, with a "
                    "constant as optimizer.backward(losses, weight=…).")
            self._check_linear(followed.linear)
        if n > 1 and (self.tested or before is None or before.n == 1):
            self._check_apart(GradientEdge(losses.grad_fn, losses.output_nr), outputs)
        self._remember(followed.shape, weights, followed.factors)

    def shape_of(self, loss: Tensor, output: Any) -> int:
        """What names the graph of a loss that was computed from a model's output."""
        edge = [] if loss.grad_fn is None else [(loss.grad_fn, loss.output_nr)]
        return follow(edge, Outputs.of([t for t in tensors_in(output) if t.requires_grad])).shape

    def _weight(self, term: Term, before: _Seen | None) -> float:
        n = self._n
        if term.kind == "own" and n > 1:
            place = self._own.index(term.own)
            if place not in self.proven:
                raise MixingLoss(
                    "a number that the model returned, which was not found to be a mean or sum over examples")
            self._check_counts(place, own_count(term, n, self._outputs))  # type: ignore[arg-type]
        value = weight(term, n, self.reduction)
        if before is None and not is_plain(term, value, n, self.reduction):
            raise MixingLoss(
                f"it is a {term.reduction} of {term.elements} numbers times {term.factor:.6g} in a batch of {n} "
                f"examples, but was declared a {self.reduction} over the examples (make_private's loss_reduction)")
        return value

    def _check_counts(self, place: int, count: float | None) -> None:
        if count is not None and not math.isclose(self._counts.setdefault(place, count), count, rel_tol=_RELATIVE):
            raise MixingLoss(
                f"a mean over {count:.6g} labels of an example in this batch, {self._counts[place]:.6g} in an earlier "
                "one: some are ignored, and all share the divisor")

    def _check_way(self, followed: Followed) -> None:
        if not self._leaves().isdisjoint(followed.leaves):
            raise IsolationError(
                "A part of the loss comes to private layers beside what the model returned (by an attribute or a "
                "hook's features, say), where it cannot be followed: return it from forward.")

    def _check_linear(self, factors: Sequence[float]) -> None:
        for factor in factors:
            if not is_constant(factor):
                raise IsolationError(
                    f"Losses were multiplied by {factor:.6g}, which looks like a count of what the batch holds: hand "
                    "them over as they are, with a constant as optimizer.backward(losses, weight=…).")

    def _compare(self, before: _Seen | None, weights: tuple[float, ...], factors: tuple[float, ...]) -> None:
        """With an earlier batch of the same graph: no number may have followed what the batch holds."""
        if before is not None:
            for now, then in ((weights, before.weights), (factors, before.factors)):
                if not (len(now) == len(then) and all(
                        math.isclose(a, b, rel_tol=_RELATIVE) for a, b in zip(now, then, strict=True))):
                    raise IsolationError(
                        f"The loss of this batch weighs an example by {_listed(now)}, that of an earlier one by "
                        f"{_listed(then)}: a divisor that counts what a batch holds ties each example to the others; "
                        f"{_REMEDY}. A public schedule is optimizer.backward(losses, weight=…).")

    def _remember(self, shape: int, weights: tuple[float, ...], factors: tuple[float, ...]) -> None:
        """A loss that passed. The first one stays what others are compared with; of one example it proves least."""
        if shape not in self._seen or self._seen[shape].n == 1:
            self._seen[shape] = _Seen(self._n, weights, factors)
        self.examined = True

    def _check_apart(self, joined: GradientEdge, outputs: Outputs) -> None:
        for i in (0, self._n - 1):
            if meets(joined, i, self._n, outputs):
                raise IsolationError(
                    f"The loss mixes examples: that of example {i} depends on the model's outputs for others. Use a "
                    "loss that is a mean or sum of terms of one example each.")


def _listed(weights: Sequence[float]) -> str:
    return " and ".join(f"{value:.6g}" for value in weights) or "nothing"


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
    watches = [watch for watch in list(_watches) if watch._outputs is not None]
    # Inside a backward, a reentrant checkpoint goes on with what it has run again.
    if watches and torch._C._current_graph_task_id() == -1:
        roots = [tensors] if isinstance(tensors, Tensor) else [root for root in tensors if isinstance(root, Tensor)]
        for watch in watches:
            for root in roots:
                watch.scalar(root)
    _plain_backward(tensors, *args, **kwargs)
