"""Sums over features, class by class, as the parameters of a layer: one private step from zero releases them.

An example with features u, ‖u‖ ≤ 1, and class y adds

    u, and τ, to the row of its class        (class sums and counts)
    ω·u and κ·u² to two rows of all classes  (first and second moments)

a vector of norm at most √(1 + τ² + ω² + κ²) = :attr:`FeatureSums.sensitivity`, since ‖u²‖ ≤ ‖u‖² ≤ 1. It is the
gradient of :func:`lora_dp.losses.feature_sums_loss`, whatever the parameters are. So a step of SGD at rate 1 from zero,
clipped at the sensitivity, is the Gaussian mechanism on these sums. Noise, ledger, isolation and audits are those of
any step. Such sums start a head without training ("prototypes", arXiv 2406.08039), and centre and scale its features.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_dp.argument_checks import check_number
from lora_dp.nn.layers import DPLinear
from lora_dp.nn.private_module import check_sizes


@dataclass(frozen=True)
class SumWeights:
    """What an example adds beside its features to the sum of its class; 0 leaves a part out.

    Args:
        counts: τ, of the number of examples by class.
        first: ω, of the sum of features over all classes.
        second: κ, of the sum of their squares, number by number.

    Raises:
        ValueError: a negative or infinite weight.
        TypeError: no number.

    >>> SumWeights(counts=0.5, first=0.0, second=1.0).sensitivity
    1.5
    """

    counts: float = 0.5
    first: float = 1.0
    second: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("counts", self.counts), ("first", self.first), ("second", self.second)):
            check_number(name, value)
            if not 0 <= value < math.inf:
                raise ValueError(f"The weight {name} must be 0 or a finite positive number, got {value}.")

    @property
    def sensitivity(self) -> float:
        """√(1 + τ² + ω² + κ²): the longest vector that one example adds."""
        return math.sqrt(1 + self.counts**2 + self.first**2 + self.second**2)


@dataclass(frozen=True)
class FeatureMoments:
    """Released means over all examples, noise included.

    Attributes:
        class_sums: (K, d): Σ of the features of each class, over the number of all examples.
        shares: (K,): the part of the examples that each class has; None if it was not released.
        first, second: (d,): means of the features and of their squares; None if not released.
        noise: deviation of the noise in each number of ``class_sums``; that of the others is this over their weight.
        weights: of the others.
    """

    class_sums: Tensor
    shares: Tensor | None
    first: Tensor | None
    second: Tensor | None
    noise: float
    weights: SumWeights


def unit_length(features: Tensor) -> Tensor:
    """Features (…, d) divided by their length, in float32 or float64; zeros stay zeros.

    >>> unit_length(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    wide = features if features.dtype == torch.float64 else features.float()
    # By the largest number first: squares of very small or large ones would vanish or overflow.
    largest = wide.abs().amax(-1, keepdim=True)
    scaled = wide / torch.where(largest > 0, largest, torch.ones_like(largest))
    return scaled / scaled.norm(dim=-1, keepdim=True).clamp(min=1.0)


class FeatureSums(nn.Module):
    """Scores whose gradients are what an example adds to the sums.

    Args:
        in_features: d.
        classes: K.
        weights: of counts and moments beside the class sums.
        device, dtype: of the sums.

    >>> from lora_dp.losses import feature_sums_loss
    >>> sums = FeatureSums(3, 2)
    >>> u, y = unit_length(torch.eye(3)), torch.tensor([0, 1, 1])
    >>> feature_sums_loss(sums(u), y).sum().backward()
    >>> 0 - sums.by_class.weight.grad  # class sums, and counts by half
    tensor([[1.0000, 0.0000, 0.0000, 0.5000],
            [0.0000, 1.0000, 1.0000, 1.0000]])
    """

    def __init__(
        self,
        in_features: int,
        classes: int,
        weights: SumWeights | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_sizes(in_features=in_features, classes=classes)
        self.in_features, self.classes, self.weights = in_features, classes, weights or SumWeights()
        self.by_class = DPLinear(in_features + 1, classes, bias=False, device=device, dtype=dtype)
        self.over_all = DPLinear(2 * in_features, 1, bias=False, device=device, dtype=dtype)
        self.clear()

    @torch.no_grad()
    def clear(self) -> None:
        """Begin from zero."""
        for parameter in self.parameters():
            parameter.zero_()

    @property
    def sensitivity(self) -> float:
        """Norm of what one example adds, at most; the clip bound of the step."""
        return self.weights.sensitivity

    def forward(self, units: Tensor) -> Tensor:
        """Scores (…, K + 1) of features (…, d) of length at most 1, in front examples."""
        counts = units.new_full((*units.shape[:-1], 1), self.weights.counts)
        moments = torch.cat([self.weights.first * units, self.weights.second * units.square()], -1)
        return torch.cat([self.by_class(torch.cat([units, counts], -1)), self.over_all(moments)], -1)

    def moments(self, noise: float) -> FeatureMoments:
        """What the sums hold after a step of rate 1 from zero.

        Args:
            noise: deviation of the noise in each number: σ · sensitivity / expected batch size, and where a server has
                averaged K clients, over √K.
        """
        by_class, over_all = self.by_class.weight.detach().double(), self.over_all.weight.detach().double()[0]
        weights, d = self.weights, self.in_features
        return FeatureMoments(
            by_class[:, :d],
            by_class[:, d] / weights.counts if weights.counts else None,
            over_all[:d] / weights.first if weights.first else None,
            over_all[d:] / weights.second if weights.second else None,
            noise,
            weights,
        )
