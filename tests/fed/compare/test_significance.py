"""Intervals and paired tests, against scipy and numbers worked out by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from lora_dp.fed.compare.significance import against_best, half_width, holm


def test_the_interval_is_students():
    # Of 90.1, 91.2, 88.8: s = 1.2014, t of 2 degrees = 4.3027, over √3.
    assert half_width([90.1, 91.2, 88.8]) == pytest.approx(2.984, abs=1e-3)
    values = np.random.default_rng(0).normal(size=7)
    low, high = stats.t.interval(0.95, 6, values.mean(), stats.sem(values))
    assert half_width(list(values)) == pytest.approx((high - low) / 2, rel=1e-12)
    assert math.isnan(half_width([1.0])) and math.isnan(half_width([])) and half_width([1.0, 1.0]) == 0


def test_intervals_cover_the_mean_in_19_of_20_cases():
    chance = np.random.default_rng(1)
    samples = chance.normal(size=(600, 4))
    covered = np.mean([abs(each.mean()) <= half_width(list(each)) for each in samples])
    assert covered == pytest.approx(0.95, abs=0.036)  # four standard deviations


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_paired_tests_are_scipys():
    chance = np.random.default_rng(2)
    seeds = range(6)
    results = {name: dict(zip(seeds, chance.normal(level, 0.02, 6), strict=True)) for name, level in
               {"best": 0.9, "near": 0.89, "far": 0.7}.items()}  # fmt: skip
    del results["far"][0]
    raw = {
        name: stats.ttest_rel(
            [results["best"][seed] for seed in results[name]], [results[name][seed] for seed in results[name]]
        ).pvalue
        for name in ("near", "far")
    }
    found = against_best(results)
    assert set(found) == {"near", "far"} and (found["near"].pairs, found["far"].pairs) == (6, 5)
    assert found["far"].p == pytest.approx(2 * raw["far"]) and found["near"].p == pytest.approx(raw["near"])
    assert found["far"].distinguishable and not found["near"].distinguishable


def test_pairs_see_what_seeds_hide():
    """A planted difference of 1 among seeds that spread by 10; and none where there is none."""
    chance = np.random.default_rng(3)
    levels = chance.normal(0, 10, 6)
    results = {"best": dict(enumerate(levels + 1)), "rival": dict(enumerate(levels + chance.normal(0, 0.2, 6)))}
    assert against_best(results)["rival"].distinguishable
    assert stats.ttest_ind(list(results["best"].values()), list(results["rival"].values())).pvalue > 0.5
    false = 0
    for _ in range(150):  # of two methods that are alike, about one in twenty is told from the other
        alike = {name: dict(enumerate(chance.normal(size=5))) for name in "ab"}
        false += any(test.distinguishable for test in against_best(alike).values())
    assert false / 150 < 0.11


def test_what_cannot_be_tested():
    assert (
        against_best({"a": {0: 0.9}, "b": {0: 0.5}}) == {} and against_best({}) == {} and against_best({"a": {}}) == {}
    )
    equal = against_best({"a": {0: 0.9, 1: 0.8}, "b": {0: 0.9, 1: 0.8}})
    assert [test.distinguishable for test in equal.values()] == [False]
    steady = against_best({"a": {0: 3.0, 1: 2.0}, "b": {0: 2.0, 1: 1.0}})
    assert steady["b"].distinguishable
