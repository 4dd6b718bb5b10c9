"""Stores the per-example gradients of one pass until ``PrivateOptimizer.step`` takes them.

A :class:`Pass` belongs to one micro-batch of N examples and holds one :class:`Slot` per trained parameter.
Everything arrives as autograd's gradient of a leaf, so no backward has a side effect and a compiled one works too.
*Direct*: the layer's function is given an ``(N, *shape)`` leaf whose gradient is the per-example gradient; uses of one
parameter at several places add up by themselves. *Ghost*: two leaves take its (left, right) factors and no Gᵢ is ever
formed.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lora_dp.ops.clipped_sum import clipped_sum_pairs
from lora_dp.ops.example_norms import example_norms
from lora_dp.ops.example_rows import ExampleRows
from lora_dp.ops.per_example_grad import per_example_grad
from lora_dp.ops.per_example_norm import ghost_sq_norm
from lora_dp.ops.registry import wide_dtype

NormMethod = Literal["auto", "direct", "ghost"]

# What moving one number to or from memory costs, in floating-point operations. With it the choice below was the faster
# one, or within 40 µs or 9 % of it, in 79 of 80 timings on an EPYC core (T from 1 to 128, 64 × 4 to 768 × 768, N = 16).
_FLOPS_PER_MOVE = 16


def prefers_ghost(tokens: int, left: int, right: int) -> bool:
    """Whether the ghost norm with a recomputed sum is cheaper than keeping Gᵢ (left × right numbers).

    Direct forms Gᵢ (2·T·p·q flops) and moves it three times; ghost builds two T × T Gram matrices (2·T²·(p+q) flops,
    three moves of T²), moves its factors eight times (to float64, and weighted for the sum), and pays the product for
    the sum later.
    """
    direct = 3 * _FLOPS_PER_MOVE * left * right
    moves = 3 * tokens**2 + 8 * tokens * (left + right)
    ghost = 2 * tokens**2 * (left + right) + _FLOPS_PER_MOVE * moves
    return ghost < direct


@functools.cache
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros((), dtype=dtype, device=device)


def _leaf(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros for which autograd will keep a gradient; one stored number stands for all."""
    return _zero(dtype, device).expand(*shape).requires_grad_()


def by_example(rows: Tensor, n: int) -> Tensor:
    """(first, ..., d), example-major with first a multiple of N, as (N, T, d)."""
    # math.prod, not Size.numel(), which would compile a graph for every batch size.
    return rows.reshape(n, math.prod(rows.shape[:-1]) // n if n else 1, rows.shape[-1])


class Receiver(NamedTuple):
    """Where the backward of one use of a parameter leaves what it finds, as the gradients of two leaves.

    Direct: ``first`` ``(N, *shape)`` takes Gᵢ and ``second`` (N,) takes ‖Gᵢ‖, in float64. Ghost: they take the factors
    (N, T, p) and (N, T, q).
    """

    ghost: bool
    first: Tensor
    second: Tensor


def _keep_one(backwards: list[None], leaf: Tensor) -> None:
    """Of several backward passes the norms tell nothing exact: then the norm of what they left together is taken."""
    backwards.append(None)
    if len(backwards) > 1:
        leaf.grad = None


class _Pair:
    """The leaves of one ghost use: Gᵢ = scale · Σ over backwards, Σₜ leftₜ ⊗ rightₜ."""

    def __init__(self, left: Tensor, right: Tensor, scale: float):
        self.scale = scale
        self.found: list[tuple[Tensor, Tensor]] = []
        self._sides: list[Tensor | None] = [None, None]
        for side, leaf in enumerate((left, right)):
            # Taken at once: .grad may share memory with an activation, to which a second backward would add in place.
            leaf.register_post_accumulate_grad_hook(functools.partial(self._take, side))

    def _take(self, side: int, leaf: Tensor) -> None:
        self._sides[side], leaf.grad = leaf.grad, None
        left, right = self._sides
        if left is not None and right is not None:
            self.found.append((left, right))
            self._sides = [None, None]

    @property
    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """Left, right and scale, or None if no backward came through this use."""
        if not self.found:
            return None
        # Each backward through a kept graph brings both sides anew: the layer's input may be either of them, and a
        # checkpoint works it out again. Joined along T, whatever the two have in common.
        left, right = (side[0] if len(side) == 1 else torch.cat(side, 1) for side in zip(*self.found, strict=True))
        return left, right, self.scale


class Slot:
    """The per-example gradients of one parameter in one pass.

    Attributes:
        leaf: ``(N, *shape)``, whose gradient is what the direct way found.
        rows: how many the layer was last given of all examples, 0 where that is not known.
    """

    def __init__(self, name: str, parameter: nn.Parameter, n: int, method: NormMethod):
        self.name = name
        self.n = n
        self.method = method
        self.shape = parameter.shape
        # All leaves of this slot: a loss must come to them by the model's outputs.
        self.leaves: list[Tensor] = []
        self.leaf = self._leaf((n, *parameter.shape), wide_dtype(parameter.dtype), parameter.device)
        # Norms, not squares: over several backward passes their sum still bounds the norm of the sum.
        self._norms = self._leaf((n,), torch.float64, parameter.device)
        self.rows = self._uses = 0
        self._pairs: list[_Pair] = []
        self._norms.register_post_accumulate_grad_hook(functools.partial(_keep_one, []))
        self._factors: tuple[Tensor, Tensor, float] | None = None
        self._lookups: list[tuple[Tensor, Tensor]] = []
        self._rows: ExampleRows | None = None

    def _leaf(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        leaf = _leaf(shape, dtype, device)
        self.leaves.append(leaf)
        return leaf

    def group(self, rows: Tensor) -> Tensor:
        """(first, ..., d) with first a multiple of N, example-major, as (N, T, d).

        Raises:
            ValueError: N does not divide the first dimension.
        """
        n = self.leaf.shape[0]
        first = rows.shape[0] if rows.dim() > 1 else -1
        if not torch.compiler.is_compiling():
            self.rows = first
        if first < 0 or (first % n if n else first):
            raise ValueError(
                f"'{self.name}' received an input of shape {tuple(rows.shape)} in a batch of {n} examples: the "
                f"first dimension must be a multiple of {n}, all rows of one example together; reshape the "
                "input or leave this module out of the private layers."
            )
        return by_example(rows, n)

    def receive(self, rows: Tensor, left: int, right: int, scale: float = 1.0) -> Receiver:
        """Prepare one use whose backward will find scale · Σₜ leftₜ ⊗ rightₜ.

        Args:
            rows: (first, ..., d) of this use, which tells T, dtype and device.
            left, right: widths p and q of the factors.
            scale: factor of the gradient.

        Raises:
            ValueError: N does not divide the first dimension of ``rows``.
        """
        n, tokens = self.group(rows).shape[:2]
        self._uses += 1
        # A leaf made inside a compiled graph would never come out of it.
        if torch.compiler.is_compiling() or not (
            self.method == "ghost" or (self.method == "auto" and prefers_ghost(tokens, left, right))
        ):
            return Receiver(False, self.leaf, self._norms)
        leaves = [self._leaf((n, tokens, width), rows.dtype, rows.device) for width in (left, right)]
        self._pairs.append(_Pair(leaves[0], leaves[1], scale))
        return Receiver(True, leaves[0], leaves[1])

    def receive_whole(self, rows: Tensor) -> Tensor:
        """The leaf of one use whose backward finds Gᵢ by other means than an outer product.

        Raises:
            ValueError: N does not divide the first dimension of ``rows``.
        """
        self.group(rows)
        self._uses += 1
        return self.leaf

    def receive_lookup(self, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Prepare one lookup of an embedding's rows.

        Args:
            ids: (first, ...) int64.
            dtype: of the table.

        Returns:
            ids as (N, T), and the leaf (N, T, d) that takes the gradient of what was looked up.

        Raises:
            ValueError: N does not divide the first dimension of ``ids``.
            NotImplementedError: inside torch.compile.
        """
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                f"'{self.name}' is a trainable embedding, which cannot be recorded under torch.compile: freeze it, or "
                "do not compile the model."
            )
        grouped = self.group(ids.unsqueeze(-1)).squeeze(-1)
        leaf = self._leaf((*grouped.shape, self.shape[-1]), dtype, ids.device)
        self._lookups.append((grouped, leaf))
        return grouped, leaf

    @property
    def filled(self) -> bool:
        """Whether a backward has left something."""
        return (
            self.leaf.grad is not None
            or self._factors is not None
            or any(pair.found for pair in self._pairs)
            or any(leaf.grad is not None for _, leaf in self._lookups)
        )

    @property
    def kept(self) -> Tensor | None:
        """Gᵢ ``(N, *shape)``, where that is what is held; None where it must be recomputed."""
        self._settle()
        return None if self._lookups else self.leaf.grad

    def _settle(self) -> None:
        # ‖Σ over uses‖ needs cross terms: several ghost pairs become one by joining along T, and pairs
        # beside a direct gradient, or of different scales, are formed and added to it.
        found = [factors for pair in self._pairs if (factors := pair.factors) is not None]
        if self._factors is not None:
            found.append(self._factors)
        self._pairs, self._factors = [], None
        if self.leaf.grad is None and len({scale for _, _, scale in found}) == 1:
            left, right, scale = found[0]
            if len(found) > 1:
                left, right = torch.cat([pair[0] for pair in found], 1), torch.cat([pair[1] for pair in found], 1)
            self._factors = (left, right, scale)
            return
        for left, right, scale in found:
            formed, _ = per_example_grad(left, right, scale)
            self.leaf.grad = formed if self.leaf.grad is None else self.leaf.grad + formed

    def _looked_up(self) -> ExampleRows | None:
        """All lookups as one."""
        found = [(ids, leaf.grad) for ids, leaf in self._lookups if leaf.grad is not None]
        if not found:
            return None
        ids, gradients = torch.cat([ids for ids, _ in found], 1), torch.cat([gradient for _, gradient in found], 1)
        return ExampleRows.of(ids, gradients, self.shape)

    def by_example(self) -> list[Tensor]:
        """Norms, and what the sum is made of: gradients, or their factors. Each has first dimension N."""
        self._settle()
        factors = [] if self._factors is None else [*self._factors[:2]]
        kept = [] if self.leaf.grad is None else [self.leaf.grad]
        return [self.norms(), *factors, *kept, *(leaf.grad for _, leaf in self._lookups if leaf.grad is not None)]

    def norms(self) -> Tensor:
        """‖Gᵢ‖ of what is kept or will be recomputed, never below it, for every example: (N,), float64.

        Infinite or NaN where Gᵢ has a value that is, or may have one since several passes added up.
        """
        self._settle()
        if self._factors is not None:
            return ghost_sq_norm(*self._factors).sqrt()
        # Kept for the sum: added up again, in another order, terms that cancel would leave other values.
        self._rows = self._looked_up()
        if self._rows is not None:
            return self._rows.norms()
        if self.leaf.grad is None:
            return torch.zeros(self.n, dtype=torch.float64, device=self.leaf.device)
        if self._uses == 1 and self._norms.grad is not None:
            # Finite gradients of several passes may have an infinite sum, which no sum of their norms would show.
            norms = self._norms.grad
            return torch.where(norms <= torch.finfo(self.leaf.dtype).max, norms, math.inf)
        return example_norms(self.leaf.grad)

    def recomputed_sum(self, coefficients: Tensor) -> Tensor:
        """Σᵢ cᵢ Gᵢ where no Gᵢ was kept; coefficients (N,). An example with cᵢ = 0 adds exactly nothing."""
        self._settle()
        if self._factors is not None:
            left, right, scale = self._factors
            return clipped_sum_pairs(left, right, coefficients, scale)
        rows = self._looked_up() if self._rows is None else self._rows
        assert rows is not None, "nothing was recorded"
        return rows.weighted_sum(coefficients)


class Pass:
    """One forward and backward of one micro-batch: N, and the slots of the trained parameters by their ``id``.

    Attributes:
        views: rows that the model was given of each example; ``rows``, of all of them.
    """

    def __init__(self, n: int, slots: dict[int, Slot], views: int = 1):
        self.n, self.views = n, views
        self.slots = slots
        # A private layer ran without gradients inside this training forward: a reentrant checkpoint will run it again
        # in backward, and must then find this very pass.
        self.reentrant = False
        # The loss handed over was a vector, and so their sum was differentiated, whatever reduction was declared.
        self.summed = False

    @property
    def rows(self) -> int:
        return self.n * self.views

    @property
    def filled(self) -> bool:
        return any(slot.filled for slot in self.slots.values())

    def leaves(self) -> set[int]:
        """The ids of all leaves so far."""
        return {id(leaf) for slot in self.slots.values() for leaf in slot.leaves}


class PassRecorder:
    """Says which per-example gradients the private layers of one model record, and holds what came.

    Attributes:
        parameters: qualified name of each parameter, and the parameter, by ``id``.
        trained: ids of the parameters that the current phase trains.
        method: how norms are computed ("auto", "direct" or "ghost").
        views: rows of each example. They are to a slot what tokens are: what it finds of an example is their sum.
        current: the pass that is recorded; ``superseded``, those before it that no step took.
        suspended: inside an evaluation with gradients, which is not recorded; ``tried``, inside a trial.
        per_example: whether the unit of privacy is one example. Where it is a whole client, whose change is clipped as
            one, examples may meet: batches are not tried, losses not followed, and a batch's gradient is one.
        on_leave: called when the model is private no more.
        uses_checked: whether a first pass was looked through for parameters that get no gradient.
    """

    def __init__(self) -> None:
        self.parameters: dict[int, tuple[str, nn.Parameter]] = {}
        self.trained: frozenset[int] = frozenset()
        self.method: NormMethod = "auto"
        self.views = 1
        self.current: Pass | None = None
        self.superseded: list[Pass] = []
        self.suspended = self.tried = self.uses_checked = False
        self.per_example = True
        self.on_leave: list[Callable[[], None]] = []

    def open(self, rows: int) -> None:
        """Begin a pass over a micro-batch of so many rows: ``views`` of each example.

        Raises:
            RuntimeError: the pass before has gradients that no step has taken.
            ValueError: the rows are not ``views`` of each example.
        """
        n, more = divmod(rows, self.views)
        if more:
            raise ValueError(
                f"A batch of {rows} rows does not hold {self.views} views of each example: give the model all views of "
                "one example after those of another, by x.flatten(0, 1) of (N, views, …)."
            )
        if self.pending:
            raise RuntimeError(
                "A second forward pass began before the gradients of the first were used: call optimizer.step() "
                "after each backward (with optimizer.signal_skip_step() before it for the micro-batches of one "
                "logical batch), or optimizer.zero_grad() to drop them."
            )
        if self.current is not None:
            self.superseded.append(self.current)
        # Where examples may meet, a batch is one: layers need not be given rows that belong to one example each.
        apart = n if self.per_example else min(n, 1)
        # All slots now: under torch.compile the layers find their leaves, they cannot make them.
        self.current = Pass(
            n,
            {
                key: Slot(*entry, apart, self.method)
                for key, entry in self.parameters.items()
                if key in self.trained and entry[1].requires_grad
            },
            self.views,
        )

    def take(self) -> Pass:
        """Hand the finished pass over and forget it.

        Raises:
            RuntimeError: nothing was recorded, or one backward ran through two forward passes.
        """
        finished, self.current = self.current, None
        superseded, self.superseded = self.superseded, []
        if any(earlier.filled for earlier in superseded):
            raise RuntimeError(
                "One backward ran through two forward passes of the private model: an example in both would count "
                "twice; join the inputs into one forward pass."
            )
        if finished is None or not (finished.filled or finished.n == 0):
            raise RuntimeError(
                "No per-example gradient was recorded since the last step: run the model in train() mode and call "
                "loss.backward() before optimizer.step() (an empty batch takes optimizer.step_on_empty_batch())."
            )
        if finished.n and not self.uses_checked:
            self.uses_checked = True
            _warn_of_unused(finished)
        return finished

    @property
    def pending(self) -> bool:
        """Whether a forward has been recorded, or will be by its backward, that no step has taken."""
        return self.current is not None and (self.current.filled or self.current.reentrant)

    def forget_gradients(self) -> None:
        """Forget gradients that were recorded. A pass whose backward has yet to come is left to it: between the two is
        a usual place for zero_grad()."""
        if self.current is None or self.current.filled:
            self.discard()
        else:
            self.current.reentrant = False  # a next forward may take its place

    def check_current(self, found: Pass) -> None:
        """Refuse a backward through a pass that is over: a reentrant checkpoint would record into the one that is not.

        Raises:
            RuntimeError: another pass, a step or zero_grad() came in between.
        """
        if found is not self.current:
            raise RuntimeError(
                "A backward began through a forward pass with reentrant checkpoints that was over: a later forward, "
                "step() or zero_grad() had taken its place. Call backward once, right after its forward, or use "
                "use_reentrant=False."
            )

    def discard(self) -> None:
        """Forget whatever was recorded."""
        self.current, self.superseded = None, []

    def leaves(self) -> set[int]:
        """The ids of the leaves that take the gradients of the current pass."""
        return set() if self.current is None else self.current.leaves()

    @property
    def recording(self) -> bool:
        return self.current is not None and not self.suspended and torch.is_grad_enabled()

    def slot(self, parameter: nn.Parameter) -> Slot | None:
        """The slot of ``parameter`` in the current pass, or None if this phase does not train it."""
        return None if self.current is None else self.current.slots.get(id(parameter))


def _warn_of_unused(finished: Pass) -> None:
    modules = sorted({slot.name.rpartition(".")[0] for slot in finished.slots.values() if not slot.filled})
    if modules:
        more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
        warnings.warn(
            f"No gradient came to {', '.join(repr(name) for name in modules[:3])}{more} in the first private step, so "
            "that noise alone trains it: the model reads its weight without calling it, or the loss does not depend on "
            "it. Leave it out of target_modules or freeze it, unless later batches use it.",
            stacklevel=7,
        )
