"""Privacy accounting: what a run has released, and the epsilon that it adds up to.

A run is a list of private steps, each the Gaussian mechanism on a Poisson sample. :class:`Ledger` keeps that list;
Google's ``dp-accounting`` composes it under the add-or-remove-one relation, by one of two accountants:

- ``"pld"`` (privacy loss distributions, Doroshenko et al. 2022, arXiv 2207.04380): tight, from 10 ms to a second;
- ``"rdp"`` (Rényi DP, Mironov et al. 2019, arXiv 1908.10530): under a millisecond once a kind of step has been seen,
  with an epsilon some 5 to 25 % larger, and more at sample rates below 0.001.

Both give an upper bound on the true epsilon. Planning (a noise multiplier, a number of steps) is built on the same
numbers, so that what was planned and what is reported never disagree.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import operator
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from lora_dp.files import write_atomically

# dp-accounting is imported where ε is computed: training at a given noise multiplier does without it.
if TYPE_CHECKING:
    from dp_accounting import dp_event

Accountant = Literal["pld", "rdp"]

_FORMAT, _VERSION = "lora-dp ledger", 1
_EPSILON_TOLERANCE = 1e-3  # a calibrated epsilon lies at most this much, relatively, below its target
_LEAST_NOISE = 0.1  # calibration does not look below: one such step alone has an epsilon near 90
_VOID_NOISE = 0.01  # so little noise hides nothing (epsilon above 5,000 a step): counted as none
_PLD_LIMIT = 100.0  # above this epsilon a PLD needs gigabytes to say "no privacy": the RDP bound says it at once
_COARSE = 4  # how much coarser the first search of a PLD is
_MOST_STEPS = 10**9

# dp-accounting's default orders from 2 on, and more above 64. Its fractional orders below 2 do not converge, and warn,
# at many (noise, rate). What leaving them out costs was measured at nine (rate, steps) with rates from 0.001 to 1 and
# delta 1e-5: epsilon 0.00 % larger than with the defaults at 0.1, 1, 3 and 8; at 16 up to 5.5 %, at a rate near 1/2.
_ORDERS = np.array(
    [2 + i / 10 for i in range(90)]
    + [float(order) for order in range(11, 65)]
    + [72.0, 80.0, 96.0, 112.0, 128.0, 160.0, 192.0, 256.0, 384.0, 512.0, 768.0, 1024.0]
)


class PrivacyBudgetExceeded(RuntimeError):
    """The next private step would take epsilon above the budget; it was not taken."""


def check_epsilon(epsilon: float) -> None:
    """Raise ValueError unless ``epsilon`` is a positive, finite number."""
    if not 0 < epsilon < math.inf:
        raise ValueError(
            f"epsilon must be a positive, finite number, not {epsilon}: 1 to 8 is usual; "
            "to train without privacy set noise_multiplier=0 instead."
        )


def check_delta(delta: float) -> None:
    """Raise ValueError unless ``delta`` lies strictly between 0 and 1."""
    if not 0 < delta < 1:
        raise ValueError(
            f"delta must lie strictly between 0 and 1, not {delta}: choose one well below 1 / (number of examples)."
        )


def _check_accountant(accountant: str) -> None:
    if accountant not in get_args(Accountant):
        raise ValueError(f"Unknown accountant {accountant!r}: choose 'pld' (tighter) or 'rdp' (faster).")


@dataclass(frozen=True)
class PoissonGaussian:
    """One private step: every example joins with probability ``sample_rate``; Gaussian noise is added to the sum.

    ``noise_multiplier`` is the noise's standard deviation divided by the sensitivity (the clipping norm); 0 means a
    step without privacy. Raises ValueError for a negative or non-finite noise, or a sample rate outside (0, 1].
    """

    noise_multiplier: float
    sample_rate: float

    def __post_init__(self) -> None:
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(
                f"noise_multiplier must be a finite number >= 0, not {self.noise_multiplier}: "
                "take it from calibrate_noise_multiplier, or 0 to train without privacy."
            )
        if not 0 < self.sample_rate <= 1:
            raise ValueError(
                f"sample_rate must lie in (0, 1], not {self.sample_rate}: "
                "it is the expected batch size divided by the number of examples."
            )
        # Plain floats, so that NumPy's hash, compare and write to JSON alike.
        object.__setattr__(self, "noise_multiplier", float(self.noise_multiplier))
        object.__setattr__(self, "sample_rate", float(self.sample_rate))

    def dp_event(self) -> dp_event.DpEvent:
        """The step as ``dp-accounting`` describes it."""
        from dp_accounting import dp_event

        if self.noise_multiplier == 0:
            return dp_event.NonPrivateDpEvent()
        gaussian = dp_event.GaussianDpEvent(self.noise_multiplier)
        return gaussian if self.sample_rate == 1 else dp_event.PoissonSampledDpEvent(self.sample_rate, gaussian)


Entry = tuple[PoissonGaussian, int]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without dp-accounting's warnings on tiny divergences (rounding below 0), one for every order and trial."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@functools.lru_cache(maxsize=1024)
def _rdp_of_step(event: PoissonGaussian) -> np.ndarray:
    """Rényi divergence of one step at every order of ``_ORDERS``; inf at an order that is not computed."""
    usable = np.ones(len(_ORDERS), dtype=bool)
    if 0.4 < event.sample_rate < 0.6:  # here the series of the orders between converges too slowly, and warns
        usable = (_ORDERS == 2) | (_ORDERS >= 3)
    rdp = np.full(len(_ORDERS), math.inf)
    from dp_accounting.rdp import RdpAccountant

    rdp[usable] = RdpAccountant(_ORDERS[usable]).compose(event.dp_event()).rdp
    return rdp


def _pld_interval(event: PoissonGaussian) -> float:
    """Grid step of the privacy loss: a twentieth of one step's loss deviation, within 5e-6 and 1e-3.

    The deviation is ``q·√(e^(1/σ²) − 1)`` to first order in q. Rounding is pessimistic and costs second order in the
    grid step: measured against finer grids, at most 0.2 % of epsilon. dp-accounting's own 1e-4 is up to ten times
    slower at large q, and up to 9 % looser at small q. Where 100,000 grid steps would not span the loss out to ten
    standard deviations of the noise (small q with little noise), a coarser step is taken.
    """
    inverse = min(1 / event.noise_multiplier, 100.0)
    deviation = event.sample_rate * math.sqrt(math.expm1(min(inverse**2, 100.0)))
    loss = inverse**2 / 2 + 10 * inverse
    reach = loss if loss > 100 else math.log1p(event.sample_rate * math.expm1(loss))
    return min(1e-3, max(deviation / 20, reach / 100_000, 5e-6))


@functools.lru_cache(maxsize=16384)
def _epsilon(entries: tuple[Entry, ...], delta: float, accountant: Accountant, coarsening: int = 1) -> float:
    """Epsilon of a composition in which every kind of step stands once; a coarser grid is faster and looser."""
    if any(event.noise_multiplier < _VOID_NOISE for event, _ in entries):
        return math.inf
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import compute_epsilon

    rdp = sum((count * _rdp_of_step(event) for event, count in entries), np.zeros(len(_ORDERS)))
    with _quiet():
        bound = float(compute_epsilon(_ORDERS, rdp, delta)[0])
    if not entries or accountant == "rdp" or bound > _PLD_LIMIT:
        return bound
    interval = coarsening * min(_pld_interval(event) for event, _ in entries)
    pld = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=interval)
    for event, count in entries:
        pld.compose(event.dp_event(), count)
    return float(pld.get_epsilon(delta))


def _gathered(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """Equal steps put together: composition does not depend on the order."""
    counts: dict[PoissonGaussian, int] = {}
    for event, count in entries:
        counts[event] = counts.get(event, 0) + count
    return tuple((event, count) for event, count in counts.items() if count)


class Ledger:
    """What has been released so far: private steps in order, equal neighbours counted together; entries only grow.

    Append a step *before* its result is used: a crash can then over-count but never under-count.
    """

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    @property
    def entries(self) -> tuple[Entry, ...]:
        """``(event, count)`` in the order of release; neighbours differ."""
        return tuple(self._entries)

    @property
    def steps(self) -> int:
        """The number of private steps taken."""
        return sum(count for _, count in self._entries)

    def append(self, event: PoissonGaussian, count: int = 1) -> None:
        """Add ``count`` steps. Raises ValueError when ``count`` is negative: what was released cannot be taken back."""
        count = operator.index(count)
        if count < 0:
            raise ValueError(f"A ledger only grows: count must be 0 or more, not {count}.")
        if self._entries and self._entries[-1][0] == event:
            count += self._entries.pop()[1]
        if count:
            self._entries.append((event, count))

    def continues(self, earlier: Ledger) -> bool:
        """Whether this ledger begins with all that ``earlier`` holds."""
        if not earlier._entries:
            return True
        *whole, (event, count) = earlier._entries
        position = len(whole)
        return (
            self._entries[:position] == whole and len(self._entries) > position
            and self._entries[position][0] == event and self._entries[position][1] >= count
        )

    def epsilon(self, delta: float, accountant: Accountant = "pld") -> float:
        """An upper bound on epsilon at ``delta``: 0 when nothing was released, inf after a step without noise.

        "Without noise" includes a noise multiplier below 0.01. Above epsilon 100 the RDP bound is given for either
        accountant. Raises ValueError when ``delta`` is outside (0, 1) or the accountant unknown.
        """
        check_delta(delta)
        _check_accountant(accountant)
        return _epsilon(_gathered(self.entries), delta, accountant)

    def dp_event(self) -> dp_event.DpEvent:
        """The run for any accountant of ``dp-accounting``."""
        from dp_accounting import dp_event

        return dp_event.ComposedDpEvent(
            [dp_event.SelfComposedDpEvent(event.dp_event(), count) for event, count in self._entries]
        )

    def state_dict(self) -> dict[str, Any]:
        """The ledger as plain numbers, lists and strings."""
        entries = [
            {"noise_multiplier": event.noise_multiplier, "sample_rate": event.sample_rate, "count": count}
            for event, count in self._entries
        ]
        return {"format": _FORMAT, "version": _VERSION, "entries": entries}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the entries by those of ``state``. Raises ValueError, and changes nothing, when it is no ledger."""
        try:
            if state["format"] != _FORMAT or state["version"] != _VERSION:
                raise ValueError(f"format {state['format']!r}, version {state['version']!r}")
            loaded = Ledger()
            for entry in state["entries"]:
                loaded.append(PoissonGaussian(entry["noise_multiplier"], entry["sample_rate"]), entry["count"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"Not a ledger of version {_VERSION} ({type(error).__name__}: {error}): "
                "restore it from a backup, or read it with the lora-dp that wrote it."
            ) from error
        self._entries = loaded._entries

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ledger as JSON, atomically: after a crash the file holds either the old ledger or the new one."""
        write_atomically(Path(path), json.dumps(self.state_dict(), indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ledger:
        """Read a saved ledger. Raises FileNotFoundError, or ValueError for a damaged file or another version."""
        ledger = cls()
        try:
            ledger.load_state_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:  # JSON and Unicode errors are ValueErrors too
            raise ValueError(
                f"The privacy ledger {os.fspath(path)!r} cannot be read ({error}) "
                "Do not start a new one for the same data: what was spent would be forgotten."
            ) from error
        return ledger


def calibrate_noise_multiplier(
    target_epsilon: float, target_delta: float, sample_rate: float, steps: int, accountant: Accountant = "pld"
) -> float:
    """The smallest noise multiplier with which ``steps`` steps at ``sample_rate`` stay within (epsilon, delta).

    The epsilon of the result is never above the target and at most 0.1 % below it; the result is never below 0.1.
    Raises ValueError when a target, the rate or the accountant is invalid, or ``steps`` is below 1.
    """
    check_epsilon(target_epsilon)
    check_delta(target_delta)
    _check_accountant(accountant)
    steps = operator.index(steps)
    if steps < 1:
        raise ValueError(
            f"steps must be 1 or more to calibrate the noise, not {steps}: epochs / sample_rate steps make a run."
        )
    PoissonGaussian(_LEAST_NOISE, sample_rate)  # checks the rate
    return _calibrate(float(target_epsilon), float(target_delta), float(sample_rate), steps, accountant)


@functools.lru_cache(maxsize=1024)
def _calibrate(target: float, delta: float, sample_rate: float, steps: int, accountant: Accountant) -> float:
    def epsilon_of(noise: float, accountant: Accountant, coarsening: int = 1) -> float:
        return _epsilon(((PoissonGaussian(noise, sample_rate), steps),), delta, accountant, coarsening)

    noise = _smallest_noise(lambda noise: epsilon_of(noise, "rdp"), target, guess=1.0, factor=2.0)
    if accountant == "pld":  # each search starts where a cheaper one ended, so that few evaluations are dear
        noise = _smallest_noise(lambda noise: epsilon_of(noise, "pld", _COARSE), target, noise, factor=1.1)
        noise = _smallest_noise(lambda noise: epsilon_of(noise, "pld"), target, noise, factor=1.005)
    return noise


def _smallest_noise(epsilon_of: Callable[[float], float], target: float, guess: float, factor: float) -> float:
    """The root of a falling function: a bracket by growing strides, then regula falsi in log ε and log σ."""
    low = high = guess
    low_epsilon = high_epsilon = epsilon_of(guess)
    while high_epsilon > target:
        low, low_epsilon = high, high_epsilon
        high, factor = high * factor, factor**2
        high_epsilon = epsilon_of(high)
    enough, aim = target * (1 - _EPSILON_TOLERANCE), target * (1 - _EPSILON_TOLERANCE / 2)
    while low_epsilon < enough:
        high, high_epsilon = low, low_epsilon
        if low <= _LEAST_NOISE:
            return high
        low, factor = max(low / factor, _LEAST_NOISE), factor**2
        low_epsilon = epsilon_of(low)
    if low_epsilon <= target:
        return low
    while high_epsilon < enough and high / low > 1 + 1e-9:
        fraction = 0.5
        if high_epsilon > 0 and low_epsilon < math.inf:
            fraction = math.log(low_epsilon / aim) / math.log(low_epsilon / high_epsilon)
        middle = low * (high / low) ** min(max(fraction, 0.02), 0.98)
        middle_epsilon = epsilon_of(middle)
        if middle_epsilon > target:
            low, low_epsilon = middle, middle_epsilon
        else:
            high, high_epsilon = middle, middle_epsilon
    return high


def max_steps(
    ledger: Ledger,
    event: PoissonGaussian,
    target_epsilon: float,
    target_delta: float,
    accountant: Accountant = "pld",
) -> int:
    """How many more of ``event`` fit the budget on top of ``ledger``: that many fit, one more does not.

    0 when the budget is spent or ``event`` has no noise; 10⁹ stands for any larger number. Raises ValueError when a
    target or the accountant is invalid.
    """
    check_epsilon(target_epsilon)
    check_delta(target_delta)
    _check_accountant(accountant)

    def epsilon_after(steps: int, accountant: Accountant, coarsening: int = 1) -> float:
        entries = _gathered((*ledger.entries, (event, steps)))
        return _epsilon(entries, target_delta, accountant, coarsening)

    if epsilon_after(0, accountant) > target_epsilon:
        return 0
    steps = _most_steps(lambda steps: epsilon_after(steps, "rdp"), target_epsilon, guess=1, stride=1)
    if accountant == "pld":  # as in _calibrate
        steps = _most_steps(lambda n: epsilon_after(n, "pld", _COARSE), target_epsilon, steps, stride=1 + steps // 8)
        steps = _most_steps(lambda n: epsilon_after(n, "pld"), target_epsilon, steps, stride=1 + steps // 1000)
    return steps


def _most_steps(epsilon_after: Callable[[int], float], target: float, guess: int, stride: int) -> int:
    """The most steps within the target, 0 if none: a bracket by growing strides, then regula falsi in ε²."""
    low = high = guess
    low_epsilon = high_epsilon = epsilon_after(guess)
    while low_epsilon > target:
        high, high_epsilon = low, low_epsilon
        if low == 0:
            return 0
        low, stride = max(low - stride, 0), 3 * stride
        low_epsilon = epsilon_after(low)
    while high_epsilon <= target:
        low, low_epsilon = high, high_epsilon
        if high == _MOST_STEPS:
            return high
        high, stride = min(high + stride, _MOST_STEPS), 3 * stride
        high_epsilon = epsilon_after(high)
    probes = 0
    while high - low > 1:
        # ε² is near linear in the steps; every third probe halves instead, to bound their number where it is not.
        probes += 1
        fraction = 0.5
        if probes % 3 and low_epsilon < high_epsilon < math.inf:
            fraction = (target**2 - low_epsilon**2) / (high_epsilon**2 - low_epsilon**2)
        middle = min(max(low + round(fraction * (high - low)), low + 1), high - 1)
        middle_epsilon = epsilon_after(middle)
        if middle_epsilon > target:
            high, high_epsilon = middle, middle_epsilon
        else:
            low, low_epsilon = middle, middle_epsilon
    return low
