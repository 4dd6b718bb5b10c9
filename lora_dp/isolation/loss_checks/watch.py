"""What the loss of every backward may do, for one private model: :mod:`lora_dp.isolation.loss_checks.graph` applied
batch by batch."""

import math
from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import torch._functorch.config as functorch_config
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.weak import WeakIdKeyDictionary

from lora_dp.errors import IsolationError
from lora_dp.isolation.batches.calls import tensors_in
from lora_dp.isolation.loss_checks.backward_calls import show_backward_to
from lora_dp.isolation.loss_checks.gradients import meeting, meets, reaches_padding
from lora_dp.isolation.loss_checks.graph import (
    Followed,
    LossReduction,
    MixingLoss,
    Outputs,
    Term,
    UnknownLoss,
    follow,
    is_constant,
    is_plain,
    leaves_under,
    terms,
    weight,
)
from lora_dp.isolation.loss_checks.own_scales import (
    OwnLosses,
    check_outside,
    equal,
    listed,
    numbers_outside,
    own_factors,
    summed_up,
)

_REMEDY = (
    "hand the losses of the single examples, (N,), to optimizer.backward (lora_dp.losses has them), or their mean to "
    "accelerator.backward"
)
_RELATIVE = 1e-5
_ELSEWHERE = (
    "The losses do not depend on what the model returned in its last training forward: compute them from its "
    "outputs, with gradients."
)
# Losses of outputs that hold no more numbers are looked through in every batch, others in those that are tried.
_FEW_NUMBERS = 2**17


class _Seen(NamedTuple):
    """What a loss of one shape was like in an earlier batch."""

    n: int
    weights: tuple[float, ...]
    factors: tuple[float, ...]
    numbers: tuple[tuple[str, float], ...]


class LossWatch:
    """Follows the losses of one model.

    Attributes:
        reduction: how a scalar loss is declared to join the examples.
        tested: whether examples that meet in the loss are looked for in this pass.
        examined: whether a loss of this pass was seen and found right.
        proven: which of the single numbers that the model returns are losses that keep examples apart.
        vouched: shapes of graphs of criteria that have passed the isolation check.
        used: (N, T) bool, False at padding, in batches that are padded to different widths.
        steps: how many releases there were.
        followed: whether a loss that is differentiated comes from this model; ``after_backward`` is called when that
            has ended.
    """

    def __init__(self) -> None:
        self.reduction: LossReduction = "mean"
        self.tested = self.examined = False
        self.vouched: set[int] = set()
        self.used: Tensor | None = None
        self.steps = 0
        self.followed = False
        self.after_backward: Callable[[], None] = lambda: None
        self._n = 0
        self._taken: set[LossReduction] = set()
        self._looks = self._per_example = True
        self._outputs: Outputs | None = None
        self._own: list[int] = []
        self._leaves: Callable[[], set[int]] = set
        # After how many steps leaves came that look like values of examples.
        self._of_examples: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._doubted: int | None = None
        self.forget_batches()
        show_backward_to(self)
        # Losses are gone back through before their own backward: compiled ones have to keep their buffers for it.
        functorch_config.donated_buffer = False

    def forget_batches(self) -> None:
        """Forget the losses of earlier batches."""
        self.proven: frozenset[int] = frozenset()
        self._seen: dict[int, _Seen] = {}
        self._own_losses = OwnLosses()
        # By kinds of operations, what weighed an example first; and, by their number too, the products along the ways
        # to the outputs.
        self._weights: dict[frozenset[str], tuple[float, ...]] = {}
        self._products: dict[tuple[frozenset[str], int], tuple[float, ...]] = {}

    @property
    def waiting(self) -> bool:
        """Whether the model has returned, and its pass is not over."""
        return self._outputs is not None

    def begin(self, n: int, tested: bool, leaves: Callable[[], set[int]], *, looks: bool, per_example: bool) -> None:
        """A pass over ``n`` examples begins; ``leaves`` tells the ids of those that take its gradients, ``looks``
        whether gradients may be read (not while a graph is captured), ``per_example`` whether examples must be kept
        apart: else no loss is followed."""
        self._n, self.tested, self.examined, self._outputs, self._leaves = n, tested, not per_example, None, leaves
        self._taken, self._looks, self._per_example = set(), looks, per_example

    def returned(self, output: Any) -> None:
        """The model has returned."""
        if not self._per_example:
            return
        tensors = [t for t in tensors_in(output) if t.requires_grad]
        self._outputs = Outputs.of(tensors)
        self._own = [place for place, t in enumerate(self._outputs.tensors) if t.dim() == 0]

    def forget(self) -> None:
        """The pass is over: let go of its graph."""
        self._outputs, self._leaves = None, set

    def scalar(self, loss: Tensor, gradient: Tensor | None = None) -> None:
        """Before a backward from ``loss``, with this gradient: refuse what does not keep the examples apart.

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
        if followed.factors:
            self.followed = True
            if loss.numel() != 1:
                raise IsolationError(f"backward() of a vector with weights cannot be followed: {_REMEDY}.")
            self._take(self.reduction)
            if gradient is not None:
                raise IsolationError(
                    "backward(gradient=…) multiplies the gradients of all examples by what cannot be followed: a "
                    "public schedule is optimizer.backward(losses, weight=…)."
                )
        before, numbers = self._seen.get(followed.shape), numbers_outside(loss, outputs)
        try:
            found = terms(loss, n, outputs)
            values = [self._weight(term, before) for term in found]
        except UnknownLoss as error:
            # One example has nobody to meet.
            if not isinstance(error, MixingLoss) and (n == 1 or followed.shape in self.vouched):
                self._check_own(followed, outputs, summed_up(loss, outputs))
                self._compare(before, followed, (), followed.factors, numbers)
                self._remember(followed, (), followed.factors, numbers)
                return
            raise IsolationError(
                f"It cannot be told that the loss keeps examples apart: {error}. Instead, {_REMEDY}; or let "
                "engine.check_isolation(model, batch, criterion) test it on a batch first."
            ) from error
        if not found:
            return
        joined = [term.joined for term in found if term.joined is not None]
        # Below what joins them: a division by N above it is in the weights.
        inside = follow([(edge.node, edge.output_nr) for edge in joined], outputs)
        self._check_inside(inside, outputs)
        own = summed_up(loss, outputs)
        self._check_own(inside, outputs, own)
        if before is None:
            self._check_linear(inside.linear)
            self._check_counts(_products(inside, outputs, own) if n > 1 else [])
        weights = tuple(sorted(values))
        self._compare(before, followed, weights, inside.factors, numbers)
        for edge in joined:
            self._check_apart(edge, outputs, before)
        self._check_paired(inside, before, vouched=followed.shape in self.vouched)
        self._remember(followed, weights, inside.factors, numbers)

    def vector(self, losses: Tensor, n: int) -> None:
        """Before the backward of per-example losses: refuse what does not keep the examples apart.

        Raises:
            IsolationError: an entry depends on another example's outputs, or all were divided by a number of the batch.
            ValueError: the losses do not come from what the model returned.
        """
        outputs = self._outputs
        if not self._per_example:
            return
        if outputs is None or losses.grad_fn is None:
            raise ValueError(_ELSEWHERE)
        followed = follow([(losses.grad_fn, losses.output_nr)], outputs)
        if not followed.factors:
            raise ValueError(_ELSEWHERE)
        self._take("sum")
        self._check_way(followed)
        self._check_inside(followed, outputs)
        before, numbers = self._seen.get(followed.shape), numbers_outside(losses, outputs)
        # Those that the model computed itself are followed into it.
        own = summed_up(losses, outputs) | {place for place, t in enumerate(outputs.tensors) if t.dim() == 1}
        weights = tuple(sorted((*followed.linear, *_products(followed, outputs, own))))
        self._compare(before, followed, weights, followed.factors, numbers)
        self._check_own(followed, outputs, own)
        if before is None:
            self._check_counts(weights)
        self._check_apart(GradientEdge(losses.grad_fn, losses.output_nr), outputs, before)
        self._check_paired(followed, before, vouched=followed.shape in self.vouched)
        self._remember(followed, weights, followed.factors, numbers)

    def shape_of(self, loss: Tensor, output: Any) -> int:
        """What names the graph of a loss that was computed from a model's output."""
        edge = [] if loss.grad_fn is None else [(loss.grad_fn, loss.output_nr)]
        return follow(edge, Outputs.of([t for t in tensors_in(output) if t.requires_grad])).shape

    def _take(self, kind: LossReduction) -> None:
        """Losses of single examples are summed up: a mean beside them would keep its 1/N."""
        self._taken.add(kind)
        if len(self._taken) > 1 and self._n > 1:
            raise IsolationError(
                "Two losses of one pass were joined otherwise, one by optimizer.backward and one by its own mean: add "
                "them up, example by example, and hand them to optimizer.backward once."
            )

    def _weight(self, term: Term, before: _Seen | None) -> float:
        n = self._n
        if term.kind == "own" and n > 1:
            place = self._own.index(term.own) if term.own in self._own else -1
            if place not in self.proven:
                raise MixingLoss(
                    "a number that the model returned, which was not found to be a mean or sum over examples"
                )
            loss = self._outputs.tensors[term.own]  # type: ignore[union-attr]
            self._own_losses.check_weights(place, loss, n, self.reduction)
            self._own_losses.check_numbers(term.own, loss, n)
        value = weight(term, n, self.reduction)
        if before is None and not is_plain(term, value, n, self.reduction):
            raise MixingLoss(
                f"it is a {term.reduction} of {term.elements} numbers times {term.factor:.6g} in a batch of {n} "
                f"examples, but was declared a {self.reduction} over the examples (make_private's loss_reduction)"
            )
        return value

    def _check_own(self, inside: Followed, outputs: Outputs, own: Container[int]) -> None:
        """By what the model multiplies and bounds losses that it returns before anything joins them. One number for
        each example is held to it whatever is done to it."""
        for place in sorted(inside.reached):
            returned = outputs.tensors[place]
            if returned.dim() and (place in own or returned.dim() == 1 or returned.numel() == self._n):
                try:
                    self._own_losses.check_numbers(place, returned, self._n)
                except MixingLoss as error:
                    raise IsolationError(f"Losses that do not keep examples apart: {error}.") from error

    def _check_way(self, followed: Followed) -> None:
        if not self._leaves().isdisjoint(followed.leaves):
            raise IsolationError(
                "A part of the loss comes to private layers beside what the model returned (by an attribute or a "
                "hook's features, say), where it cannot be followed: return it from forward."
            )
        # A loss that does not come from this model is none of its business.
        for leaf in followed.leaves.values() if followed.factors else ():
            if self._may_be_trained(leaf, self._n):
                raise IsolationError(
                    f"The loss depends on a tensor {tuple(leaf.shape)} that requires a gradient beside the model's "
                    "outputs: nothing clips or noises what trains it. Make it part of the model, as a private layer, "
                    "or detach it; a penalty on weights is the optimizer's weight_decay."
                )

    def trained_before(self, tensor: Tensor, n: int) -> bool:
        """Whether a gradient that comes to an argument of the next pass, over ``n`` examples, may train something."""
        if not tensor.requires_grad:
            return False
        found = [tensor] if tensor.grad_fn is None else leaves_under([tensor])
        return any(self._may_be_trained(leaf, n) for leaf in found)

    def strangers(self, allowed: Container[int]) -> list[Tensor]:
        """Leaves that the model's outputs lead to, but for these ids and for values of examples."""
        assert self._outputs is not None
        leaves = [leaf for leaf in leaves_under(self._outputs.tensors) if id(leaf) not in allowed]
        found = [leaf for leaf in leaves if self._may_be_trained(leaf, self._n)]
        again = any(leaf in self._of_examples for leaf in leaves) and self._doubted in (None, self.steps)
        self._doubted = self.steps if again else None
        return found

    @property
    def doubts(self) -> bool:
        """Whether to look for strangers in this pass, the first after a step: those that hold values of examples do not
        come again."""
        return self._doubted is not None and self._doubted != self.steps

    def _may_be_trained(self, leaf: Tensor, n: int) -> bool:
        """Whether this leaf may be trained by its gradient: not if it holds values of a batch's examples, which nobody
        made. Those do not come again after a step."""
        if not leaf.requires_grad:
            return False
        if leaf.dim() == 0 or leaf.shape[0] % max(n, 1) or isinstance(leaf, nn.Parameter):
            return True
        return bool(self._of_examples.setdefault(leaf, self.steps) != self.steps)

    def _check_counts(self, factors: Sequence[float]) -> None:
        n = self._n
        if n > 1 and any(math.isclose(abs(factor) * n, 1, rel_tol=_RELATIVE) for factor in factors):
            raise IsolationError(
                f"The losses were divided by the number of examples, {n}: hand them over as they are, with a "
                "constant as optimizer.backward(losses, weight=…)."
            )
        self._check_linear(factors)

    def _check_linear(self, factors: Sequence[float]) -> None:
        for factor in factors:
            if not is_constant(factor):
                raise IsolationError(
                    f"Losses were multiplied by {factor:.6g}, which looks like a count of what the batch holds: hand "
                    "them over as they are, with a constant as optimizer.backward(losses, weight=…)."
                )

    def _check_inside(self, inside: Followed, outputs: Outputs) -> None:
        """What lies between the examples' losses and the outputs: all of it must be known to keep to one example."""
        if inside.opaque and inside.shape not in self.vouched:
            if "PrivateLayer" in inside.opaque:
                raise IsolationError(
                    "The losses depend on another forward pass of the model, or on values within it that it does not "
                    "return: join several views of an example into one forward pass, and return what the losses need."
                )
            raise IsolationError(
                "It cannot be told that the losses keep examples apart: no graph shows what "
                f"{inside.opaque[0]!r} does, a compiled function or one of Python's. Let "
                "engine.check_isolation(model, batch, criterion) test it on a batch first."
            )
        for place in inside.reached if self._n > 1 else ():
            shape = tuple(outputs.tensors[place].shape)
            if not shape or shape[0] % self._n:
                raise IsolationError(
                    f"The losses depend on an output of the model that is not by example, {shape} in a batch of "
                    f"{self._n}: it may hold a statistic of the batch. Return rows of one example each, batch first."
                )

    def _check_paired(self, inside: Followed, before: _Seen | None, *, vouched: bool) -> None:
        """Predictions (N, 1) and targets (N,) are broadcast to (N, N): each prediction meets all examples' targets. So
        it does in a product with the keys of all examples, or where all examples' labels are looked up in it."""
        n = self._n
        if n == 1 or (before is not None and before.n not in (1, n)):
            return  # of other batches the graph is the same, so that a dimension of N here is another's by chance
        for given, made, met in inside.grown:
            if made.count(n) > given.count(n) and not (met and vouched):
                raise IsolationError(
                    f"The losses pair each example with all others: {given} became {made} in a batch of {n}, as where "
                    "predictions (N, 1) meet targets (N,), or the keys of all examples. Bring both to one shape, by "
                    "squeeze(1) or lora_dp.losses.regression_loss. Where there are as many classes by chance, let "
                    "engine.check_isolation(model, batch, criterion) test it first."
                )

    def _compare(
        self,
        before: _Seen | None,
        followed: Followed,
        weights: tuple[float, ...],
        factors: tuple[float, ...],
        numbers: tuple[tuple[str, float], ...],
    ) -> None:
        """With earlier batches: no number may have followed what the batch holds."""
        if before is not None:
            for now, then in ((weights, before.weights), (factors, before.factors)):
                if not equal(now, then):
                    raise IsolationError(_differs(now, then))
            if self._n > 1 and before.n > 1:  # else an example's own
                check_outside(numbers, before.numbers)
        if self._n < 2 or not weights:
            return
        # A loop over the examples has another graph for every batch.
        first = self._weights.get(followed.kinds)
        if first is not None and not equal(_distinct(weights), first):
            raise IsolationError(_differs(_distinct(weights), first))
        others = self._products.get((followed.kinds, len(factors)))
        if others is not None and not equal(factors, others) and _in_one_ratio(factors, others):
            raise IsolationError(_differs(factors, others))

    def _remember(
        self,
        followed: Followed,
        weights: tuple[float, ...],
        factors: tuple[float, ...],
        numbers: tuple[tuple[str, float], ...],
    ) -> None:
        """A loss that passed. The first one stays what others are compared with; of one example it proves least."""
        if followed.shape not in self._seen or self._seen[followed.shape].n == 1:
            self._seen[followed.shape] = _Seen(self._n, weights, factors, numbers)
        if self._n > 1 and weights:
            self._weights.setdefault(followed.kinds, _distinct(weights))
            self._products.setdefault((followed.kinds, len(factors)), factors)
        self.examined = True

    def _check_apart(self, joined: GradientEdge, outputs: Outputs, before: _Seen | None) -> None:
        n, tried = self._n, self.tested or before is None or before.n == 1
        if not (tried or self._looks and sum(t.numel() for t in outputs.tensors) <= _FEW_NUMBERS):
            return
        # What is mixed by its place is mostly mixed at an end; the other search finds it anywhere.
        found = next((i for i in (0, n - 1) if meets(joined, i, n, outputs)), None) if tried and n > 1 else None
        if found is None and n > 1:
            found = meeting(joined, n, outputs)
        if found is not None:
            raise IsolationError(
                f"The loss mixes examples: that of example {found} depends on the model's outputs for others. Use a "
                "loss that is a mean or sum of terms of one example each."
            )
        if self.used is not None and reaches_padding(joined, self.used, outputs):
            raise IsolationError(
                "The losses depend on the model's outputs at padding, so on the longest example of the batch: leave "
                "padded tokens out by the attention mask (lora_dp.losses does), or pad all to one public width."
            )


def _products(inside: Followed, outputs: Outputs, own: Container[int]) -> list[float]:
    """By what the model multiplied those of its outputs that are its own losses in the end."""
    return [
        factor
        for place in inside.reached
        if place in own and outputs.tensors[place].dim()
        for factor in own_factors(outputs.tensors[place])
    ]


def _in_one_ratio(now: Sequence[float], then: Sequence[float]) -> bool:
    """Whether one number makes the first out of the second."""
    return all(math.isclose(a * then[0], b * now[0], rel_tol=_RELATIVE) for a, b in zip(now, then, strict=True))


def _distinct(values: Sequence[float]) -> tuple[float, ...]:
    """Of numbers in order."""
    return tuple(dict.fromkeys(float(f"{value:.6g}") for value in values))


def _differs(now: Sequence[float], then: Sequence[float]) -> str:
    return (
        f"The loss of this batch weighs an example by {listed(now)}, that of an earlier one by {listed(then)}: a "
        f"divisor that counts what a batch holds ties each example to the others; {_REMEDY}. A public schedule is "
        "optimizer.backward(losses, weight=…)."
    )
