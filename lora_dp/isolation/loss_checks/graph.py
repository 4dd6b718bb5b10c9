"""How a loss joins the examples of a batch, read off its autograd graph at every backward.

A loss computed outside the model cannot be run again on other examples, but its graph from the model's outputs to the
scalar is at hand. It must be a sum of terms, each a constant times a plain mean or sum over the examples. A mean that
leaves out some (ignored labels), or weighs by what the batch holds, divides each example's gradient by something of
the others, which no clipping bounds. What is not understood is refused, never taken on trust.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

LossReduction = Literal["mean", "sum"]
_MEAN, _SUM = 1, 2  # torch's numbers for the reductions of its losses
# Nodes through which a number passes as it is.
_PASSED = (
    "MeanBackward",
    "SumBackward",
    "ToCopyBackward",
    "CloneBackward",
    "AliasBackward",
    "ViewBackward",
    "UnsafeViewBackward",
    "ReshapeAliasBackward",
    "SqueezeBackward",
    "UnsqueezeBackward",
    "ExpandBackward",
)
_RELATIVE = 1e-6
_LARGEST_PART = 64
_MOST_WAYS = 64


class UnknownLoss(ValueError):
    """The graph does not tell how the loss joins the examples."""


class MixingLoss(UnknownLoss):
    """The graph tells that the loss does not keep the examples apart."""


class Term(NamedTuple):
    """One term of a loss: ``factor`` times the sum of ``elements`` numbers.

    Attributes:
        kind: "outside" for a reduction outside the model, "own" for a scalar that the model returned.
        elements: how many numbers the reduction joins, or counts; 1 for a scalar of the model's.
        reduction: the kind of joining, for a mean divided by ``elements`` already.
        factor: product of the constants by which the term is multiplied.
        joined: where the numbers that are joined come from, to look for examples that meet in them.
        own: which of the model's outputs it is.
        at: the operation that joins.
    """

    kind: Literal["outside", "own"]
    elements: float
    reduction: LossReduction
    factor: float
    joined: GradientEdge | None = None
    own: int = -1
    at: Node | None = None


@dataclass(frozen=True)
class Outputs:
    """The tensors that a model returned, by the nodes of the graph that made them."""

    tensors: tuple[Tensor, ...]
    places: Mapping[tuple[Node, int], int]
    counts: ClassVar[bool] = False

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Outputs":
        kept = tuple(tensor for tensor in tensors if tensor.grad_fn is not None)
        return cls(kept, {(t.grad_fn, t.output_nr): place for place, t in enumerate(kept)})  # type: ignore[misc]

    def below(self, node: Node | None, number: int, known: dict[Node, bool]) -> bool:
        """Whether the graph under this edge contains one of them."""
        if node is None:
            return False
        if (node, number) in self.places:
            return True
        stack = [node]
        while stack:
            top = stack[-1]
            if top in known:
                stack.pop()
                continue
            children = [(n, k) for n, k in top.next_functions if n is not None]
            open_ = [n for n, k in children if (n, k) not in self.places and n not in known]
            if open_:
                stack.extend(open_)
                continue
            known[top] = any((n, k) in self.places or known[n] for n, k in children)
            stack.pop()
        return known[node]


def terms(loss: Tensor, n: int, outputs: Outputs) -> list[Term]:
    """The terms of a scalar loss over ``n`` examples that depend on the model's outputs; empty if none does.

    Raises:
        UnknownLoss: it is no sum of constants times means and sums over numbers.
    """
    known: dict[Node, bool] = {}
    if loss.grad_fn is None or not outputs.below(loss.grad_fn, loss.output_nr, known):
        return []
    return list(_terms(loss.grad_fn, loss.output_nr, 1.0, n, outputs, known))


def _terms(node: Node, number: int, factor: float, n: int, outputs: Outputs, known: dict[Node, bool]) -> Iterator[Term]:
    # A loop over what only passes on, so that long sums of Python's do not exhaust the stack.
    pending = [(node, number, factor)]
    while pending:
        node, number, factor = pending.pop()
        if (place := outputs.places.get((node, number))) is not None:
            if outputs.tensors[place].numel() != 1:
                raise UnknownLoss(_where(node))
            yield Term("own", 1, "sum", factor, own=place)
            continue
        children = [(c, k) for c, k in node.next_functions if c is not None and outputs.below(c, k, known)]
        if (joined := _joined(node, factor, n, children, outputs.counts)) is not None:
            yield joined
        else:
            pending += [(c, k, factor * share) for (c, k), share in zip(children, shares(node, children), strict=True)]


def kind_of(node: Node) -> str:
    return node.name().rpartition("::")[2].rstrip("0123456789")


def _joined(node: Node, factor: float, n: int, children: list[tuple[Node, int]], counts: bool) -> Term | None:
    """The term of a node that joins numbers, None for a node of another kind. ``counts``: what it divides by is taken
    as it is."""
    kind, saved = kind_of(node), Saved(node)
    if kind in ("MeanBackward", "SumBackward"):
        elements = math.prod(saved.get("self_sym_sizes"))
        if (elements == 1 and n > 1) or _stacked(children):
            return None
        if math.prod(node._input_metadata[0].shape) != 1:
            return _unknown(node)
        how: LossReduction = "mean" if kind == "MeanBackward" else "sum"
        return Term("outside", elements, how, factor, GradientEdge(*children[0]), at=node)
    reduction = saved.get("reduction")
    if not isinstance(reduction, int) or reduction not in (_MEAN, _SUM) or len(children) != 1:
        return None
    rows = saved.get("target") if kind.startswith("NllLoss") else saved.get("self")
    if not isinstance(rows, Tensor):
        return _unknown(node)
    if reduction == _MEAN and kind.startswith("NllLoss"):
        if counts:
            return Term("outside", float(saved.get("total_weight")), "mean", factor, at=node)
        if saved.get("weight") is not None:
            raise MixingLoss("a mean weighted by classes, whose divisor is the weight of the batch's labels")
        if float(saved.get("total_weight")) != rows.numel():
            raise MixingLoss("a mean over the labels that are not ignored, whose number is the batch's")
    return Term(
        "outside", rows.numel(), "mean" if reduction == _MEAN else "sum", factor, GradientEdge(*children[0]), at=node
    )


def shares(node: Node, children: list[tuple[Node, int]]) -> list[float]:
    """By what each child's number is multiplied in this node, which must be linear in them."""
    kind, saved = kind_of(node), Saved(node)
    if kind in ("AddBackward", "SubBackward") and _are_numbers(children):
        slots = [place for place, (n, k) in enumerate(node.next_functions) if (n, k) in children]
        sign = -1.0 if kind == "SubBackward" else 1.0
        return [1.0 if place == 0 else sign * saved.get("alpha") for place in slots]
    if kind in ("NegBackward", "RsubBackward"):  # constant − number
        return [-1.0]
    if kind == "StackBackward" and _are_numbers(children):
        return [1.0] * len(children)
    if kind == "MeanBackward" and _stacked(children):
        return [1 / math.prod(saved.get("self_sym_sizes"))]
    if kind in ("MulBackward", "DivBackward") and len(children) == 1 and node.next_functions[0] == children[0]:
        other = saved.get("other")
        value = other if isinstance(other, float | int) else (float(other) if is_number(other, children) else None)
        if value:
            return [value if kind == "MulBackward" else 1 / value]
    if kind == "MulBackward" and len(children) == 1:  # constant · number
        value = saved.get("self")
        if is_number(value, children):
            return [float(value)]
    if kind in _PASSED and len(children) == 1:
        return [1.0]
    return _unknown(node)


def _stacked(children: list[tuple[Node, int]]) -> bool:
    """Whether what is joined is single numbers, the losses of several tasks, say."""
    return (
        len(children) == 1
        and kind_of(children[0][0]) == "StackBackward"
        and _are_numbers([(child, number) for child, number in children[0][0].next_functions if child is not None])
    )


def is_number(other: Any, children: list[tuple[Node, int]]) -> bool:
    """Whether this is one number for all that it meets; in a batch of one, a vector holds that example's own."""
    ((node, number),) = children
    return (
        isinstance(other, Tensor)
        and other.numel() == 1
        and (other.dim() == 0 or list(other.shape) != list(node._input_metadata[number].shape))
    )


def _are_numbers(children: list[tuple[Node, int]]) -> bool:
    """Whether each of these edges carries a single number."""
    return all(math.prod(node._input_metadata[number].shape) == 1 for node, number in children)


class Saved:
    """What a node of the graph has kept."""

    def __init__(self, node: Node):
        self._node = node

    def get(self, name: str) -> Any:
        try:
            return getattr(self._node, f"_saved_{name}", None)
        except RuntimeError as error:  # freed by an earlier backward
            raise UnknownLoss("a graph that a backward has used up") from error


def _where(node: Node) -> str:
    return f"the operation {kind_of(node).removesuffix('Backward')!r}"


def _unknown(node: Node) -> Any:
    raise UnknownLoss(_where(node))


def weight(term: Term, n: int, claimed: LossReduction) -> float:
    """By what an example's term is multiplied beyond what is claimed: 1 for a mean declared as a mean.

    Raises:
        UnknownLoss: it joins a number of numbers that is no multiple of N.
    """
    if term.kind == "own":
        return term.factor
    if term.elements % n:
        raise UnknownLoss(f"it joins {term.elements:g} numbers in a batch of {n} examples")
    found = term.factor / term.elements if term.reduction == "mean" else term.factor
    return found * n if claimed == "mean" else found


def is_constant(value: float) -> bool:
    """Whether a number looks like one that somebody wrote: three digits, a power of 2, or one over a small number.

    1 / 76 in a batch of 8 looks like a count of something. What looks right is compared from batch to batch.
    """
    inverse = 1 / value if value else math.inf
    whole = abs(inverse) <= _LARGEST_PART and math.isclose(inverse, round(inverse), rel_tol=_RELATIVE)
    # Powers of two are those by which losses are scaled against underflow.
    return whole or abs(math.frexp(value)[0]) == 0.5 or math.isclose(float(f"{value:.3g}"), value, rel_tol=_RELATIVE)


def is_plain(term: Term, value: float, n: int, claimed: LossReduction) -> bool:
    """Whether the term joins the examples as claimed, by its own reduction or by a division that can only mean that.

    A mean where a mean is claimed may carry a constant. A sum divided by hand must be divided by N, times a constant. A
    mean where a sum is claimed must have been multiplied by N.
    """
    if term.kind == "own" or n == 1:
        return is_constant(term.factor)
    if term.reduction == claimed:
        undone = n if claimed == "mean" else 1 / n
        return is_constant(term.factor) and not math.isclose(abs(term.factor), undone, rel_tol=_RELATIVE)
    inverse = 1 / abs(value) if value else math.inf
    if inverse < math.inf and round(inverse) >= 1 and math.isclose(inverse, round(inverse), rel_tol=_RELATIVE):
        return claimed == "mean" or round(inverse) % n != 0
    return claimed == "mean" and is_constant(value) and not is_constant(term.factor)


class Grown(NamedTuple):
    """Shapes before and after an operation; whether it was one in which rows ``met`` those of another tensor."""

    given: tuple[int, ...]
    made: tuple[int, ...]
    met: bool


class Followed(NamedTuple):
    """What lies between numbers and the model's outputs.

    Attributes:
        linear: the factors by which sums of vectors were multiplied on their way, by single numbers.
        factors: products of single numbers along every way to the outputs.
        shape: names the operations: equal for equal code; ``kinds`` without their number, which a loop changes.
        leaves: by their ids, the tensors to which ways lead beside the outputs.
        reached: which of the model's outputs they lead to.
        opaque: names of functions written in Python, or compiled, whose inside no graph shows.
        grown: operations that repeat numbers of one example along another dimension, or let them meet another tensor's.
    """

    linear: tuple[float, ...]
    factors: tuple[float, ...]
    shape: int
    kinds: frozenset[str]
    leaves: dict[int, Tensor]
    reached: frozenset[int]
    opaque: tuple[str, ...]
    grown: frozenset[Grown]


def follow(edges: Sequence[tuple[Node, int]], outputs: Outputs) -> Followed:
    """Everything between these edges of a graph and the model's outputs."""
    order: list[Node] = []
    linear: list[float] = []
    leaves: dict[int, Tensor] = {}
    for edge in edges:
        _visit(edge, outputs, order, leaves)
        linear += linear_factors(edge, outputs)
    products: dict[Node, frozenset[float]] = {}
    for node in order:  # children first
        children = [(c, k) for c, k in node.next_functions if c is not None]
        below = [frozenset({1.0}) if (c, k) in outputs.places else products.get(c, frozenset()) for c, k in children]
        found = frozenset().union(*below)
        share = 1.0
        if len([ways for ways in below if ways]) == 1 and kind_of(node) in ("MulBackward", "DivBackward"):
            with contextlib.suppress(UnknownLoss):  # by a vector
                share = shares(node, [child for child, ways in zip(children, below, strict=True) if ways])[0]
        if kind_of(node) == "MeanBackward" and node._input_metadata[0].shape:
            # Over tokens or classes; of one example's own rows, in a loop, the mean is a single number.
            share = math.prod(node._input_metadata[0].shape) / max(math.prod(Saved(node).get("self_sym_sizes")), 1)
        products[node] = frozenset(float(f"{share * way:.6g}") for way in found) if len(found) <= _MOST_WAYS else found
    ways = frozenset().union(
        *(frozenset({1.0}) if edge in outputs.places else products.get(edge[0], frozenset()) for edge in edges)
    )
    ends = {*edges, *((c, k) for node in order for c, k in node.next_functions if c is not None)}
    names = tuple(node.name() for node in order)
    return Followed(
        tuple(linear),
        tuple(sorted(ways)),
        hash(names),
        frozenset(names),
        leaves,
        frozenset(outputs.places[end] for end in ends if end in outputs.places),
        tuple(kind_of(node).removesuffix("Backward") for node in order if isinstance(node, BackwardCFunction)),
        frozenset(grown for node in order if (grown := _grown(node, outputs, products)) is not None),
    )


# Operations in which a row of one tensor meets several rows, or places, of another.
_MEETING = frozenset(
    {"Mm", "Bmm", "Addmm", "Baddbmm", "Addbmm", "Cdist", "EuclideanDist", "Index", "IndexSelect", "Gather", "Take"}
)


def _grown(node: Node, outputs: Outputs, products: Mapping[Node, frozenset[float]]) -> Grown | None:
    """Of the one operand that comes from the outputs, where it was broadcast, or where each of its rows met several of
    another tensor's, as in a product with the keys of all examples."""
    operands = [
        (c, k) for c, k in node.next_functions if c is not None and ((c, k) in outputs.places or products.get(c))
    ]
    if len(operands) != 1 or not node._input_metadata:
        return None  # where outputs meet outputs, gradients tell
    ((child, number),) = operands
    given, made = (tuple(found._input_metadata[place].shape) for found, place in ((child, number), (node, 0)))
    aligned = (1,) * (len(made) - len(given)) + given
    repeated = math.prod(made) > math.prod(given) and all(a in (1, b) for a, b in zip(aligned, made, strict=True))
    met = kind_of(node).removesuffix("Backward") in _MEETING
    return Grown(given, made, met) if repeated or met else None


def leaves_under(tensors: Iterable[Tensor]) -> list[Tensor]:
    """All tensors at the ends of these tensors' graphs that take a gradient."""
    order: list[Node] = []
    found: dict[int, Tensor] = {}
    for tensor in tensors:
        if tensor.grad_fn is not None:
            _visit((tensor.grad_fn, tensor.output_nr), Outputs.of([]), order, found)
    return list(found.values())


def _visit(edge: tuple[Node, int], outputs: Outputs, order: list[Node], reached: dict[int, Tensor]) -> None:
    """Enters all nodes down to the outputs into ``order``, children first, and the leaves beside them."""
    if edge in outputs.places:
        return
    stack, seen = [edge[0]], set(order)
    while stack:
        node = stack[-1]
        if node in seen:
            stack.pop()
            continue
        variable = getattr(node, "variable", None)
        if variable is not None:
            reached[id(variable)] = variable
        children = [c for c, k in node.next_functions if c is not None and (c, k) not in outputs.places]
        # One that waits further down the stack comes first, too: its products are needed here.
        open_ = [child for child in children if child not in seen]
        if open_:
            stack.extend(open_)
            continue
        seen.add(node)
        order.append(node)
        stack.pop()


def linear_factors(edge: tuple[Node, int], outputs: Outputs) -> list[float]:
    reached: dict[Node, bool] = {}
    pending, factors = [(*edge, 1.0)], []
    while pending:
        node, number, factor = pending.pop()
        children = (
            []
            if (node, number) in outputs.places
            else [(c, k) for c, k in node.next_functions if c is not None and outputs.below(c, k, reached)]
        )
        single = len(children) == 1 and kind_of(node) not in ("MeanBackward", "SumBackward", "ExpandBackward")
        try:
            if not children or not (single or kind_of(node) in ("AddBackward", "SubBackward")):
                raise UnknownLoss
            pending += [
                (c, k, factor * share) for (c, k), share in zip(children, _vector_shares(node, children), strict=True)
            ]
        except UnknownLoss:
            factors.append(factor)
    return factors


def _vector_shares(node: Node, children: list[tuple[Node, int]]) -> list[float]:
    if kind_of(node) in ("AddBackward", "SubBackward"):
        return [1.0] * len(children)  # alpha and sign are no counts
    return shares(node, children)
