"""The one object that owns the clip rule, the clip bound and the noise, and so matches noise to sensitivity."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lora_dp.argument_checks import Fixed
from lora_dp.ops.clip_and_sum import can_clip_and_sum, clip_and_sum
from lora_dp.ops.clipped_sum import clipped_sum_kept
from lora_dp.ops.private_update import ExampleSum
from lora_dp.privacy.adaptive_clipping import AdaptiveClipping, QuantileClipping
from lora_dp.privacy.clipping import (
    AutomaticClipping,
    ClippingName,
    ClipRule,
    FlatClipping,
    PerLayerClipping,
    make_clip_rule,
)
from lora_dp.privacy.noise import NoiseSource, add_noise, grid_sensitivity, grid_step

# What the kernel calls the rules that it knows.
_KERNEL_RULES: dict[type, Literal["flat", "per_layer", "automatic"]] = {
    FlatClipping: "flat",
    QuantileClipping: "flat",
    PerLayerClipping: "per_layer",
    AutomaticClipping: "automatic",
}


class Mechanism:
    """Σᵢ mᵢcᵢgᵢ + σ·C·z of one private step (Abadi et al. 2016, arXiv 1607.00133).

    Args:
        rule: clip rule with its bound C.
        noise_multiplier: σ, the noise's deviation in units of the rule's sensitivity; 0 adds none.
        source: of rounded Gaussians.

    Raises:
        ValueError: σ negative or NaN, or above 0 without a finite clip bound.
    """

    rule = Fixed[ClipRule]()
    noise_multiplier = Fixed[float]()
    source = Fixed[NoiseSource]()

    def __init__(self, rule: ClipRule, noise_multiplier: float, source: NoiseSource):
        if not 0 <= noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier must be 0 or a finite positive number, got {noise_multiplier}.")
        if noise_multiplier and math.isinf(rule.sensitivity):
            raise ValueError("Noise without clipping protects nobody: set a finite max_grad_norm.")
        self.rule, self.noise_multiplier, self.source = rule, noise_multiplier, source

    def noise_std(self, size: int) -> float:
        """Deviation of the noise on a sum of ``size`` numbers, the grid's rounding included."""
        if self.noise_multiplier == 0:
            return 0.0
        std = self.noise_multiplier * grid_sensitivity(self.rule.sensitivity, self.noise_multiplier, size)
        if std < sys.float_info.min * 2.0**64:
            raise ValueError(
                f"noise_multiplier {self.noise_multiplier:g} at max_grad_norm {self.rule.max_grad_norm:g} is noise too "
                "small for floating-point numbers: raise one of them."
            )
        return std

    def grid(self, size: int) -> tuple[float, float]:
        """Step of the grid for a sum of ``size`` numbers, and the noise's deviation in steps; (1, 0) without noise."""
        std = self.noise_std(size)
        if std == 0:
            return 1.0, 0.0
        step = grid_step(std, self.rule.sensitivity)
        return step, max(std / step, 1.0)

    def coefficients(self, sq_norms: Tensor, layers: Tensor, layer_count: int, mask: Tensor | None) -> Tensor:
        """cᵢ·mᵢ by parameter and example: (P, N); see :class:`lora_dp.privacy.clipping.ClipRule`."""
        coefficients = self.rule.coefficients(sq_norms, layers, layer_count)
        if mask is None:
            return coefficients
        return torch.where(mask.to(coefficients.device), coefficients, torch.zeros_like(coefficients))

    def clipped_sums(
        self,
        kept: Mapping[int, Tensor],
        sq_norms: Tensor,
        layers: Tensor,
        layer_count: int,
        mask: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, dict[int, Tensor | ExampleSum]]:
        """Coefficients of all parameters, and Σᵢ mᵢcᵢ Gᵢ of those whose per-example gradients were kept.

        Args:
            kept: Gᵢ ``(N, *shape)`` by row of ``sq_norms``.
            sq_norms: (P, N), of gradients not yet multiplied by ``scale``.
            layers, layer_count: as for :class:`lora_dp.privacy.clipping.ClipRule`.
            mask: (N,) bool or None.
            scale: factor of every gradient: N where the loss is a mean.

        Returns:
            (P, N), ``scale`` included, and by row the sums, or what :func:`total` makes one.
        """
        rule, gradients = _KERNEL_RULES.get(type(self.rule)), list(kept.values())
        if rule is None or not can_clip_and_sum(gradients, sq_norms):
            coefficients = self.coefficients(sq_norms * (scale * scale), layers, layer_count, mask) * scale
            wide = coefficients.double()
            return coefficients, {
                row: ExampleSum(gradient, wide[row].to(gradient.device)) for row, gradient in kept.items()
            }
        coefficients, sums = clip_and_sum(
            gradients,
            list(kept),
            sq_norms,
            layers,
            layer_count,
            rule,
            self.rule.max_grad_norm,
            getattr(self.rule, "gamma", 0.0),
            mask,
            scale,
        )
        return coefficients, dict(zip(kept, sums, strict=True))

    def centred_count(self, sq_norms: Tensor, mask: Tensor | None, scale: float) -> Tensor | float:
        """Σᵢ mᵢ(bᵢ − ½) where the bound follows a quantile (:mod:`lora_dp.privacy.adaptive_clipping`), else 0.

        Args:
            sq_norms, mask, scale: as for :meth:`clipped_sums`.
        """
        if not isinstance(self.rule, QuantileClipping):
            return 0.0
        return self.rule.centred_count(sq_norms * (scale * scale), mask)

    def release(self, sums: Sequence[Tensor]) -> list[Tensor]:
        """The clipped sums of all trained parameters, noised: same shapes, float64."""
        std = self.noise_std(sum(value.numel() for value in sums))
        return add_noise([value.to(sums[0].device) for value in sums], std, self.rule.sensitivity, self.source)


def make_mechanism(
    clipping: ClippingName | AdaptiveClipping, max_grad_norm: float, noise_multiplier: float, source: NoiseSource
) -> Mechanism:
    """The mechanism whose release, a noised count included where there is one, has this noise multiplier.

    Raises:
        ValueError: as :class:`Mechanism` and the clip rule say.
    """
    if not isinstance(clipping, AdaptiveClipping):
        return Mechanism(make_clip_rule(clipping, max_grad_norm), noise_multiplier, source)
    rule = QuantileClipping(clipping, max_grad_norm, noise_multiplier, source)
    return Mechanism(rule, clipping.gradient_noise(noise_multiplier), source)


def total(clipped: Tensor | ExampleSum) -> Tensor:
    """The sum itself."""
    return clipped if isinstance(clipped, Tensor) else clipped_sum_kept(*clipped)
