"""A random search of options: which settings are tried, which is best, and where the ranges are widened.

A place says where a value lies in its option's range on a logarithmic scale: 0 at the lower end, 1 at the upper one,
below or above these where the range was widened.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

Places = Mapping[str, float]
# Minus the mean of the metric and the mean loss, over the tuning seeds: the smaller, the better.
Score = tuple[float, float]
DIVERGED: Score = (math.inf, math.inf)
# How far a range is widened, as a share of the range as it was given.
WIDER = 0.5
# How often at most, and the share of search_trials that is tried then.
EXTENSIONS, EXTRA = 2, 1 / 3
_NEAR = 0.1
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)
MOST_OPTIONS = len(_PRIMES)


@dataclass(frozen=True)
class Setting:
    """One value for each option of a search.

    Attributes:
        name: s and its index; of a trial in a widened range that of the setting it is near, a point, and an index.
        places: of the values, by option.

    >>> Setting("s0", {"lr": 0.5}).places["lr"]
    0.5
    """

    name: str
    places: Places


@dataclass(frozen=True)
class Standing:
    """How far a search has come.

    Attributes:
        settings: all that are to be tried, as far as the results so far tell.
        complete: whether all of them have been, and no further ones follow.
        best: the best of them; None before that, and where all diverged.
        edges: options whose best value lies in the outer part of its range, widened as often as the rule allows.

    >>> Standing([Setting("s0", {"lr": 0.5})]).complete
    False
    """

    settings: list[Setting]
    complete: bool = False
    best: Setting | None = None
    edges: list[str] = field(default_factory=list)


@lru_cache(maxsize=64)
def draws(seed: int, stream: int, count: int, options: int) -> np.ndarray:
    """Points of a search, uniform in the unit cube and spread more evenly than by chance alone.

    A Halton sequence whose digits are permuted at random (Owen 2017, A randomized Halton algorithm in R, arXiv
    1706.02808). More points, or more options, leave the others as they are.

    Args:
        seed: of the search.
        stream: 0 for its first settings, then that of each extension.
        count: number of points.
        options: number of options, at most ``MOST_OPTIONS``.

    Returns:
        Float64 (count, options), in [0, 1).

    >>> bool((draws(0, 0, 8, 2)[:4] == draws(0, 0, 4, 2)).all()), draws(1, 0, 2, 1).shape
    (True, (2, 1))
    """
    found = np.zeros((count, options))
    for column, prime in enumerate(_PRIMES[:options]):
        chance, left, unit = np.random.default_rng([seed, stream, column]), np.arange(count), 1.0
        for _ in range(math.ceil(32 / math.log2(prime))):
            unit /= prime
            found[:, column] += unit * chance.permutation(prime)[left % prime]
            left //= prime
    found.setflags(write=False)
    return found


def edge(trials: int) -> float:
    """The share of a range that is its outer part at each end: a tenth, and more where few trials leave wider gaps.

    Below a third, so that no setting is at an edge of the range that was widened beyond it.

    >>> edge(4), edge(8), edge(20)
    (0.25, 0.125, 0.1)
    """
    return max(0.1, min(0.25, 1 / trials))


def sides(places: Places, reach: Mapping[str, tuple[float, float]], outer: float) -> dict[str, int]:
    """Options whose place is in the outer part of what has been searched, with −1 for the lower end and 1 for the
    upper.

    Args:
        places: of one setting.
        reach: lowest and highest place that were searched, by option.
        outer: share of the outer part at each end.

    >>> sides({"lr": 0.95, "rounds": 0.5}, {"lr": (0.0, 1.0), "rounds": (0.0, 1.0)}, 0.1)
    {'lr': 1}
    """
    found = {}
    for name, (low, high) in reach.items():
        margin = outer * (high - low)
        if places[name] < low + margin:
            found[name] = -1
        elif places[name] > high - margin:
            found[name] = 1
    return found


class Search:
    """The search of one method at one ε; that of all others draws the same places.

    Args:
        options: names of the options.
        trials: number of settings before ranges are widened.
        seed: of the draws.
        valid: whether a run can have the values at these places.

    >>> search = Search(["lr"], trials=2, seed=0, valid=lambda places: True)
    >>> {setting.name: round(setting.places["lr"], 2) for setting in search.standing({}).settings}
    {'s0': 0.1, 's1': 0.6}
    >>> search.standing({"s0": DIVERGED, "s1": (-0.9, 0.3)}).best.name
    's1'
    """

    def __init__(self, options: Sequence[str], trials: int, seed: int, valid: Callable[[Places], bool]) -> None:
        self.options, self.trials, self.seed = sorted(options), trials, seed
        self._valid = valid
        self._clamped: dict[str, Setting] = {}

    def standing(self, scores: Mapping[str, Score]) -> Standing:
        """What is to be tried, and what is best, by the results so far.

        Args:
            scores: by setting's name, of those whose runs have all ended or of which one diverged.
        """
        settings = [Setting(f"s{i}", places) for i, places in enumerate(self._points(0, self.trials))]
        reach = dict.fromkeys(self.options, (0.0, 1.0))
        for extension in range(EXTENSIONS + 1):
            if any(setting.name not in scores for setting in settings):
                return Standing(settings)
            best = min(settings, key=lambda setting: scores[setting.name])
            if scores[best.name] == DIVERGED:
                return Standing(settings, complete=True)
            near = sides(best.places, reach, edge(self.trials))
            if not near or extension == EXTENSIONS:
                break
            for name, side in near.items():
                low, high = reach[name]
                reach[name] = (low - WIDER, high) if side < 0 else (low, high + WIDER)
            settings = settings + self._extension(extension + 1, best, near, reach)
        return Standing(settings, complete=True, best=best, edges=list(near))

    def _points(self, stream: int, count: int) -> list[Places]:
        drawn = draws(self.seed, stream, count, len(self.options))
        return [dict(zip(self.options, map(float, point), strict=True)) for point in drawn]

    def _extension(
        self, stream: int, best: Setting, near: Mapping[str, int], reach: Mapping[str, tuple[float, float]]
    ) -> list[Setting]:
        """From the best outwards where it is at an edge, else close to it."""
        settings = []
        for index, point in enumerate(self._points(stream, math.ceil(EXTRA * self.trials))):
            name = f"{best.name}.{index}"
            if name not in self._clamped:
                places = {}
                for option, (low, high) in reach.items():
                    centre, share = best.places[option], point[option]
                    if option in near:
                        end = high if near[option] > 0 else low
                        places[option] = centre + share * (end - centre)
                    else:
                        places[option] = min(max(centre + _NEAR * (2 * share - 1), low), high)
                self._clamped[name] = Setting(name, self._pulled_back(places, best.places))
            settings.append(self._clamped[name])
        return settings

    def _pulled_back(self, places: Places, best: Places) -> Places:
        """Half of the way to the best, again and again, until a run can have the values."""
        for _ in range(32):
            if self._valid(places):
                return places
            places = {name: (place + best[name]) / 2 for name, place in places.items()}
        return best
