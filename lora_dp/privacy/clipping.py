"""Clip rules: per-example norms in, per-example coefficients cᵢ out, and the sensitivity they guarantee.

*What must hold.* cᵢ‖gᵢ‖ ≤ C for the very values that are summed, at any size of theirs, whoever made the data. So norms
are taken of stored values, never of what they should have been, and in float64. There the square of a float32 is exact,
and lies within 2⁻²⁹⁸ and 2²⁵⁶: none vanishes, none overflows. Coefficients and sums are float64 too.

- *Kept* Gᵢ: all squares are positive, so n of them add up to within n·2⁻⁵³ of their sum (Higham 2002, Accuracy and
  Stability of Numerical Algorithms, section 4.2). The norm is off by half of that: 2⁻²⁴ for n = 2³⁰ numbers.
- *Ghost*: terms of either sign cancel, so a bound of what was lost is added (:mod:`lora_dp.ops.per_example_norm`).
- *Lookups*: rows of one token are added up first, and the sums are both measured and clipped
  (:mod:`lora_dp.ops.example_rows`).

*The margin.* Coefficients are worked out for C·(1 − 2⁻¹⁹). What it leaves, 1.9e-6, covers together:

- the norm's 2⁻²⁴;
- on a GPU C, γ, N, a root and a quotient as float32, 2⁻²² together;
- the sum's own rounding, N²·2⁻⁵³ (:mod:`lora_dp.privacy.noise`), 4.8e-7 for N = 65,536;
- subnormal numbers, as follows.

*The least C* is 1e-20. Some processors, or threads with such a setting, read a float32 below 2⁻¹²⁶ as zero. Then a norm
may miss numbers that another unit sums: of D trained ones at most √D·2⁻¹²⁶, in the gradient of a mean N times that.
cᵢ ≤ 1 under "flat" and "per_layer", cᵢ ≤ C / γ under "automatic", so this is at most 2⁻²⁰·C as long as
N·√D ≤ 2¹⁰⁶·C. At C = 1e-20 that is 2³⁹: a million examples with 2³⁸ trained numbers.

*The largest C* is 1e20. Sums and their noise must fit float32, in which gradients are released: N·C·(1 + σ) stays below
2¹²⁸ for N·(1 + σ) up to 10¹⁸.

*What is dropped.* An example whose norm is not finite gets cᵢ = 0. Squares of float64 gradients overflow above 1.3e154.
Where several backward passes add up in float32, an example is dropped once their norms add up to more than 3.4e38.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lora_dp.kernels.clip_margin import MARGIN
from lora_dp.privacy.clip_bounds import BOUNDS, LARGEST_BOUND, LEAST_BOUND

ClippingName = Literal["flat", "per_layer", "automatic"]


class ClipRule(Protocol):
    """What the private step needs of a clip rule."""

    @property
    def max_grad_norm(self) -> float:
        """C."""
        ...

    def coefficients(self, sq_norms: Tensor, layers: Tensor, layer_count: int) -> Tensor:
        """cᵢ for each parameter and example.

        Args:
            sq_norms: (P, N) squared gradient norms by parameter and example, float64.
            layers: (P,) int64, the number of each parameter's layer, below ``layer_count``.
            layer_count: how many layers this phase trains, those without a gradient in this batch included.

        Returns:
            (P, N) float64, finite and non-negative. Column i is zero where any of the example's norms is not finite.
        """
        ...

    @property
    def sensitivity(self) -> float:
        """Largest L2 norm of Σ over parameters of cᵢgᵢ: what one example can add to the sum."""
        ...


def _exclude_non_finite(coefficients: Tensor, sq_norms: Tensor) -> Tensor:
    finite = torch.isfinite(sq_norms.sum(0, keepdim=True))
    return torch.where(finite, coefficients, torch.zeros_like(coefficients))


@dataclass(frozen=True)
class FlatClipping:
    """cᵢ = min(1, C / ‖gᵢ‖) over all parameters together (Abadi et al. 2016, arXiv 1607.00133)."""

    max_grad_norm: float

    @property
    def sensitivity(self) -> float:
        return self.max_grad_norm

    def coefficients(self, sq_norms: Tensor, layers: Tensor, layer_count: int) -> Tensor:
        norms = sq_norms.sum(0).sqrt()
        clipped = (self.max_grad_norm * MARGIN / norms).clamp(max=1.0)
        return _exclude_non_finite(clipped.expand_as(sq_norms), sq_norms)


@dataclass(frozen=True)
class PerLayerClipping:
    """cᵢₗ = min(1, Cₗ / ‖gᵢₗ‖) layer by layer with Cₗ = C / √L, so that all L together keep C.

    McMahan et al. 2018, arXiv 1710.06963.
    """

    max_grad_norm: float

    @property
    def sensitivity(self) -> float:
        return self.max_grad_norm

    def coefficients(self, sq_norms: Tensor, layers: Tensor, layer_count: int) -> Tensor:
        by_layer = sq_norms.new_zeros(layer_count, sq_norms.shape[1]).index_add_(0, layers, sq_norms)
        bound = self.max_grad_norm * MARGIN / math.sqrt(layer_count)
        return _exclude_non_finite((bound / by_layer.sqrt()).clamp(max=1.0)[layers], sq_norms)


@dataclass(frozen=True)
class AutomaticClipping:
    """cᵢ = C / (‖gᵢ‖ + γ): every gradient is normalised (Bu et al. 2023, arXiv 2206.07136)."""

    max_grad_norm: float
    gamma: float = 0.01

    @property
    def sensitivity(self) -> float:
        return self.max_grad_norm

    def coefficients(self, sq_norms: Tensor, layers: Tensor, layer_count: int) -> Tensor:
        scaled = self.max_grad_norm * MARGIN / (sq_norms.sum(0).sqrt() + self.gamma)
        return _exclude_non_finite(scaled.expand_as(sq_norms), sq_norms)


def make_clip_rule(name: ClippingName, max_grad_norm: float) -> ClipRule:
    """The clip rule called ``name`` at bound C = ``max_grad_norm``.

    Raises:
        ValueError: unknown name, or C not within 1e-20 and 1e20 (C = inf, no clipping, goes with "flat" alone).
    """
    rules: dict[str, type] = {"flat": FlatClipping, "per_layer": PerLayerClipping, "automatic": AutomaticClipping}
    if not isinstance(name, str) or name not in rules:
        raise ValueError(f"Unknown clipping '{name}': choose one of {', '.join(rules)}, or give an AdaptiveClipping.")
    if not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be above 0, got {max_grad_norm}: 1.0 is a usual start.")
    if math.isinf(max_grad_norm) and name != "flat":
        raise ValueError(f"max_grad_norm = inf means no clipping, which '{name}' cannot do: use clipping='flat'.")
    if not (LEAST_BOUND <= max_grad_norm <= LARGEST_BOUND or math.isinf(max_grad_norm)):
        raise ValueError(f"max_grad_norm must lie within {BOUNDS}, got {max_grad_norm}: 1.0 is a usual start.")
    rule: ClipRule = rules[name](max_grad_norm)
    return rule
