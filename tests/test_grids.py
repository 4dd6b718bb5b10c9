"""A grid that is taken in pairs keeps every case, and each two values meet in those that are not slow."""

import itertools

import torch

from tests.grids import pairwise

FACTORS = (("sgd", "adam", "adamw"), (torch.float32, torch.float64), (0, 1, 6), (0.0, 0.5, 3.0), (True, False))


def test_every_case_is_there_once():
    cases = [tuple(case.values) for case in pairwise(*FACTORS)]
    assert sorted(cases, key=str) == sorted(itertools.product(*FACTORS), key=str)
    assert len({case.id for case in pairwise(*FACTORS)}) == len(cases)


def test_all_pairs_meet_in_few_cases():
    fast = [case.values for case in pairwise(*FACTORS) if not case.marks]
    for (i, left), (j, right) in itertools.combinations(enumerate(FACTORS), 2):
        assert {(case[i], case[j]) for case in fast} == set(itertools.product(left, right))
    assert 9 <= len(fast) <= 20 < len(pairwise(*FACTORS))


def test_of_two_parameters_every_case_is_a_pair():
    assert not any(case.marks for case in pairwise("ab", (1, 2, 3)))
