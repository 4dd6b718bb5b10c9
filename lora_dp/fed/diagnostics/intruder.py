"""Intruder dimensions: strong directions of an adapted weight that the pretrained one lacked (arXiv 2410.21228)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_dp.nn.lora_linear import DPLoRALinear

TOP = 10
THRESHOLD = 0.5


@dataclass(frozen=True)
class IntruderDimensions:
    """The strongest directions of one adapted weight, beside those of its pretrained weight.

    Attributes:
        cosines: of each left singular vector of the adapted weight, strongest first: its largest absolute cosine with
            any left singular vector of the pretrained weight, 0 … 1.
        singular_values: that belong to them.
        indices: of the intruders among them, from 0.
    """

    cosines: list[float]
    singular_values: list[float]
    indices: list[int]

    @property
    def count(self) -> int:
        """Number of intruder dimensions."""
        return len(self.indices)


@torch.no_grad()
def intruder_dimensions(
    weight: Tensor, update: Tensor, top: int = TOP, threshold: float = THRESHOLD
) -> IntruderDimensions:
    """Finds the left singular vectors uⱼ of W0 + ΔW, j ≤ ``top``, with ``maxᵢ |⟨uⱼ, u⁰ᵢ⟩| < threshold``.

    The definition of Shuttleworth et al. 2024 (arXiv 2410.21228), where 10 and 0.5 are usual. The absolute value is
    there because a singular vector's sign is arbitrary. Vectors whose singular value is zero to rounding are left out
    on both sides: any basis of that null space would do as well.

    Args:
        weight: W0 (d_out, d_in), pretrained; computed in float64.
        update: ΔW, the same shape.
        top: how many of the strongest directions are looked at, at least 1; fewer where the weight has fewer.
        threshold: 0 … 1.

    Raises:
        ValueError: shapes that differ or are no matrices, a number that is not finite, ``top`` below 1, or
            ``threshold`` out of range.
    """
    if weight.ndim != 2 or weight.shape != update.shape:
        raise ValueError(
            f"Weight and update must be matrices of one shape, not {tuple(weight.shape)} and {tuple(update.shape)}."
        )
    if top < 1 or not 0 <= threshold <= 1:
        raise ValueError(f"top must be at least 1 and threshold from 0 to 1, not {top} and {threshold}.")
    before, after = weight.double(), weight.double() + update.double()
    if not (torch.isfinite(before).all() and torch.isfinite(after).all()):
        raise ValueError("The weight or its update is not finite: the training has diverged, lower its learning rate.")
    pretrained, _ = _left_vectors(before)
    adapted, values = _left_vectors(after)
    adapted, values = adapted[:, :top], values[:top]
    # A weight of zero has no direction: all of the adapted ones are new.
    products = adapted.t() @ pretrained
    cosines = products.abs().amax(1).clamp(max=1.0) if products.shape[1] else torch.zeros_like(values)
    return IntruderDimensions(cosines.tolist(), values.tolist(), torch.nonzero(cosines < threshold).flatten().tolist())


def _left_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors (d_out, rank) and singular values (rank,), largest first."""
    vectors, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    negligible = values[:1] * max(matrix.shape) * torch.finfo(values.dtype).eps
    rank = int((values > negligible).sum())
    return vectors[:, :rank], values[:rank]


def adapted_layers(model: nn.Module) -> dict[str, DPLoRALinear]:
    """The adapted layers of a model by name.

    Raises:
        ValueError: an adapter is merged into its weight, so that W0 is gone.
    """
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, DPLoRALinear)}
    for name, layer in found.items():
        if layer.merged:
            raise ValueError(f"The adapter of '{name}' is merged: call unmerge_adapters first.")
    return found


@torch.no_grad()
def weight_and_update(layer: DPLoRALinear) -> tuple[Tensor, Tensor]:
    """W0 and ΔW of an adapted layer, both (d_out, d_in), in float64.

    W0 is the weight before anything was merged into it, ΔW all that came since: what was merged, and s·B·A.
    """
    before: Tensor = getattr(layer, "original_weight", layer.weight).double()
    now = layer.weight.double()
    if layer.fan_in_fan_out:
        before, now = before.t(), now.t()
    lora_B, lora_A = layer.factors()
    return before, now - before + layer.scaling * (lora_B.double() @ lora_A.double())
