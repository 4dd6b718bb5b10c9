"""The search of settings: what is drawn, chosen, and widened."""

import math
from typing import Any

import numpy as np

from lora_dp.fed.compare.search import DIVERGED, Places, Score, Search, Standing, draws, edge, sides


def search(*options: str, trials: int = 8, seed: int = 0, valid: Any = lambda places: True) -> Search:
    return Search(options or ("lr",), trials, seed, valid)


def ended(of: Search, score: Any) -> Standing:
    """A search whose every trial gets the score of its places."""
    scores: dict[str, Score] = {}
    while not (standing := of.standing(scores)).complete:
        scores |= {setting.name: score(setting.places) for setting in standing.settings if setting.name not in scores}
    return standing


def higher(places: Places) -> Score:
    return -places["lr"], 0.0


def test_more_draws_and_more_options_keep_the_others():
    few, many = draws(3, 0, 5, 2), draws(3, 0, 40, 4)
    assert np.array_equal(few, many[:5, :2])
    assert not np.array_equal(few, draws(4, 0, 5, 2)) and not np.array_equal(few, draws(3, 1, 5, 2))


def test_every_option_is_spread_over_its_whole_range():
    """Owen's sequence: of the first p points of an option with base p, one in each p-th of the range; uniform."""
    for column, base in enumerate((2, 3, 5, 7)):
        points = draws(11, 0, base, 4)[:, column]
        assert sorted((points * base).astype(int)) == list(range(base))
    first = np.array([draws(seed, 0, 1, 3)[0] for seed in range(100)])
    assert first.min() >= 0 and first.max() < 1
    # The mean of 100 uniform numbers is within 0.14 of a half but for once in a million.
    assert np.abs(first.mean(0) - 0.5).max() < 0.14
    assert np.abs(np.corrcoef(draws(5, 0, 200, 6).T) - np.eye(6)).max() < 0.3


def test_the_first_settings_are_the_draws_by_option():
    standing = search("rounds", "lr", trials=3, seed=9).standing({})
    assert [setting.name for setting in standing.settings] == ["s0", "s1", "s2"] and not standing.complete
    assert [(s.places["lr"], s.places["rounds"]) for s in standing.settings] == [
        tuple(row) for row in draws(9, 0, 3, 2)
    ]


def test_the_best_is_the_least_score_and_no_diverged_one():
    names = [f"s{index}" for index in range(4)]
    of = search(trials=4)
    inner = [s.name for s in of.standing({}).settings if 0.25 <= s.places["lr"] <= 0.75]
    equal = dict.fromkeys(names, (-0.5, 0.9)) | {inner[0]: (-0.8, 0.9), inner[1]: (-0.8, 0.2)}
    standing = of.standing(equal)
    assert standing.complete and standing.best is not None and standing.best.name == inner[1] and standing.edges == []
    assert of.standing({**equal, inner[1]: DIVERGED}).best.name == inner[0]
    none = of.standing(dict.fromkeys(names, DIVERGED))
    assert none.complete and none.best is None
    assert not of.standing({name: equal[name] for name in names[:3]}).complete


def test_a_range_is_widened_where_the_best_is_at_its_edge():
    scores = {}
    of = search(trials=8)
    base = of.standing({}).settings
    scores = {setting.name: higher(setting.places) for setting in base}
    top = max(base, key=lambda setting: setting.places["lr"])
    assert top.places["lr"] > 0.9
    standing = of.standing(scores)
    extra = standing.settings[8:]
    assert [setting.name for setting in extra] == [f"{top.name}.{index}" for index in range(3)]
    assert all(top.places["lr"] < setting.places["lr"] < 1.5 for setting in extra)
    # At the other end likewise, and never more than twice.
    for sign in (1, -1):
        standing = ended(of, lambda places, sign=sign: (-sign * places["lr"], 0.0))
        assert len(standing.settings) <= 8 + 2 * 3 and standing.best is not None
        assert sign * (standing.best.places["lr"] - 0.5) > 0.5
    # Where it falls off beyond, the search ends inside.
    standing = ended(of, lambda places: (abs(places["lr"] - 1.0), 0.0))
    assert standing.edges == [] and 0.8 < standing.best.places["lr"] < 1.2


def test_what_is_not_at_an_edge_stays_near_the_best():
    of = search("lr", "rounds", trials=12)
    score = {"lr": lambda place: -place, "rounds": lambda place: abs(place - 0.5)}
    standing = ended(of, lambda places: (sum(score[name](place) for name, place in places.items()), 0.0))
    near = {setting.name: setting.places for setting in standing.settings}
    for name, places in near.items():
        if "." in name and sides(near[name.rpartition(".")[0]], {"rounds": (0.0, 1.0)}, 0.1) == {}:
            assert abs(places["rounds"] - near[name.rpartition(".")[0]]["rounds"]) <= 0.1
    assert any("." in name for name in near)


def test_what_no_run_can_have_is_pulled_back_to_the_best():
    of = search(trials=8, valid=lambda places: places["lr"] < 1.02)
    standing = ended(of, higher)
    extra = [setting.places["lr"] for setting in standing.settings[8:]]
    assert extra and max(extra) < 1.02 and standing.best.places["lr"] == max(extra)
    assert standing.edges == [] or standing.best.places["lr"] > 0.9


def test_more_trials_keep_those_that_were_tried():
    few, many = (ended(search(trials=trials), lambda places: (abs(places["lr"] - 0.4), 0.0)) for trials in (4, 9))
    assert [(s.name, s.places) for s in few.settings[:4]] == [(s.name, s.places) for s in many.settings[:4]]


def test_the_outer_tenth_of_a_range_is_its_edge():
    reach = {"lr": (0.0, 1.5)}
    assert sides({"lr": 0.14}, reach, 0.1) == {"lr": -1} and sides({"lr": 0.16}, reach, 0.1) == {}
    assert sides({"lr": 1.36}, reach, 0.1) == {"lr": 1} and sides({"lr": 1.34}, reach, 0.1) == {}
    assert [edge(trials) for trials in (1, 5, 10, 100)] == [0.25, 0.2, 0.1, 0.1]
    assert math.isinf(DIVERGED[0]) and (-0.0, math.nan) < DIVERGED
