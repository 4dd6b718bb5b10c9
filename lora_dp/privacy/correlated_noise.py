"""Noise that later steps partly take back: a banded Toeplitz matrix factorisation (arXiv 2306.08153, 2405.13763).

*The idea.* What a run learns is the sum of its gradients, so that noise which a later step takes back costs privacy
once and accuracy little. Let z₀, z₁, … be independent N(0, I), and C(x) = 1 + c₁x + … + c_{b−1}x^{b−1} with b bands.
Step t releases its clipped sum Sₜ with the noise vₜ, in units of the noise's deviation s:

    vₜ = s·zₜ − c₁vₜ₋₁ − … − c_{b−1}vₜ₋ᵦ₊₁        that is v = s·C⁻¹z with the lower-triangular Toeplitz matrix C

The coefficients are those of (1 − x)^(−1/2), cut off after b: cⱼ = cⱼ₋₁(2j − 1)/(2j), as of the banded square root of
Kalinin and Lampert 2024 (arXiv 2405.13763), in multiples of 2⁻¹⁶. They need no search, and no length of the run. Beside
the best ones (numerically, 100 to 2,000 steps) the error of sums is 3 to 5 % larger at 2 bands, 2 to 17 % at 16.

*What it costs.* Multiply all releases up to a step by C: they are, one to one, Σⱼ cⱼSₜ₋ⱼ + s·zₜ. Examples are split
into b groups (:mod:`lora_dp.privacy.cyclic_sampling`), and step t draws from group t mod b alone. So two turns of one
example are b steps apart. Its turn at step k enters rows k, …, k + b − 1, where no other turn of it enters. Let g be
its clipped gradient. It is drawn by a coin of the group's rate, on which nothing else depends. Given all that was
released before and all other coins, these rows are, but for a shift that is known,

    coin · (1, c₁, …, c_{b−1}) ⊗ g + s·(z_k, …, z_{k+b−1})        with ‖(1, c₁, …, c_{b−1}) ⊗ g‖ ≤ ‖c‖·C

the Gaussian mechanism on a Poisson sample, of noise multiplier σ where s = σ·‖c‖·C. The shift may depend on what these
rows have released already, as the next gradients do: whoever sees the releases can subtract it. T steps are at most
⌈T/b⌉ turns of any example. Each turn is one step of the ledger, at b times the rate of a plain run, as BandMF accounts
it (Choquette-Choo et al. 2023, arXiv 2306.08153). It is counted before the first step of every round of b.

*Why bands of C, not of C⁻¹.* The banded inverse square root (arXiv 2505.12128) has b bands in C⁻¹, so that C is full.
Then all turns of an example meet in one row: nothing is amplified by sampling, and the number of turns must be known
beforehand. What a ledger adds up step by step is the banded C.

*The grid.* All is in whole steps of the grid of :mod:`lora_dp.privacy.noise`, with X = R(S) and v whole:

    vₜ = round(s·zₜ) − round(Σ_{j≥1} cⱼvₜ₋ⱼ)        rₜ = Xₜ + vₜ

Since vₜ₋ⱼ = rₜ₋ⱼ − Xₜ₋ⱼ, the release is round(Nₜ + s·zₜ) with Nₜ = Xₜ − round(Σ cⱼ(rₜ₋ⱼ − Xₜ₋ⱼ)) whole: the Gaussian
mechanism on Nₜ, exactly. The products are added up in integers, and rounding moves each number of the b − 1 later rows
by a step more, at most. Over the rows of a turn the sensitivity is within

    ‖c‖·C + ‖c‖·√size·Δ + √((b − 1)·size)·Δ  ≤  ‖c‖·(C + √size'·Δ)        with size' = size·(1 + √(b − 1))²

*What is kept.* The last b − 1 noises of every number, as secret as the generator's key: whoever has them subtracts
them. They lie in memory alone, are never saved, and are gone with the process. A resumed run begins a new chain, with
new groups: a mechanism of its own, whose turns are counted anew. What the old chain had not yet taken back stays.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_dp.argument_checks import check_count
from lora_dp.privacy.clipping import ClipRule
from lora_dp.privacy.mechanism import Mechanism
from lora_dp.privacy.noise import NoiseSource

# Coefficients are multiples of 1/_ONE, so that they and noise are multiplied in integers.
_BITS = 16
_ONE = 1 << _BITS


@dataclass(frozen=True)
class BandedNoise:
    """Asks for noise that the next ``bands`` − 1 steps partly take back (:mod:`lora_dp.privacy.correlated_noise`).

    Attributes:
        bands: b, 2 or more. Examples are split into as many groups, whose turns to be drawn from go round.

    Raises:
        ValueError: fewer than two.
        TypeError: no whole number.

    >>> BandedNoise(bands=4).coefficients
    (1.0, 0.5, 0.375, 0.3125)
    >>> round(BandedNoise(bands=4).norm, 3)
    1.22
    """

    bands: int

    def __post_init__(self) -> None:
        check_count("bands", self.bands, least=2)

    @property
    def coefficients(self) -> tuple[float, ...]:
        """1, c₁, …, c_{b−1}: of (1 − x)^(−1/2), to the nearest multiple of 2⁻¹⁶."""
        exact = [1.0]
        for j in range(1, self.bands):
            exact.append(exact[-1] * (2 * j - 1) / (2 * j))
        return tuple(round(value * _ONE) / _ONE for value in exact)

    @property
    def norm(self) -> float:
        """‖c‖: how far one turn of an example moves, in clip bounds."""
        return math.hypot(*self.coefficients)


class BandedSource:
    """Correlated rounded Gaussians out of independent ones: a :class:`lora_dp.privacy.noise.NoiseSource`.

    Args:
        options: the bands.
        source: of independent rounded Gaussians.

    Attributes:
        secure: whether ``source`` is.

    >>> from lora_dp.privacy.randomness import SeededSource
    >>> source = BandedSource(BandedNoise(bands=2), SeededSource(0))
    >>> first, second = (source.rounded_gaussians([(3,)], 1e6, torch.device("cpu"))[0] for _ in range(2))
    >>> plain = SeededSource(0)
    >>> one, two = (plain.rounded_gaussians([(3,)], 1e6, torch.device("cpu"))[0] for _ in range(2))
    >>> torch.equal(first, one), int((second - (two - first / 2)).abs().ceil().max())
    (True, 1)
    """

    def __init__(self, options: BandedNoise, source: NoiseSource):
        self._whole = [int(value * _ONE) for value in options.coefficients[1:]]
        self._source = source
        self._past: deque[list[Tensor]] = deque(maxlen=options.bands - 1)
        self.secure = bool(getattr(source, "secure", False))

    def rounded_gaussians(self, shapes: Sequence[Sequence[int]], scale: float, device: torch.device) -> list[Tensor]:
        """The next step's vₜ, one int64 tensor of each shape; each call is a step.

        Raises:
            RuntimeError: other shapes than before: what is trained was changed.
            ValueError: scale outside [1, 2³³).
        """
        if self._past and [value.shape for value in self._past[0]] != [torch.Size(shape) for shape in shapes]:
            raise RuntimeError(
                "Correlated noise takes back that of the last steps, and what is trained has changed since: call "
                "make_private again after freezing or unfreezing parameters."
            )
        noise = self._source.rounded_gaussians(shapes, scale, device)
        for place, value in enumerate(noise):
            value.sub_(self._taken_back(place, value))
        self._past.appendleft(noise)
        return noise

    def _taken_back(self, place: int, like: Tensor) -> Tensor:
        """round(Σ_{j≥1} cⱼvₜ₋ⱼ) of the parameter in this place; no product reaches 2⁶³."""
        sums = torch.zeros_like(like)
        for whole, noise in zip(self._whole, self._past, strict=False):
            sums.add_(noise[place].to(like.device), alpha=whole)
        return sums.add_(_ONE // 2).bitwise_right_shift_(_BITS)


class CorrelatedMechanism(Mechanism):
    """A mechanism each of whose releases takes back a part of the noise of those before.

    Args:
        rule, source: as for :class:`lora_dp.privacy.mechanism.Mechanism`.
        noise_multiplier: σ of all releases together which one turn of an example enters.
        options: the bands.

    Attributes:
        noise_multiplier: σ·‖c‖, of what is drawn anew in each step.
    """

    def __init__(self, rule: ClipRule, noise_multiplier: float, source: NoiseSource, options: BandedNoise):
        super().__init__(rule, noise_multiplier * options.norm, BandedSource(options, source))
        self._widened = (1 + math.sqrt(options.bands - 1)) ** 2

    def noise_std(self, size: int) -> float:
        """s: the deviation of what is drawn anew in each step, the grid's rounding included."""
        return super().noise_std(math.ceil(size * self._widened))
