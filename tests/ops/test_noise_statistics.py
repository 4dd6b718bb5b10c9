"""Rounded Gaussians look like what they are.

Every check rejects a right sampler with probability at most LEVEL = 4e-9, or twice that where its p-value
takes the normal, the χ² or a limit distribution for the exact one:

- mean, deviation, skewness and kurtosis: sums of the Hermite polynomials He₁ … He₄, normal in the limit. For n = 10⁶
  the skewness of He₄, 14.7, makes the tail at 5.9 deviations 1.6 times the normal one; the others are closer;
- Kolmogorov and Smirnov, Anderson and Darling: at the edges of 2¹⁶ cells of equal probability, with the limits'
  p-values. The first can only lose by that; the second's weights agree to 2⁻¹⁶, and its upper tail is bounded below;
- tails beyond 1, 2, 3, 4 and 5 deviations: the exact binomial distribution, both sides;
- the lowest byte is uniform: χ² of 256 cells;
- correlations of values and of squares, at lags 1 to 16, within pairs, and across parameters, draws and both: normal in
  the limit;
- at scales 1 and 3: χ² against the rounded Gaussian's probabilities, cells of less than 10⁴ expected counts merged.

At scales near 2³² rounding moves a value by less than 2⁻³³ deviations and the distribution function by less than 5e-11,
while 10⁸ values resolve 3e-4: there the limits for continuous values hold as they are. At scales 1 and 3 the
distribution is discrete through and through, and the χ² test is that of a discrete one.

That makes CHECKS = 54 checks a run, in an ordinary and in a long run: 2 · 54 · 2 · LEVEL = 8.7e-7 for the whole file.
The ordinary run has a fixed key, so it passes always or never; the long one draws a new key each time.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from scipy import special, stats

from lora_dp import _native
from lora_dp.ops.rounded_gaussian import rounded_gaussian_

LEVEL = 4e-9
CHECKS = 54

CELLS = 2**16
BOUNDS = [1, 2, 3, 4, 5]
LAGS = range(1, 17)
WIDE = 2.0**32 * 1.7  # as training uses it: deviation over grid step lies in [2³², 2³³)

Values = Callable[[int, int], np.ndarray]  # of a parameter and a draw


def two_sided(z: float) -> float:
    return float(2 * stats.norm.sf(abs(z)))


def binomial(count: int, n: int, probability: float) -> float:
    """Exact: twice the probability of as few or as many."""
    distribution = stats.binom(n, probability)
    return float(min(1, 2 * min(distribution.cdf(count), distribution.sf(count - 1))))


def anderson_darling(statistic: float) -> float:
    """P(A² > statistic) in the limit, at most a tenth too large below 1e-3.

    A² is Σ χ²₁ / (j (j + 1)) (Anderson and Darling 1954). Its tail is that of the first term, χ²₁ / 2, times
    Π (1 − 2 / (j (j + 1)))^(−1/2) over j ≥ 2, which is √3 (Zolotarev 1961); this is 2 % to 6 % too small there.
    """
    return float(min(1, 1.08 * math.sqrt(3) * stats.chi2.sf(2 * statistic, 1)))


class Correlation:
    """Of values, and of their squares, which are standard in the mean under the null hypothesis."""

    def __init__(self) -> None:
        self.n, self.values, self.squares = 0, 0.0, 0.0

    def add(self, left: tuple[np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray]) -> None:
        self.n += len(left[0])
        self.values += float(left[0] @ right[0])
        self.squares += float(left[1] @ right[1])

    def p_values(self, where: str) -> dict[str, float]:
        root = math.sqrt(self.n)
        return {f"values {where}": two_sided(self.values / root), f"squares {where}": two_sided(self.squares / root)}


def standard(values: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """z, and (z² − 1) / √2: both of mean 0 and deviation 1."""
    z = values / scale
    return z, (z * z - 1) * math.sqrt(0.5)


def measure(values: Values, parameters: int, draws: int, scale: float = WIDE) -> dict[str, float]:
    """The p-values of all checks but the χ² tests at small scales; the arrays of ``values`` have one length."""
    n = 0
    hermite, beyond = np.zeros(4), np.zeros(len(BOUNDS), np.int64)
    cells, low_bytes = np.zeros(CELLS, np.int64), np.zeros(256, np.int64)
    lagged = [Correlation() for _ in LAGS]
    in_pairs, over_parameters, over_draws, over_both = (Correlation() for _ in range(4))
    above: list[tuple[np.ndarray, np.ndarray]] = []  # the draw before, by parameter
    for draw in range(draws):
        row = []
        for parameter in range(parameters):
            integers = values(parameter, draw)
            z, squares = both = standard(integers, scale)
            n += len(z)
            hermite += [z.sum(), math.sqrt(2) * squares.sum(), z @ (z * z - 3), (z * z) @ (z * z - 6) + 3 * len(z)]
            beyond += [int((np.abs(integers) > bound * scale).sum()) for bound in BOUNDS]
            cells += np.bincount(np.minimum(special.ndtr(z) * CELLS, CELLS - 1).astype(np.int32), minlength=CELLS)
            low_bytes += np.bincount(integers & 255, minlength=256)
            for lag, correlation in zip(LAGS, lagged, strict=True):
                correlation.add((z[:-lag], squares[:-lag]), (z[lag:], squares[lag:]))
            in_pairs.add((z[::2], squares[::2]), (z[1::2], squares[1::2]))
            if row:
                over_parameters.add(row[-1], both)
            if above:
                over_draws.add(above[parameter], both)
                if row:
                    over_both.add(above[parameter - 1], both)
            row.append(both)
        above = row

    edges = np.arange(1, CELLS) / CELLS
    excess = np.cumsum(cells)[:-1] / n - edges
    result = {
        "mean": two_sided(hermite[0] / math.sqrt(n)),
        "deviation": two_sided(hermite[1] / math.sqrt(2 * n)),
        "skewness": two_sided(hermite[2] / math.sqrt(6 * n)),
        "kurtosis": two_sided(hermite[3] / math.sqrt(24 * n)),
        "Kolmogorov-Smirnov": float(stats.kstwobign.sf(math.sqrt(n) * np.abs(excess).max())),
        "Anderson-Darling": anderson_darling(n * float((excess**2 / (edges * (1 - edges))).sum()) / CELLS),
        "lowest byte": float(stats.chisquare(low_bytes).pvalue),
    }
    for bound, count in zip(BOUNDS, beyond.tolist(), strict=True):
        # An integer lies beyond where the value itself is beyond the middle between it and the last one within.
        inside = (math.floor(bound * scale) + 0.5) / scale
        result[f"beyond {bound}"] = binomial(count, n, 2 * float(stats.norm.sf(inside)))
    for lag, correlation in zip(LAGS, lagged, strict=True):
        result |= correlation.p_values(f"at lag {lag}")
    return (
        result
        | in_pairs.p_values("in pairs")
        | over_parameters.p_values("over parameters")
        | over_draws.p_values("over draws")
        | over_both.p_values("over both")
    )


def rounded_probabilities(scale: float, n: int) -> tuple[int, np.ndarray]:
    """P(k) for |k| < most, and that of all beyond on either side; each at least 10⁴ / n."""
    most = next(k for k in range(1, 100) if n * stats.norm.sf((k + 0.5) / scale) < 1e4)
    edges = (np.arange(-most, most) + 0.5) / scale
    return most, np.diff(special.ndtr(edges), prepend=0, append=1)


def chi_square(chunks: Iterator[np.ndarray], scale: float, n: int) -> float:
    most, probabilities = rounded_probabilities(scale, n)
    counts = np.zeros(len(probabilities), np.int64)
    for chunk in chunks:
        counts += np.bincount(np.clip(chunk, -most, most) + most, minlength=len(counts))
    assert counts.sum() == n
    return float(stats.chisquare(counts, n * probabilities).pvalue)


def draw_values(key: int, parameter: int, draw: int, scale: float, n: int) -> np.ndarray:
    return rounded_gaussian_(torch.empty(n, dtype=torch.int64), key, parameter, draw, scale).numpy()


def check(p_values: dict[str, float]) -> None:
    rejected = {name: p for name, p in p_values.items() if not p >= LEVEL}
    assert not rejected, f"not rounded Gaussians: {rejected}"


def run(key: int, parameters: int, draws: int, size: int, small_chunks: int) -> None:
    p_values = measure(lambda parameter, draw: draw_values(key, parameter, draw, WIDE, size), parameters, draws)
    for scale in (1.0, 3.0):
        chunks = (draw_values(key, 0, draws + chunk, scale, size) for chunk in range(small_chunks))
        p_values[f"small scale {scale}"] = chi_square(chunks, scale, small_chunks * size)
    assert len(p_values) == CHECKS
    check(p_values)


def test_checks_share_out_the_false_alarms():
    assert 2 * CHECKS * 2 * LEVEL <= 1e-6
    for statistic, probability in ((3.857, 0.010241), (10, 1.38150e-5), (18, 3.47482e-9), (25, 2.69514e-12)):
        assert 0.99 <= anderson_darling(statistic) / probability < 1.1
    most, probabilities = rounded_probabilities(3.0, 10**6)
    assert len(probabilities) == 2 * most + 1 and probabilities.sum() == pytest.approx(1, abs=1e-12)
    assert probabilities[most] == pytest.approx(math.erf(0.5 / 3 / math.sqrt(2)), rel=1e-12)
    assert probabilities.min() * 10**6 > 1e4 * 0.9


def test_a_million_values_are_rounded_gaussians(key):
    run(key, 2, 2, 250_000, 4)


@pytest.mark.long
def test_a_hundred_million_values_are_rounded_gaussians():
    """A fresh key, 1.007e8 values at the scale of training and 2.1e7 at each small one, half a million at a time."""
    key = _native.new_key()
    try:
        run(key, 6, 32, 2**19, 40)
    finally:
        _native.drop_key(key)


def each(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Values], Values]:
    """A defect of every draw by itself."""
    return lambda values: lambda parameter, draw: change(values(parameter, draw))


def of_standard(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Values], Values]:
    return each(lambda values: np.rint(change(values / WIDE) * WIDE).astype(np.int64))


def with_signs(magnitudes: np.ndarray, signs: np.ndarray) -> np.ndarray:
    return np.abs(magnitudes) * np.where(signs < 0, -1, 1)


def second_of_pairs(change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[Values], Values]:
    return each(lambda values: np.stack([values[::2], change(values[::2], values[1::2])], 1).ravel())


def sums_of_twelve(parameter: int, draw: int) -> np.ndarray:
    uniform = np.random.default_rng((parameter, draw)).uniform(size=(12, 100_000))
    return np.rint((uniform.sum(0) - 6) * WIDE).astype(np.int64)


DEFECTS: dict[str, tuple[Callable[[Values], Values], set[str]]] = {
    "deviation one percent too large": (of_standard(lambda z: 1.01 * z), {"deviation"}),
    "deviation one percent too small": (of_standard(lambda z: 0.99 * z), {"deviation"}),
    "mean shifted": (of_standard(lambda z: z + 0.01), {"mean", "Kolmogorov-Smirnov", "Anderson-Darling"}),
    "skewed": (of_standard(lambda z: z + 0.01 * (z * z - 1)), {"skewness"}),
    "sums of twelve uniforms": (lambda values: sums_of_twelve, {"kurtosis", "beyond 3"}),
    "cut off at four deviations": (of_standard(lambda z: np.clip(z, -3.9999, 3.9999)), {"beyond 4"}),
    "cut off at three deviations": (of_standard(lambda z: np.where(np.abs(z) > 3, z / 3, z)), {"beyond 3", "kurtosis"}),
    "far tail too far": (of_standard(lambda z: np.where(np.abs(z) > 4, z * 1.3, z)), {"beyond 5"}),
    "one in a hundred is zero": (
        each(lambda values: np.where(np.arange(len(values)) % 100, values, 0)),
        {"Kolmogorov-Smirnov"},
    ),
    "lowest bit never set": (each(lambda values: values & ~1), {"lowest byte"}),
    "lowest byte never set": (each(lambda values: values & ~255), {"lowest byte"}),
    "neighbours of one sign": (
        each(lambda values: with_signs(values, np.repeat(values[::2], 2))),
        {"values at lag 1", "values in pairs"},
    ),
    "pairs repeat a value": (second_of_pairs(lambda first, second: first), {"values in pairs"}),
    "pairs share a magnitude": (second_of_pairs(with_signs), {"squares in pairs", "squares at lag 1"}),
    "pairs leave out a quarter": (
        second_of_pairs(lambda first, second: with_signs(second, np.where(second < first, first, second))),
        {"values in pairs"},
    ),
    "every block twice": (
        each(lambda values: values.reshape(-1, 2, 8)[:, [0, 0]].ravel()),
        {"values at lag 8", "squares at lag 8"},
    ),
    "two blocks share their signs": (
        each(lambda values: with_signs(values, values.reshape(-1, 2, 8)[:, [0, 0]].ravel())),
        {"values at lag 8"},
    ),
    "deviation that wanders": (
        each(
            lambda values: np.rint(
                values * np.repeat(np.where(np.arange(len(values) // 100) % 2, 1.1, 0.9), 100)
            ).astype(np.int64)
        ),
        {f"squares at lag {lag}" for lag in LAGS},
    ),
    "parameter ignored": (
        lambda values: lambda parameter, draw: values(0, draw),
        {"values over parameters", "squares over parameters"},
    ),
    "draw ignored": (
        lambda values: lambda parameter, draw: values(parameter, 0),
        {"values over draws", "squares over draws"},
    ),
    "parameter and draw mixed": (
        lambda values: lambda parameter, draw: values(parameter ^ draw, 0),
        {"values over both", "squares over both"},
    ),
    "parameters differ in sign": (
        lambda values: lambda parameter, draw: with_signs(values(0, draw), values(parameter + 2, draw)),
        {"squares over parameters"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("defect", DEFECTS)
def test_planted_defects_are_caught(defect, key):
    """Planted in the values of the ordinary run, which pass as they are: each check named must reject."""
    plant, caught = DEFECTS[defect]
    values = plant(lambda parameter, draw: draw_values(key, parameter, draw, WIDE, 250_000))
    p_values = measure(values, 2, 2)
    assert {name: p for name, p in p_values.items() if name in caught and p >= LEVEL} == {}
    with pytest.raises(AssertionError, match="not rounded Gaussians"):
        check(p_values)


@pytest.mark.parametrize(
    "defect",
    [
        lambda z: np.floor(3 * z),
        lambda z: np.trunc(3 * z),
        lambda z: np.rint(3.03 * z),
        lambda z: np.rint(2.97 * z),
        lambda z: np.rint(3 * z + 0.03),
        lambda z: np.where(np.abs(z) > 3, 0, np.rint(3 * z)),
        lambda z: np.rint(np.rint(3 * z * 4) / 4),
    ],
    ids=["rounded down", "rounded to zero", "too wide", "too narrow", "shifted", "cut off", "rounded twice"],
)
def test_planted_defects_of_rounding_are_caught(defect):
    z = np.random.default_rng(0).standard_normal(10**6)
    assert chi_square(iter([np.rint(3 * z).astype(np.int64)]), 3.0, 10**6) >= LEVEL
    assert chi_square(iter([defect(z).astype(np.int64)]), 3.0, 10**6) < LEVEL
