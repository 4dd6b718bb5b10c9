"""Where one forward and backward pass leaves its per-example gradients until the private step takes them.

A :class:`Pass` belongs to one micro-batch of N examples and holds one :class:`Slot` per trained parameter.
A slot receives gradients in one of two ways. *Direct*: the layer's function is given an (N, *shape) leaf
whose autograd gradient is the per-example gradient; uses of one parameter at several places add up by
themselves. *Ghost*: the function leaves its (left, right) factors and no Gᵢ is ever formed.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from lora_dp.ops.clipped_sum import clipped_sum_kept, clipped_sum_pairs
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


class Slot:
    """The per-example gradients of one parameter in one pass."""

    def __init__(self, name: str, parameter: nn.Parameter, n: int, method: NormMethod):
        self.name = name
        self.n = n
        self.method = method
        self.shape = parameter.shape
        # One stored zero stands for all N · shape values.
        zero = torch.zeros((), dtype=wide_dtype(parameter.dtype), device=parameter.device)
        self.leaf = zero.expand(n, *parameter.shape).requires_grad_()
        self.pairs: list[tuple[Tensor, Tensor, float]] = []
        self.embeddings: list[tuple[Tensor, Tensor]] = []

    def group(self, rows: Tensor) -> Tensor:
        """(first, ..., d) with first a multiple of N, example-major, as (N, T, d).

        Raises:
            ValueError: N does not divide the first dimension.
        """
        first = rows.shape[0] if rows.dim() > 1 else -1
        if first < 0 or (first % self.n if self.n else first):
            raise ValueError(
                f"'{self.name}' received an input of shape {tuple(rows.shape)} in a batch of {self.n} examples: the "
                f"first dimension must be a multiple of {self.n}, all rows of one example together; reshape the "
                "input or leave this module out of the private layers."
            )
        tokens = rows.shape[:-1].numel() // self.n if self.n else 1
        return rows.reshape(self.n, tokens, rows.shape[-1])

    def add_outer(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor | None:
        """Take scale · Σₜ leftₜ ⊗ rightₜ: as the leaf's gradient (returned) or as a ghost pair (None)."""
        ghost = self.method == "ghost" or (
            self.method == "auto" and prefers_ghost(left.shape[1], left.shape[2], right.shape[2]))
        if not ghost:
            return per_example_grad(left, right, scale)
        self.pairs.append((left, right, scale))
        return None

    def add_embedding(self, ids: Tensor, gradient: Tensor) -> None:
        """Take an embedding's gradient: ids (N, T) int64, gradient (N, T, d)."""
        self.embeddings.append((ids, gradient))

    @property
    def filled(self) -> bool:
        return self.leaf.grad is not None or bool(self.pairs) or bool(self.embeddings)

    def _settle(self) -> None:
        # ‖Σ over uses‖ needs cross terms: several ghost pairs become one by joining along T, and pairs
        # beside a direct gradient, or of different scales, are formed and added to it.
        if len(self.pairs) > 1 or (self.pairs and self.leaf.grad is not None):
            scales = {scale for _, _, scale in self.pairs}
            if len(scales) == 1 and self.leaf.grad is None:
                left = torch.cat([pair[0] for pair in self.pairs], dim=1)
                right = torch.cat([pair[1] for pair in self.pairs], dim=1)
                self.pairs = [(left, right, scales.pop())]
                return
            for left, right, scale in self.pairs:
                formed = per_example_grad(left, right, scale)
                self.leaf.grad = formed if self.leaf.grad is None else self.leaf.grad + formed
            self.pairs = []
        if len(self.embeddings) > 1:
            ids = torch.cat([ids for ids, _ in self.embeddings], dim=1)
            self.embeddings = [(ids, torch.cat([gradient for _, gradient in self.embeddings], dim=1))]

    def sq_norms(self) -> Tensor:
        """‖Gᵢ‖² for every example: (N,), float32 or float64."""
        self._settle()
        if self.pairs:
            return ghost_sq_norm(*self.pairs[0])
        if self.embeddings:
            return _embedding_sq_norms(*self.embeddings[0])
        if self.leaf.grad is None:
            return torch.zeros(self.n, dtype=self.leaf.dtype, device=self.leaf.device)
        return self.leaf.grad.flatten(1).square().sum(1)

    def weighted_sum(self, coefficients: Tensor) -> Tensor:
        """Σᵢ cᵢ Gᵢ in the parameter's shape; coefficients (N,). An example with cᵢ = 0 adds exactly nothing."""
        if self.pairs:
            left, right, scale = self.pairs[0]
            return clipped_sum_pairs(left, right, coefficients, scale)
        if self.embeddings:
            return _embedding_sum(*self.embeddings[0], coefficients, self.shape)
        if self.leaf.grad is None:
            return torch.zeros(self.shape, dtype=self.leaf.dtype, device=self.leaf.device)
        return clipped_sum_kept(self.leaf.grad, coefficients)


def _embedding_sq_norms(ids: Tensor, gradient: Tensor) -> Tensor:
    # Rows of one example that share a token add up before the norm: sum them by (example, token) first.
    n, tokens = ids.shape
    gradient = gradient.to(wide_dtype(gradient.dtype))
    example = torch.arange(n, device=ids.device).unsqueeze(1).expand(n, tokens)
    keys = torch.stack([example.reshape(-1), ids.reshape(-1)])
    distinct, inverse = keys.unique(dim=1, return_inverse=True)
    sums = gradient.new_zeros(distinct.shape[1], gradient.shape[2]).index_add_(0, inverse, gradient.flatten(0, 1))
    return gradient.new_zeros(n).index_add_(0, distinct[0], sums.square().sum(1))


def _embedding_sum(ids: Tensor, gradient: Tensor, coefficients: Tensor, shape: torch.Size) -> Tensor:
    gradient = gradient.to(wide_dtype(gradient.dtype))
    excluded = (coefficients == 0).view(-1, 1, 1)
    weighted = (gradient * coefficients.to(gradient.dtype).view(-1, 1, 1)).masked_fill_(excluded, 0)
    return gradient.new_zeros(shape).index_add_(0, ids.reshape(-1), weighted.flatten(0, 1))


class Pass:
    """One forward and backward of one micro-batch: N, which parameters are trained, and their slots."""

    def __init__(self, n: int, trained: frozenset[int]):
        self.n = n
        self.trained = trained
        self.slots: dict[int, Slot] = {}
        # A private layer ran without gradients inside this training forward: a reentrant checkpoint will run it again
        # in backward, and must then find this very pass.
        self.reentrant = False

    @property
    def filled(self) -> bool:
        return any(slot.filled for slot in self.slots.values())


class Recorder:
    """Connects the private layers of one model with the engine: says what to record, holds what came.

    Attributes:
        names: qualified name of each private parameter, by ``id``.
        trained: ids of the parameters that the current phase trains.
        method: how norms are computed ("auto", "direct" or "ghost").
        owner: the private optimizer for which the model records.
        suspended: inside an evaluation with gradients, which is not recorded.
        isolation_checked: whether a first batch has passed the isolation check.
        uneven_checked: whether one with token labels of uneven lengths has.
    """

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.trained: frozenset[int] = frozenset()
        self.method: NormMethod = "auto"
        self.current: Pass | None = None
        self.superseded: list[Pass] = []
        self.suspended = False
        self.isolation_checked = False
        self.uneven_checked = False
        self.owner: object | None = None

    def __reduce__(self) -> tuple[type["Recorder"], tuple[()]]:
        # A copied or unpickled model starts unowned: what is recorded belongs to one optimizer and these very tensors.
        return Recorder, ()

    def open(self, n: int) -> None:
        """Begin a pass over a micro-batch of ``n`` examples.

        Raises:
            RuntimeError: the pass before has gradients that no step has taken.
        """
        if self.pending:
            raise RuntimeError(
                "A second forward pass began before the gradients of the first were used: call optimizer.step() "
                "after each backward (with optimizer.signal_skip_step() before it for the micro-batches of one "
                "logical batch), or optimizer.zero_grad() to drop them."
            )
        if self.current is not None:
            self.superseded.append(self.current)
        self.current = Pass(n, self.trained)

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
        return finished

    @property
    def pending(self) -> bool:
        """Whether a forward has been recorded, or will be by its backward, that no step has taken."""
        return self.current is not None and (self.current.filled or self.current.reentrant)

    def discard(self) -> None:
        """Forget whatever was recorded."""
        self.current, self.superseded = None, []

    @property
    def recording(self) -> bool:
        return self.current is not None and not self.suspended and torch.is_grad_enabled()

    def slot(self, parameter: nn.Parameter) -> Slot | None:
        """The slot of ``parameter`` in the current pass, or None if this phase does not train it."""
        key = id(parameter)
        if self.current is None or key not in self.current.trained:
            return None
        if key not in self.current.slots:
            self.current.slots[key] = Slot(self.names[key], parameter, self.current.n, self.method)
        return self.current.slots[key]
