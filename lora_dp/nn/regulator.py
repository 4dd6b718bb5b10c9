"""DEeR's noise regulator, made sound: noise that does not grow in the product B·A, and a clip of what it hides.

Noise on one factor reaches the weight multiplied by the other, frozen one. DEeR (doi 10.1109/TMI.2024.3518539) draws
noise W in the shape of the weight and maps it back: W·Aᵀ(AAᵀ)⁻¹ on B, (BᵀB)⁻¹Bᵀ·W on A. A row of B then has noise of
covariance σ²C²(AAᵀ)⁻¹, which hides changes up to C in the norm ‖ΔB·(AAᵀ)^½‖ = ‖ΔB·A‖_F, and no others. So gradients
are measured, clipped and noised as G̃ = G·M with M = (AAᵀ + ρI)^½ (M·G with M = (BᵀB + ρI)^½ for A), an ordinary
Gaussian mechanism, and G̃·M⁻¹ is post-processing. W is never formed: its r-dimensional equivalent is drawn.

M depends on the frozen factor alone, which has been released before. The ridge ρ is a hundredth of the mean eigenvalue:
where the frozen factor has lost rank, noise is at most ten times what it is in a typical direction.
"""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

RIDGE = 0.01


@dataclass(frozen=True)
class Regulator:
    """The change of basis for one trained factor.

    Attributes:
        trained: the factor that is trained.
        root: M, (r, r), symmetric and positive definite.
        inverse: M⁻¹, (r, r).
    """

    trained: Literal["A", "B"]
    root: Tensor
    inverse: Tensor

    @classmethod
    def beside(cls, trained: Literal["A", "B"], frozen: Tensor) -> Self:
        """The regulator of ``trained`` where the other factor is ``frozen``: A of (r, d_in), or B of (d_out, r)."""
        wide = frozen.detach().double()
        gram = wide @ wide.t() if trained == "B" else wide.t() @ wide
        values, vectors = torch.linalg.eigh(gram)
        mean = values.clamp_min(0).mean()
        # A factor that is zero (B at the start) multiplies no noise: plain coordinates.
        values = torch.where(mean > 0, values.clamp_min(0) + RIDGE * mean, torch.ones_like(values))
        root = (vectors * values.sqrt()) @ vectors.t()
        inverse = (vectors * values.rsqrt()) @ vectors.t()
        return cls(trained, root.to(frozen.dtype), inverse.to(frozen.dtype))

    def measured(self, change: Tensor) -> Tensor:
        """A change of the trained factor in the basis in which it is clipped and noised; the same shape."""
        return self._times(change, self.root)

    def restored(self, measured: Tensor) -> Tensor:
        """The inverse of :meth:`measured`."""
        return self._times(measured, self.inverse)

    def _times(self, change: Tensor, matrix: Tensor) -> Tensor:
        matrix = matrix.to(change.dtype)
        return change @ matrix if self.trained == "B" else matrix @ change

    def reparametrised(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the same product whose trained one has the gradient :meth:`measured` (G)."""
        first, second = (self.root, self.inverse) if self.trained == "B" else (self.inverse, self.root)
        return first @ lora_A, lora_B @ second
