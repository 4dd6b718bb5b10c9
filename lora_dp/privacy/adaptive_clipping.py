"""Clipping at a bound that follows a quantile of the norms, whose noised count is paid for (arXiv 1905.03871).

*The release.* Beside Σᵢ cᵢgᵢ a step releases how many of its examples had ‖gᵢ‖ ≤ C, centred:

    S = Σᵢ min(1, C/‖gᵢ‖) gᵢ + z_Δ·C·N(0, I)        T = Σᵢ (bᵢ − ½) + σ_b·N(0, 1),  bᵢ = 1 where ‖gᵢ‖ ≤ C, else 0

One example adds at most C to the first sum and ±½ to the second, whoever else was drawn. In units of each one's noise
the two together move by at most √(1/z_Δ² + (½/σ_b)²). So both are one Gaussian mechanism of noise multiplier z, where

    z⁻² = z_Δ⁻² + (2σ_b)⁻²

The ledger's entry is that of z. A share s of z⁻² pays for the count: σ_b = z / (2√s) and z_Δ = z / √(1 − s). The paper
fixes σ_b at a twentieth of the batch instead, which is s = (10z/L)².

*The bound.* With L the expected batch, b̃ = ½ + T/L estimates the part of the examples with ‖gᵢ‖ ≤ C: a draw at the rate
q holds L of them on average, and who was not drawn adds nothing. Then C ← C·exp(−η(b̃ − γ)). All of it is computed from
released numbers, so that C is public. The drawn number of examples enters nowhere: an empty batch releases T too.

*The grid.* T is rounded as the sums are (:mod:`lora_dp.privacy.noise`). Multiples of ½ lie on its grid already.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_dp.argument_checks import check_number
from lora_dp.privacy.clip_bounds import LARGEST_BOUND, LEAST_BOUND
from lora_dp.privacy.clipping import FlatClipping, make_clip_rule
from lora_dp.privacy.noise import NoiseSource, add_noise, grid_sensitivity

# What one example adds to the centred count, at most: bᵢ − ½ is ½ or −½.
_HALF = 0.5


@dataclass(frozen=True)
class AdaptiveClipping:
    """Asks for flat clipping at a bound that follows a quantile of the norms; ``max_grad_norm`` is where it begins.

    Attributes:
        quantile: γ, the part of the examples that should lie within the bound; 0.5 is the median.
        rate: η: the bound moves by at most a factor of about e^η a step.
        share: part of each step's privacy, z⁻², that pays for the count. The gradient's noise is 1/√(1 − share) as
            large as without: 0.5 % more at 0.01.

    Raises:
        ValueError: quantile or share outside (0, 1), or a rate that is not positive and finite.
        TypeError: one of them is no number.

    >>> follow = AdaptiveClipping(quantile=0.5, share=0.01)
    >>> round(follow.gradient_noise(1.0), 4), round(follow.count_noise(1.0), 4)
    (1.005, 5.0)
    """

    quantile: float = 0.5
    rate: float = 0.2
    share: float = 0.01

    def __post_init__(self) -> None:
        for name in ("quantile", "rate", "share"):
            check_number(name, getattr(self, name))
        for name in ("quantile", "share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}: leave it out.")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate must be positive and finite, got {self.rate}: 0.2 is usual.")

    def gradient_noise(self, noise_multiplier: float) -> float:
        """z_Δ, the noise multiplier of the gradient's sum, where that of both releases together is to be ``z``."""
        return noise_multiplier / math.sqrt(1 - self.share)

    def count_noise(self, noise_multiplier: float) -> float:
        """σ_b, the deviation of the count's noise, in examples."""
        return noise_multiplier * _HALF / math.sqrt(self.share)


class QuantileClipping:
    """Flat clipping at a bound that moves: a :class:`lora_dp.privacy.clipping.ClipRule`.

    Each set of factors that is trained together has a bound of its own. Gradients of LoRA's A and of its B differ in
    length, so that one bound for both would be pulled to and fro by alternating phases.

    Args:
        options: what it follows, and how fast.
        max_grad_norm: the bound before the first release.
        noise_multiplier: z of both releases together; 0 adds no noise.
        source: of rounded Gaussians.

    Raises:
        ValueError: a bound that :func:`lora_dp.privacy.clipping.make_clip_rule` refuses, or one that is infinite.
    """

    def __init__(
        self, options: AdaptiveClipping, max_grad_norm: float, noise_multiplier: float, source: NoiseSource
    ) -> None:
        if math.isinf(max_grad_norm):
            raise ValueError("max_grad_norm = inf is no bound to begin with: give AdaptiveClipping a finite one.")
        make_clip_rule("flat", max_grad_norm)
        self._options, self._source = options, source
        self._start, self._bounds, self._phase = float(max_grad_norm), dict[str, float](), ""
        self.count_noise = options.count_noise(noise_multiplier)

    def __repr__(self) -> str:
        return f"QuantileClipping({self._options}, max_grad_norm={self.max_grad_norm:g})"

    @property
    def max_grad_norm(self) -> float:
        """C of the next step."""
        return self._bounds.get(self._phase, self._start)

    @property
    def sensitivity(self) -> float:
        """As C: of the gradient's sum."""
        return self.max_grad_norm

    def coefficients(self, sq_norms: Tensor, layers: Tensor, layer_count: int) -> Tensor:
        """As :class:`lora_dp.privacy.clipping.FlatClipping` at the present bound."""
        return FlatClipping(self.max_grad_norm).coefficients(sq_norms, layers, layer_count)

    def choose(self, phase: str) -> None:
        """From here on the bound is that of steps which train these factors, "A", "B" or "AB"."""
        self._phase = phase

    def centred_count(self, sq_norms: Tensor, mask: Tensor | None) -> Tensor:
        """Σᵢ mᵢ(bᵢ − ½), private still: what leaves must pass :meth:`released`.

        An example whose gradient is not finite adds nothing, as to the gradient's sum.

        Args:
            sq_norms: (P, N) squared gradient norms by parameter and example, float64.
            mask: (N,) bool or None; an example with False adds nothing.

        Returns:
            A number, float64.
        """
        total = sq_norms.sum(0)
        counted = torch.isfinite(total)
        if mask is not None:
            counted = counted & mask.to(total.device)
        centred = torch.where(total <= self.max_grad_norm**2, _HALF, -_HALF).double()
        return torch.where(counted, centred, torch.zeros_like(centred)).sum()

    def released(self, count: Tensor | float) -> float:
        """T: the count of a whole batch with its noise."""
        value = torch.as_tensor(count, dtype=torch.float64)
        noise = self.count_noise * 2 * grid_sensitivity(_HALF, self.count_noise * 2, 1)
        [noised] = add_noise([value], noise, _HALF, self._source)
        return float(noised)

    def follow(self, count: Tensor | float, expected_batch_size: int) -> None:
        """Release the count of a whole batch, which may be empty, and move the bound: C ← C·exp(−η(½ + T/L − γ))."""
        options = self._options
        below = _HALF + self.released(count) / expected_batch_size
        moved = math.log(self.max_grad_norm) - options.rate * (below - options.quantile)
        within = min(max(moved, math.log(LEAST_BOUND)), math.log(LARGEST_BOUND))
        self._bounds[self._phase] = min(max(math.exp(within), LEAST_BOUND), LARGEST_BOUND)

    def state_dict(self) -> dict[str, float]:
        """The bounds that have moved, by the factors that are trained; public numbers."""
        return dict(self._bounds)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: a bound out of range.
            TypeError: one that is no number.
        """
        for phase, bound in state.items():
            check_number(f"The saved bound of '{phase}'", bound)
            if not LEAST_BOUND <= bound <= LARGEST_BOUND:
                raise ValueError(f"The saved bound of '{phase}' is {bound}: give what state_dict() returned.")
        self._bounds = {phase: float(bound) for phase, bound in state.items()}
