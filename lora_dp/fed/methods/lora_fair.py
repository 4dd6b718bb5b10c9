"""LoRA-FAIR: the averaged B is corrected so that the product comes near the ideal one (arXiv 2411.14961)."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, ClassVar, Literal

from lora_dp.fed.methods.base import Contribution, Layers, Method, Phases, State
from lora_dp.fed.methods.by_product import products, without_products
from lora_dp.fed.methods.low_rank import LowRank, Matrix, dense
from lora_dp.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LoRAFAIR(Method):
    """Clients start from Ā and B̄ + ΔB, where ΔB minimises ‖(B̄ + ΔB)Ā − Σ pₖBₖAₖ‖² + λ‖ΔB‖².

    Args:
        regularisation: λ, in units of the mean eigenvalue of ĀĀᵀ.
        objective: "ridge", the closed form of the above; or "cosine", the paper's: 1 − cos of the two products in
            place of their distance, found by L-BFGS.
    """

    regularisation: float = 0.01
    objective: Literal["ridge", "cosine"] = "ridge"

    name: ClassVar[str] = "lora-fair"
    learning_rates: ClassVar = {1: 0.1, 3: 0.2, 8: 0.5, inf: 0.3}

    def __post_init__(self) -> None:
        if not self.regularisation > 0:
            raise ValueError(f"lora-fair's regularisation must be positive, not {self.regularisation}: 0.01 is usual.")
        if self.objective not in ("ridge", "cosine"):
            raise ValueError(f"lora-fair's objective must be ridge or cosine, not {self.objective!r}.")

    def phases(self, round_index: int, turn: int = 0) -> Phases:
        return "AB"

    def contribution(self, update: State, layers: Layers) -> Contribution:
        return {**update, **products(update, layers)}

    def combine(
        self, mean: Contribution, state: State, layers: Layers, round_index: int, turn: int = 0
    ) -> Contribution:
        combined = without_products(mean)
        scaling = layers.scaling(layers.r)
        for layer in layers.shapes:
            lora_A, lora_B = (dense(mean[f"{layer}.lora_{which}"]).double() for which in "AB")
            correction = self._correction(lora_A, lora_B, mean[f"{layer}.product"], scaling)
            combined[f"{layer}.lora_B"] = lora_B + correction
        return combined

    def _correction(self, lora_A: Tensor, lora_B: Tensor, ideal: Matrix, scaling: float) -> Tensor:
        gram = lora_A @ lora_A.t()
        ridge = self.regularisation * gram.diagonal().mean() + torch.finfo(torch.float64).tiny
        # (M − B̄Ā)Āᵀ(ĀĀᵀ + λI)⁻¹, M never formed if it is given as factors.
        toward = _times(ideal, lora_A.t()) / scaling - lora_B @ gram
        regularised = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        correction = torch.linalg.solve(regularised, toward.t()).t()
        return correction if self.objective == "ridge" else _by_cosine(lora_A, lora_B, dense(ideal), ridge, correction)


def _times(matrix: Matrix, other: Tensor) -> Tensor:
    if isinstance(matrix, LowRank):
        return matrix.left.double() @ (matrix.right.double() @ other)
    return matrix.double() @ other


def _by_cosine(lora_A: Tensor, lora_B: Tensor, ideal: Tensor, ridge: Tensor, start: Tensor) -> Tensor:
    """The minimiser of 1 − cos((B̄ + ΔB)Ā, M) + λ‖ΔB‖² / ‖B̄‖², from the ridge solution."""
    size = lora_B.square().sum() + torch.finfo(torch.float64).tiny
    weight = ridge / (lora_A @ lora_A.t()).diagonal().mean()
    correction = start.clone().requires_grad_(True)
    search = torch.optim.LBFGS([correction], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        product = (lora_B + correction) @ lora_A
        cosine = torch.nn.functional.cosine_similarity(product.flatten(), ideal.double().flatten(), dim=0)
        value = 1 - cosine + weight * correction.square().sum() / size
        value.backward()
        return value

    with torch.enable_grad():
        search.step(loss)
    return correction.detach()
