"""What can be said of means over a few seeds: confidence intervals, and paired tests against the best method."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of a mean, t₀.₉₇₅(n − 1) · s / √n (Student 1908).

    Args:
        values: results of n seeds, taken to be independent and about normal.

    Returns:
        In the unit of the values; NaN for fewer than two.

    >>> round(half_width([1.0, 2.0, 3.0]), 3)  # 4.303 / √3
    2.484
    """
    if len(values) < 2:
        return math.nan
    return float(stats.t.ppf(1 - LEVEL / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979, A simple sequentially rejective multiple test procedure).

    Args:
        p_values: of several tests.

    Returns:
        One for each, in their order. It is below 5 % where the test rejects, which it does wrongly for any of them
        with at most that probability.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = least
    return corrected


@dataclass(frozen=True)
class PairedTest:
    """A method beside the best one.

    Attributes:
        p: of the paired t-test, two-sided, Holm-corrected for the number of rivals.
        pairs: seeds that both have.

    >>> PairedTest(p=0.2, pairs=3).distinguishable
    False
    """

    p: float
    pairs: int

    @property
    def distinguishable(self) -> bool:
        """Whether the two differ at 5 %."""
        return self.p < LEVEL


def against_best(results: Mapping[str, Mapping[int, float]]) -> dict[str, PairedTest]:
    """Every method against the one of the largest mean, seed by seed.

    The best was picked by the same results, so that p is a little too small where several are about as good.

    Args:
        results: of each method by seed.

    Returns:
        By rival; none for one that shares fewer than two seeds with the best.

    >>> found = against_best({"a": {0: 0.9, 1: 0.92, 2: 0.91}, "b": {0: 0.8, 1: 0.83, 2: 0.805}, "c": {0: 0.9}})
    >>> sorted(found), found["b"].distinguishable
    (['b'], True)
    """
    known = {name: values for name, values in results.items() if values}
    if not known:
        return {}
    best = max(known, key=lambda name: float(np.mean(list(known[name].values()))))
    found: dict[str, tuple[float, int]] = {}
    for name, values in known.items():
        common = sorted(values.keys() & known[best].keys())
        if name != best and len(common) > 1:
            found[name] = _paired_p([known[best][seed] - values[seed] for seed in common]), len(common)
    corrected = holm([p for p, _ in found.values()])
    return {name: PairedTest(p, found[name][1]) for name, p in zip(found, corrected, strict=True)}


def _paired_p(differences: Sequence[float]) -> float:
    if not any(differences):
        return 1.0
    with warnings.catch_warnings():  # differences that are all alike: p is then 0
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(stats.ttest_1samp(differences, 0.0).pvalue)
