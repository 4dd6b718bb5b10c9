"""Weight updates as products of low rank, and their sums in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from lora_dp.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The matrix left @ right, not formed: left (d_out, k), right (k, d_in)."""

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.left.shape[0], self.right.shape[1]


Matrix: TypeAlias = "LowRank | Tensor"


def dense(matrix: Matrix) -> Tensor:
    """The matrix itself, (d_out, d_in)."""
    return matrix if isinstance(matrix, torch.Tensor) else matrix.left @ matrix.right


class LowRankSum:
    """Σ wᵢ · leftᵢ @ rightᵢ in float64, exact up to rounding: stacked factors while they are smaller than the matrix,
    the matrix from then on. So memory never exceeds that of one matrix, however many terms are added."""

    def __init__(self) -> None:
        self._left: list[Tensor] = []
        self._right: list[Tensor] = []
        self._rank = 0
        self._dense: Tensor | None = None

    def add(self, term: Matrix, weight: float = 1.0) -> None:
        """Adds ``weight`` · term."""
        if isinstance(term, LowRank) and self._dense is None:
            self._left.append(term.left.double() * weight)
            self._right.append(term.right.double())
            self._rank += term.right.shape[0]
            d_out, d_in = term.shape
            if self._rank * (d_out + d_in) >= d_out * d_in:
                self._dense = torch.cat(self._left, 1) @ torch.cat(self._right, 0)
                self._left, self._right = [], []
            return
        if self._dense is None:
            held = self.value(1.0) if self._left else None
            self._left, self._right = [], []
            self._dense = (
                torch.zeros(term.shape, dtype=torch.float64, device=_device(term)) if held is None else dense(held)
            )
        if isinstance(term, LowRank):
            self._dense.addmm_(term.left.double(), term.right.double(), alpha=weight)
        else:
            self._dense.add_(term.double(), alpha=weight)

    def value(self, scale: float) -> Matrix:
        """``scale`` times the sum, in float64.

        Raises:
            RuntimeError: nothing was added.
        """
        if self._dense is not None:
            return self._dense * scale
        if not self._left:
            raise RuntimeError("No update was added: a round needs at least one client.")
        return LowRank(torch.cat(self._left, 1) * scale, torch.cat(self._right, 0))


def _device(matrix: Matrix) -> torch.device:
    return matrix.device if isinstance(matrix, torch.Tensor) else matrix.left.device


def truncated_svd(matrix: Matrix, rank: int) -> LowRank:
    """The nearest matrix of that rank (Eckart and Young 1936), as U·S and Vᵀ with orthonormal rows.

    Of a low-rank matrix only its factors are decomposed. Where the matrix has a lower rank, the last columns of U·S are
    zero and the rows of Vᵀ go on orthonormally: of factors, within the span of the right one's rows while there are
    such. Each row's largest entry is positive, so that rounding does not choose the signs.
    """
    if isinstance(matrix, torch.Tensor) or matrix.right.shape[0] > min(matrix.shape):
        u, s, vh = torch.linalg.svd(dense(matrix).double(), full_matrices=False)
    else:
        # left @ right = Q₁ (R₁ R₂ᵀ) Q₂ᵀ
        q_left, r_left = torch.linalg.qr(matrix.left.double())
        q_right, r_right = torch.linalg.qr(matrix.right.double().t())
        small_u, s, small_vh = torch.linalg.svd(r_left @ r_right.t())
        u, vh = q_left @ small_u, small_vh @ q_right.t()
    found = min(rank, len(s))
    signs = torch.sign(vh[:found].gather(1, vh[:found].abs().argmax(1, keepdim=True)))
    left, right = u[:, :found] * s[:found] * signs.t(), vh[:found] * signs
    if found < rank:
        left = torch.cat([left, left.new_zeros(left.shape[0], rank - found)], 1)
        right = torch.cat([right, _orthonormal_rows(right, rank - found)], 0)
    return LowRank(left, right)


def _orthonormal_rows(rows: Tensor, count: int) -> Tensor:
    """``count`` more orthonormal rows beside these orthonormal ones; always the same."""
    d = rows.shape[1]
    candidates = torch.eye(d, dtype=rows.dtype, device=rows.device)[:, : rows.shape[0] + count]
    rest = candidates - rows.t() @ (rows @ candidates)
    u, _, _ = torch.linalg.svd(rest, full_matrices=False)
    return u[:, :count].t()


def orthonormal(vectors: Tensor) -> Tensor:
    """An orthonormal basis of the columns' span, in their number and dtype."""
    q, _ = torch.linalg.qr(vectors.double())
    return q.to(vectors.dtype)
