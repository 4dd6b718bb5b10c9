"""Epsilon of a composition: the smaller of two bounds by dp-accounting, each corrected for what its floats round off.

Rényi divergences of single steps, kept by step, give the bound "rdp". A privacy loss distribution ("pld") is composed
on a grid of bounded size, whatever the composition.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np

from lora_dp.privacy.accounting.steps import Entry, PoissonGaussian

Accountant = Literal["pld", "rdp"]
Floats = np.ndarray

_VOID_NOISE = 0.01  # so little noise hides nothing (epsilon above 5,000 a step): counted as none

# dp-accounting's default orders, and more above 64.
ORDERS = np.array(
    [1 + i / 10 for i in range(1, 100)]
    + [float(order) for order in range(11, 65)]
    + [72.0, 80.0, 96.0, 112.0, 128.0, 160.0, 192.0, 256.0, 384.0, 512.0, 768.0, 1024.0]
)
# For epsilons so small that the last of those orders proves the least; 0.1 s a step, so only then.
_HIGH_ORDERS = np.array([2048.0, 4096.0, 8192.0])
_ROUNDING = 8 * float(np.finfo(float).eps)  # of the logarithms that make up a divergence, relative to their size

_FINEST, _COARSEST = 1e-6, 1e-3  # steps of the loss's grid, where its size allows
_STEP_POINTS, _POINTS = 100_000, 2**20  # of one step's loss and of the composition's
_USELESS = 50.0  # a grid's step at which a PLD says nothing, and its exponentials overflow
_TAIL = 50.0  # dp-accounting cuts a step's noise where exp(-50) is left,
_CUT = 9.8  # which is this many standard deviations out
# What Fourier transforms round off of delta, for each time that a step is composed with itself. Measured against
# exponentially tilted transforms, which keep the tail's relative precision: at most 1.4e-16.
_FFT_ROUNDING = 1e-15


def check_accountant(accountant: str) -> None:
    """Raise ValueError unless there is such an accountant."""
    if accountant not in get_args(Accountant):
        raise ValueError(f"Unknown accountant {accountant!r}: choose 'pld' (tighter) or 'rdp' (faster).")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without dp-accounting's warnings on tiny divergences (rounding below 0) and on orders that do not converge."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@functools.lru_cache(maxsize=1024)
def rdp_of_step(event: PoissonGaussian, high: bool = False) -> Floats:
    """Rényi divergence of one step at every order of ``ORDERS``, or at the high ones: upper bounds of it.

    dp-accounting sums the series of an order between whole ones without its signs: an upper bound, which may lie above
    that of the next order; divergences grow with the order, so that the smaller one holds. Where the series does not
    converge it says inf, and the next order's holds again.
    """
    from dp_accounting.rdp import RdpAccountant

    orders = _HIGH_ORDERS if high else ORDERS
    with _quiet():
        rdp = np.asarray(RdpAccountant(orders).compose(event.dp_event()).rdp)
    # A divergence below the rounding of its logarithm may read as 0 or less, and would prove an epsilon of 0.
    least = [_ROUNDING * (1 + math.lgamma(order + 1)) / (order - 1) for order in orders]
    if event.sample_rate < 1:
        rdp = np.maximum(rdp, least)
    return np.minimum.accumulate(rdp[::-1])[::-1]


def _rdp_epsilon(entries: tuple[Entry, ...], delta: float) -> float:
    from dp_accounting.rdp import compute_epsilon

    def bound(high: bool) -> tuple[float, float]:
        orders = _HIGH_ORDERS if high else ORDERS
        rdp = sum((count * rdp_of_step(event, high) for event, count in entries), np.zeros(len(orders)))
        epsilon, order = compute_epsilon(orders, rdp, delta)
        return float(epsilon), float(order)

    epsilon, order = bound(high=False)
    return min(epsilon, bound(high=True)[0]) if order == ORDERS[-1] else epsilon


def _deviation(event: PoissonGaussian) -> float:
    """Of one step's privacy loss: q·√(e^(1/σ²) − 1), to first order in q."""
    return event.sample_rate * math.sqrt(math.expm1(min(event.noise_multiplier**-2, 600.0)))


def _reach(event: PoissonGaussian) -> float:
    """The largest loss of one step that dp-accounting's grid has."""
    inverse = 1 / event.noise_multiplier
    loss = inverse**2 / 2 + _CUT * inverse
    return loss + math.log(event.sample_rate) if loss > 100 else math.log1p(event.sample_rate * math.expm1(loss))


def _fine_interval(event: PoissonGaussian) -> float:
    """A twentieth of one step's deviation, within 1e-6 and 1e-3.

    Rounding is pessimistic and costs second order in the grid's step: measured against finer grids, at most 0.2 % of
    epsilon. dp-accounting's own 1e-4 is up to ten times slower at large q, and up to 9 % looser at small q.
    """
    return min(_COARSEST, max(_deviation(event) / 20, _FINEST))


def _composed_width(event: PoissonGaussian, count: int) -> float:
    """How wide the losses of ``count`` steps lie where dp-accounting cuts them: by Chernoff's bound, at the exponents
    1/w, …, 20/w, where w is the width of one step's loss. An estimate, by quadrature: it sets a grid, and no epsilon.
    """
    noise, rate = event.noise_multiplier, event.sample_rate
    width = _reach(event) - math.log1p(-rate)
    exponents = np.arange(1, 21) / width
    x = np.linspace(-_CUT * noise, 1 + _CUT * noise, 2001)
    loss = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * x - 1) / (2 * noise**2))
    without = -((x / noise) ** 2) / 2  # log densities, but for a constant

    def bound(density: Floats, signed: Floats) -> float:
        weights = np.exp(density - density.max())
        moments = np.log(np.exp(np.outer(exponents, signed)) @ (weights / weights.sum()))
        return float(np.min((count * moments + _TAIL) / exponents))

    widths = (bound(density, loss) + bound(density, -loss) for density in (without, without + loss))
    return min(count * width, max(widths))


def pld_interval(entries: tuple[Entry, ...]) -> float:
    """Grid step of the privacy loss: as fine as the finest step needs, and as coarse as the number of points asks for.

    Points are bounded for one step (0.4 s in dp-accounting's loops) and for the composition (50 MB, 0.2 s).
    """
    steps = [_single(entry) for entry in entries]
    fine = min(_fine_interval(event) for event, _ in steps)
    width = sum(2 * _reach(event) if event.sample_rate == 1 else _composed_width(event, n) for event, n in steps)
    return max(fine, max(_reach(event) for event, _ in steps) / _STEP_POINTS, width / _POINTS)


def _single(entry: Entry) -> Entry:
    """Steps on all examples are one, with less noise: dp-accounting composes them so, in closed form."""
    event, count = entry
    return (PoissonGaussian(event.noise_multiplier / math.sqrt(count), 1), 1) if event.sample_rate == 1 else entry


def _rounded_off(entries: tuple[Entry, ...]) -> float:
    """A bound on what Fourier transforms round off of delta."""
    return _FFT_ROUNDING * sum(1 if event.sample_rate == 1 else count for event, count in entries)


def _pld_epsilon(entries: tuple[Entry, ...], delta: float, interval: float) -> float:
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import PLDAccountant

    pld = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=interval)
    # Far below ε = 0 dp-accounting's exponentials overflow: then it says nothing.
    with np.errstate(all="ignore"), contextlib.suppress(OverflowError):
        for event, count in entries:
            pld.compose(event.dp_event(), count)
        return float(pld.get_epsilon(delta))
    return math.inf


@functools.lru_cache(maxsize=16384)
def composed_epsilon(entries: tuple[Entry, ...], delta: float, accountant: Accountant, coarsening: int = 1) -> float:
    """Epsilon of a composition in which every kind of step stands once; a coarser grid is faster and looser.

    By "pld" it is never above that by "rdp": where rounding drowns delta, or a grid is too coarse, Rényi DP knows.
    """
    if any(event.noise_multiplier < _VOID_NOISE for event, _ in entries):
        return math.inf
    if not entries:
        return 0.0
    bound = _rdp_epsilon(entries, delta)
    left = delta - _rounded_off(entries)
    if accountant == "rdp" or bound == 0 or left <= 0:
        return bound
    interval = coarsening * pld_interval(entries)
    return min(bound, _pld_epsilon(entries, left, interval)) if interval < _USELESS else bound
