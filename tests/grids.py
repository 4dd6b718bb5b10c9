"""Products of independent parameters, of which a fast run takes what lets every two values meet."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def pairwise(*factors: Sequence[Any]) -> list[Any]:
    """All cases of a product for ``pytest.mark.parametrize``, marked slow but for a few in which all pairs meet.

    Most mistakes show with one value or a pair of them (Kuhn, Wallace and Gallo 2004, "Software fault interactions and
    implications for software testing"). The whole product stays in CI.

    Args:
        factors: the values of each of at least two parameters, in the order of the arguments' names.

    Returns:
        ``pytest.param`` of every case, with an id of its values' names.
    """
    cases = list(itertools.product(*(range(len(factor)) for factor in factors)))
    couples = list(itertools.combinations(range(len(factors)), 2))
    met: set[tuple[int, int, int, int]] = set()
    chosen = set()
    # Greedy: first the cases in which only new pairs meet, then those with one old pair, and so on.
    for new in range(len(couples), 0, -1):
        for case in cases:
            pairs = {(i, j, case[i], case[j]) for i, j in couples} - met
            if len(pairs) >= new:
                met |= pairs
                chosen.add(case)
    found = []
    for case in cases:
        values = [factor[place] for factor, place in zip(factors, case, strict=True)]
        name = "-".join(getattr(value, "__name__", str(value)) for value in values)
        found.append(pytest.param(*values, id=name, marks=() if case in chosen else pytest.mark.slow))
    return found
