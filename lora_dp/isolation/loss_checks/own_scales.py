"""Losses that a model computes itself: by which numbers it multiplies, divides and bounds them, read off their graph;
and by which others are bounded outside of it.

A number that follows what the batch holds ties each example to the others, and no trial of the model need show it: a
loop may set it on the model. What is the same in every batch is taken for a constant.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from lora_dp.errors import IsolationError
from lora_dp.isolation.loss_checks.graph import (
    LossReduction,
    MixingLoss,
    Outputs,
    Saved,
    UnknownLoss,
    kind_of,
    linear_factors,
    shares,
    terms,
)

_RELATIVE = 1e-5
# Where the numbers of the losses begin: deeper, a model may have gone on from what a checkpoint computes again.
_LAYERS = ("Mm", "Addmm", "Bmm", "Baddbmm", "Addbmm", "Linear", "Convolution", "Embedding", "NativeLayerNorm")
# Under these names torch's nodes keep the numbers of their operation; others are sizes, places and dimensions.
_NAMES = (
    "alpha",
    "beta",
    "delta",
    "eps",
    "exponent",
    "input_scale",
    "lambd",
    "lower",
    "margin",
    "max",
    "max_val",
    "min",
    "min_val",
    "negative_slope",
    "other",
    "pos_weight",
    "scale",
    "self",
    "tensor1",
    "tensor2",
    "threshold",
    "upper",
    "value",
    "weight",
)
_UNPACKED = {
    ("ClampBackward", "min"),
    ("ClampBackward", "max"),
    ("ClampMinBackward", "min"),
    ("ClampMaxBackward", "max"),
    ("PowBackward", "exponent"),
    ("LerpBackward", "weight"),
}
_MULTIPLIED = ("MulBackward", "DivBackward")
_MULTIPLIERS = {
    "Add's alpha",
    "Sub's alpha",
    "Rsub's alpha",
    "Addcmul's value",
    "Addcdiv's value",
    "Lerp's weight",
    "Mul's other",
    "Div's other",
}
# Beyond these a place is told by nothing in the graph.
_MOVED = ("FlipBackward", "RollBackward", "IndexBackward", "IndexSelectBackward", "GatherBackward")
# What numbers go through that are summed up in the end, each by itself.
_SUMMED = frozenset(
    {
        "Add",
        "Addcmul",
        "Alias",
        "Bmm",
        "Cat",
        "Clamp",
        "ClampMax",
        "ClampMin",
        "Clone",
        "Div",
        "Dot",
        "Expand",
        "Gather",
        "Index",
        "IndexSelect",
        "Lerp",
        "MaskedFill",
        "MaskedSelect",
        "Mean",
        "Mm",
        "Mul",
        "Mv",
        "NanToNum",
        "Nansum",
        "Neg",
        "Permute",
        "ReshapeAlias",
        "Rsub",
        "Select",
        "Slice",
        "Split",
        "Squeeze",
        "Stack",
        "Sub",
        "Sum",
        "T",
        "ToCopy",
        "Transpose",
        "Unbind",
        "UnsafeView",
        "Unsqueeze",
        "View",
        "Where",
    }
)


class _Everything(Outputs):
    """Of a graph that is looked at down to its leaves, the labels that it counts included."""

    counts = True

    def below(self, node: Node | None, number: int, known: dict[Node, bool]) -> bool:
        return node is not None


_EVERYTHING = _Everything((), {})


class OwnNumbers(NamedTuple):
    """The single numbers on the way from a model's last layer to its losses.

    Attributes:
        scales: by which the losses are multiplied, in the order in which they are added up: first those that have no
            other below them, then those that have one, and so on.
        bounds: by the names of operations, their other numbers: bounds, exponents, widths; in ascending order.
        steps: for each scale, the places along a dimension from which come the numbers that it multiplies, None where
            that is not known.
    """

    scales: tuple[tuple[float, ...], ...]
    bounds: Mapping[str, tuple[float, ...]]
    steps: Mapping[float, frozenset[int | None]]

    @property
    def all_scales(self) -> tuple[float, ...]:
        """In ascending order."""
        return tuple(sorted({value for level in self.scales for value in level}))


class OwnLosses:
    """What the model's own losses, by their places among its outputs, were like in the first batch that had several
    examples."""

    def __init__(self) -> None:
        self._counts: dict[int, tuple[float, ...]] = {}
        self._numbers: dict[int, OwnNumbers] = {}

    def check_weights(self, place: int, loss: Tensor, n: int, claimed: LossReduction) -> None:
        """Of a scalar: nothing by which it divides may follow what the batch holds.

        Raises:
            MixingLoss: it was otherwise in an earlier batch.
        """
        now = own_weights(loss, n, claimed)
        then = self._counts.setdefault(place, now)
        if not equal(now, then):
            raise MixingLoss(
                f"the model weighs each number of its own loss by {listed(now)} in this batch, by {listed(then)} in "
                "an earlier one: some labels are ignored or weighted, and all share the divisor"
            )

    def check_numbers(self, place: int, losses: Tensor, n: int) -> None:
        """Before anything joins them: no number may follow what the batch holds. One example has nobody to meet.

        Raises:
            MixingLoss: it was otherwise in an earlier batch.
        """
        if n < 2:
            return
        now = own_numbers(losses, n)
        then = self._numbers.setdefault(place, now)
        if not equal(now.all_scales, then.all_scales) and not _goes_on(now, then) and not _goes_on(then, now):
            raise MixingLoss(
                f"the model multiplies the losses that it computes itself by {listed(now.all_scales)} in this batch, "
                f"by {listed(then.all_scales)} in an earlier one: {_TIED}"
            )
        for name, values in now.bounds.items():
            if not equal(values, earlier := then.bounds.get(name, values)):
                raise MixingLoss(
                    f"the model bounds or bends the losses that it computes itself by {listed(values)} in this batch "
                    f"({name}), by {listed(earlier)} in an earlier one: {_TIED}"
                )
        self._numbers[place] = then._replace(bounds={**now.bounds, **then.bounds})


_TIED = "a number that follows what the batch holds ties each example to the others"


def own_weights(loss: Tensor, n: int, claimed: LossReduction) -> tuple[float, ...]:
    """By what a loss that the model computed itself multiplies its numbers, beyond what is claimed; one for each term.

    A mean over labels that are not ignored, or weighted by classes, divides by what was counted. That is taken as long
    as it is the same in every batch, for each of its examples.

    Raises:
        UnknownLoss: it is no sum of constants times means and sums over numbers.
    """
    scale = n if claimed == "mean" else 1
    return tuple(
        sorted(
            term.factor * scale / (term.elements if term.reduction == "mean" else 1)
            for term in terms(loss, n, _EVERYTHING)
        )
    )


def own_factors(losses: Tensor) -> tuple[float, ...]:
    """By which single numbers losses that the model computed itself, not joined, were multiplied in the end."""
    return () if losses.grad_fn is None else tuple(linear_factors((losses.grad_fn, losses.output_nr), _EVERYTHING))


def own_numbers(loss: Tensor, n: int) -> OwnNumbers:
    """By which single numbers losses of ``n`` examples that the model computed itself are multiplied and bounded on
    their way from its last matrix product or private layer to ``loss``, a scalar or several numbers for each example.

    The numbers above a scalar's join are :func:`own_weights`. Not followed is what carries one number alone: of one
    example, as in a loop, it may be multiplied by what is that example's own.

    Raises:
        UnknownLoss: a scalar that is no sum of constants times means and sums over numbers.
    """
    if loss.grad_fn is None:
        return OwnNumbers((), {}, {})
    joins = [] if loss.dim() else terms(loss, n, _EVERYTHING)
    edges = (
        [(loss.grad_fn, loss.output_nr)]
        if loss.dim()
        else [(term.joined.node, term.joined.output_nr) for term in joins if term.joined is not None]
    )
    order = _ordered(edges, _carries_on)
    levels: dict[Node, int] = {}  # how many scales follow one another below a node
    scales: list[dict[float, None]] = []
    bounds: dict[str, set[float]] = {}
    places: dict[Node, frozenset[int | None]] = {}
    steps: dict[float, frozenset[int | None]] = {}
    for node in [*order, *(term.at for term in joins if term.at is not None)]:
        level = levels[node] = max((levels.get(child, 0) for child, _ in node.next_functions if child), default=0)
        places[node] = _places(node, places)
        for name, value in _numbers(node):
            value = float(f"{value:.6g}")
            if name not in _MULTIPLIERS:
                bounds.setdefault(name, set()).add(value)
                continue
            levels[node] = level + 1
            scales += [{} for _ in range(level + 1 - len(scales))]
            scales[level][value] = None
            steps[value] = steps.get(value, frozenset()) | places[node]
    return OwnNumbers(tuple(map(tuple, scales)), {name: tuple(sorted(found)) for name, found in bounds.items()}, steps)


def _places(node: Node, below: Mapping[Node, frozenset[int | None]]) -> frozenset[int | None]:
    """Which places along a dimension the numbers of this node come from, None for one that is not known."""
    found: frozenset[int | None] = frozenset().union(
        *(below.get(child, frozenset()) for child, _ in node.next_functions if child)
    )
    kind = kind_of(node)
    if kind in _MOVED:
        return found | {None}
    if kind == "SelectBackward":
        index = Saved(node).get("index")
        return found | {index if index < sys.maxsize else None}  # one from the end is kept as an unsigned number
    return found | {number for child, number in node.next_functions if child and kind_of(child) == "UnbindBackward"}


def numbers_outside(root: Tensor, outputs: Outputs) -> tuple[tuple[str, float], ...]:
    """The single numbers of the operations between the model's outputs and a loss, but for plain factors and divisors:
    these are followed through sums and means."""
    assert root.grad_fn is not None
    known: dict[Node, bool] = {}

    def leads_on(node: Node, number: int) -> bool:
        return (node, number) not in outputs.places and outputs.below(node, number, known)

    order = _ordered([(root.grad_fn, root.output_nr)], leads_on)
    return tuple(found for node in order for found in _numbers(node, factors=False))


def check_outside(now: Sequence[tuple[str, float]], then: Sequence[tuple[str, float]]) -> None:
    """What :func:`numbers_outside` found for the same operations in two batches.

    Raises:
        IsolationError: they are not the same.
    """
    if [name for name, _ in now] == [name for name, _ in then] and equal(
        [value for _, value in now], [value for _, value in then]
    ):
        return
    told, before = (
        " and ".join(f"{value:.6g} ({name})" for name, value in found if (name, value) not in other) or "nothing"
        for found, other in ((now, then), (then, now))
    )
    raise IsolationError(
        f"The loss of this batch is bounded or bent by {told}, that of an earlier one by {before}: {_TIED}."
    )


def summed_up(root: Tensor, outputs: Outputs) -> frozenset[int]:
    """Which of the model's outputs are losses by what is done to them: on some way to ``root`` they are only chosen,
    weighed and added up. What a criterion takes, logits say, is none."""
    assert root.grad_fn is not None
    pending, seen, found = [(root.grad_fn, root.output_nr)], set(), set()
    while pending:
        edge = pending.pop()
        if edge in seen:
            continue
        seen.add(edge)
        if edge in outputs.places:
            found.add(outputs.places[edge])
        elif kind_of(edge[0]).removesuffix("Backward") in _SUMMED:
            pending += [(child, number) for child, number in edge[0].next_functions if child is not None]
    return frozenset(found)


def _ordered(edges: Sequence[tuple[Node, int]], goes_on: Callable[[Node, int], bool]) -> list[Node]:
    """The nodes from these edges down as far as it goes on, children first and the first of them foremost."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack = [node for node, number in edges if goes_on(node, number)]
    while stack:
        node = stack[-1]
        open_ = (
            []
            if node in seen
            else [
                child
                for child, number in node.next_functions
                if child is not None and child not in seen and goes_on(child, number)
            ]
        )
        if open_:
            stack += reversed(open_)
            continue
        stack.pop()
        if node not in seen:
            seen.add(node)
            order.append(node)
    return order


def _carries_on(node: Node, number: int) -> bool:
    kind = kind_of(node).removesuffix("Backward")
    layer = isinstance(node, BackwardCFunction) or kind in _LAYERS or kind.startswith("ScaledDotProduct")
    return not layer and math.prod(node._input_metadata[number].shape) != 1


def _numbers(node: Node, factors: bool = True) -> Iterator[tuple[str, float]]:
    """The single numbers of an operation, each under its name; plain ``factors`` and divisors among them or not."""
    kind = kind_of(node)
    children = [(child, number) for child, number in node.next_functions if child is not None]
    multiplied = kind in _MULTIPLIED and len(children) == 1
    if multiplied and factors:
        with contextlib.suppress(UnknownLoss):  # by a vector
            yield f"{kind.removesuffix('Backward')}'s other", shares(node, children)[0]
    if multiplied and kind == "MulBackward":
        return
    for name in _kept_by(type(node)):
        value = None if multiplied and name == "other" else _number(node, name, children)
        named = f"{kind.removesuffix('Backward')}'s {name}"
        if value is not None and (value != 1 or named not in _MULTIPLIERS):
            yield named, value


_kept: dict[type, tuple[str, ...]] = {}


def _kept_by(kind: type) -> tuple[str, ...]:
    if kind not in _kept:
        _kept[kind] = tuple(name for name in _NAMES if hasattr(kind, f"_saved_{name}"))
    return _kept[kind]


def _number(node: Node, name: str, children: Sequence[tuple[Node, int]]) -> float | None:
    """What a node has kept under this name, if that is one number for all and nothing that is trained."""
    with contextlib.suppress(UnknownLoss, RuntimeError):  # used up, or written to since: its backward will say so
        raw = getattr(node, f"_raw_saved_{name}", None)
        packed = None if raw is None else raw.data
        if isinstance(packed, Tensor) and packed.numel() != 1:
            return None
        if packed is not None and not isinstance(packed, Tensor) and (kind_of(node), name) not in _UNPACKED:
            return None  # by a hook: a checkpoint would compute all of it again
        value: Any = Saved(node).get(name)
        if isinstance(value, Tensor):
            given = {tuple(child._input_metadata[number].shape) for child, number in children}
            if value.numel() != 1 or value.requires_grad or (value.dim() and tuple(value.shape) in given):
                return None
            value = float(value)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    return None


def _goes_on(longer: OwnNumbers, shorter: OwnNumbers) -> bool:
    """Whether the longer numbers are the shorter ones, with more of a geometric series that these begin: discounts over
    more steps, each of which is added up with the others. A step keeps the discount that it had."""

    def series(more: Sequence[float], fewer: Sequence[float]) -> bool:
        return _is_longer_series(more, fewer) and (
            len(more) == len(fewer)
            or all(
                len(longer.steps[value]) == 1
                and None not in longer.steps[value]
                and shorter.steps.get(value) == longer.steps[value]
                for value in more[: _alike(more, fewer)]
            )
        )

    return len(longer.scales) == len(shorter.scales) and all(map(series, longer.scales, shorter.scales))


def _alike(now: Sequence[float], then: Sequence[float]) -> int:
    """How many of these numbers are the same from the first one on."""
    return next(
        (place for place, (a, b) in enumerate(zip(now, then, strict=False)) if not equal([a], [b])),
        min(len(now), len(then)),
    )


def _is_longer_series(longer: Sequence[float], shorter: Sequence[float]) -> bool:
    more = len(longer) - len(shorter)
    kept = _alike(longer, shorter)
    if more <= 0:
        return equal(longer, shorter)
    return (
        kept > 1
        and equal(longer[kept + more :], shorter[kept:])
        and all(
            math.isclose(longer[place] * longer[kept - 2], longer[place - 1] * longer[kept - 1], rel_tol=_RELATIVE)
            for place in range(kept, kept + more)
        )
    )


def equal(now: Sequence[float], then: Sequence[float]) -> bool:
    return len(now) == len(then) and all(math.isclose(a, b, rel_tol=_RELATIVE) for a, b in zip(now, then, strict=True))


def listed(weights: Sequence[float]) -> str:
    return " and ".join(f"{value:.6g}" for value in weights) or "nothing"
