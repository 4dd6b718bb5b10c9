"""FedASK: the sum of the clients' products, found from two sketches and split evenly (arXiv 2507.09990)."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, ClassVar

from lora_dp.fed.methods.base import Contribution, Layers, State
from lora_dp.fed.methods.by_product import ByProduct, without_products
from lora_dp.fed.methods.low_rank import LowRank, Matrix, truncated_svd
from lora_dp.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

# Of the largest singular value, below which one is rounding.
_ZERO = 1e-12


@dataclass(frozen=True)
class FedASK(ByProduct):
    """P = Σ pₖsₖBₖAₖ is cut to rank r from sketches P·Ω and Qᵀ·P, and split as B = Q·U·Σ^½, A = Σ^½·Vᵀ, over √s each.

    Ω is random and public, Q an orthonormal basis of P·Ω, and U·Σ·Vᵀ = Qᵀ·P: a randomised singular value decomposition
    (Halko, Martinsson and Tropp 2011, arXiv 0909.4061). It is that of P itself where Ω has as many columns as P's rank.
    All of it is done to released factors, so it costs no privacy.

    Both factors have the same lengths then. So noise of one size, and steps of one rate, weigh alike on both.

    Args:
        oversampling: columns of Ω beside r.
    """

    oversampling: int = 8

    name: ClassVar[str] = "fedask"
    learning_rates: ClassVar = {1: 0.07, 3: 0.2, 8: 0.5, inf: 0.3}

    def __post_init__(self) -> None:
        if not self.oversampling >= 0:
            raise ValueError(f"fedask's oversampling must not be negative, not {self.oversampling}: 8 is usual.")

    def combine(
        self, mean: Contribution, state: State, layers: Layers, round_index: int, turn: int = 0
    ) -> Contribution:
        combined = without_products(mean)
        public = torch.Generator().manual_seed(round_index)
        for layer, (d_out, d_in) in layers.shapes.items():
            width = min(layers.r + self.oversampling, d_out, d_in)
            omega = torch.randn(d_in, width, generator=public, dtype=torch.float64)
            found = balanced(sketched(mean[f"{layer}.product"], omega, layers.r), layers.scaling(layers.r))
            combined[f"{layer}.lora_B"], combined[f"{layer}.lora_A"] = found.left, found.right
        return combined


def sketched(matrix: Matrix, omega: Tensor, rank: int) -> LowRank:
    """U·Σ and Vᵀ of that rank, in float64, from the sketches of two exchanges.

    Each sketch is linear in the matrix: it is the sum of what clients would send of their own.

    Args:
        matrix: P, (d_out, d_in).
        omega: Ω, (d_in, k).
        rank: of the result, at most k.

    >>> found = sketched(torch.diag(torch.tensor([3.0, 1.0, 2.0])), torch.eye(3), 2)
    >>> (found.left @ found.right).diagonal().round(decimals=6).abs().tolist()
    [3.0, 0.0, 2.0]
    """
    left, right = (matrix, None) if isinstance(matrix, torch.Tensor) else (matrix.left.double(), matrix.right.double())
    left, omega = left.double(), omega.to(left.device, torch.float64)
    first = left @ (omega if right is None else right @ omega)
    basis, _ = torch.linalg.qr(first)
    second = basis.t() @ left
    cut = truncated_svd(second if right is None else second @ right, rank)
    return LowRank(basis @ cut.left, cut.right)


def balanced(product: LowRank, scaling: float) -> LowRank:
    """B and A of s·B·A = U·Σ·Vᵀ with Σ shared evenly: BᵀB = A·Aᵀ = Σ/s.

    Beside a singular value of zero A's row has unit length, so that it goes on as at LoRA's start: two zeros would
    never move.

    Args:
        product: U·Σ (d_out, r), of orthogonal columns, and Vᵀ (r, d_in), of orthonormal rows.
        scaling: s.
    """
    sizes = product.left.norm(dim=0)
    none = sizes <= _ZERO * sizes.max()
    shares = (sizes / scaling).masked_fill(none, 1.0).sqrt()
    left = (product.left / (scaling * shares)).masked_fill(none, 0.0)
    return LowRank(left, product.right * shares.unsqueeze(1))
