"""Clip rules: per-example norms in, per-example coefficients cᵢ out, and the sensitivity they guarantee."""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

ClippingName = Literal["flat", "per_layer", "automatic"]

# cᵢ‖gᵢ‖ ≤ C must hold although ‖gᵢ‖ was summed in float32: a margin of a few roundings (2⁻¹⁹ ≈ 2e-6).
_MARGIN = 1 - 2.0**-19
# Further out coefficients would overflow float32, or be among its denormal numbers, which no margin covers.
_LEAST_BOUND, _LARGEST_BOUND = 1e-20, 1e20


class ClipRule(Protocol):
    """What the private step needs of a clip rule."""

    max_grad_norm: float

    def coefficients(self, sq_norms: Tensor, layers: Tensor, layer_count: int) -> Tensor:
        """cᵢ for each parameter and example.

        Args:
            sq_norms: (P, N) squared gradient norms by parameter and example, float32 or float64.
            layers: (P,) int64, the number of each parameter's layer, below ``layer_count``.
            layer_count: how many layers this phase trains, those without a gradient in this batch included.

        Returns:
            (P, N), finite and non-negative. Column i is zero where any of the example's norms is not finite.
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
        clipped = (self.max_grad_norm * _MARGIN / norms).clamp(max=1.0)
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
        bound = self.max_grad_norm * _MARGIN / math.sqrt(layer_count)
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
        scaled = self.max_grad_norm * _MARGIN / (sq_norms.sum(0).sqrt() + self.gamma)
        return _exclude_non_finite(scaled.expand_as(sq_norms), sq_norms)


def make_clip_rule(name: ClippingName, max_grad_norm: float) -> ClipRule:
    """The clip rule called ``name`` at bound C = ``max_grad_norm``.

    Raises:
        ValueError: unknown name, or C not within 1e-20 and 1e20 (C = inf, no clipping, goes with "flat" alone).
    """
    rules: dict[str, type] = {"flat": FlatClipping, "per_layer": PerLayerClipping, "automatic": AutomaticClipping}
    if name not in rules:
        raise ValueError(f"Unknown clipping '{name}': choose one of {', '.join(rules)}.")
    if not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be above 0, got {max_grad_norm}: 1.0 is a usual start.")
    if math.isinf(max_grad_norm) and name != "flat":
        raise ValueError(f"max_grad_norm = inf means no clipping, which '{name}' cannot do: use clipping='flat'.")
    if not (_LEAST_BOUND <= max_grad_norm <= _LARGEST_BOUND or math.isinf(max_grad_norm)):
        raise ValueError(f"max_grad_norm must lie within 1e-20 and 1e20, got {max_grad_norm}: 1.0 is a usual start.")
    rule: ClipRule = rules[name](max_grad_norm)
    return rule
