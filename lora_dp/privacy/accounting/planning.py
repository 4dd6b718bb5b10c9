"""Planning: the noise that a run needs, and the steps that a budget has room for."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable

from lora_dp.opacus_names import OF_CALIBRATION, tells_users_of
from lora_dp.privacy.accounting.epsilon import Accountant, check_accountant, composed_epsilon
from lora_dp.privacy.accounting.ledger import Ledger
from lora_dp.privacy.accounting.steps import Entry, PoissonGaussian, check_delta, check_epsilon, gathered, whole

_TOLERANCE = 1e-3  # a calibrated epsilon lies at most this much, relatively, below its target
_LEAST_NOISE = 0.02  # calibration does not look below: one such step alone, seen for sure, has an epsilon near 1,400
_MOST_NOISE = 1e9
_COARSE = 4  # how much coarser the first search of a PLD is
_AHEAD = (0.02, 0.01, 0.005)  # how far beyond a jump of ε max_steps looks
_MOST_STEPS = 10**9


@tells_users_of("Opacus", OF_CALIBRATION)
def calibrate_noise_multiplier(
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int,
    accountant: Accountant = "pld",
    *,
    spent: Ledger | None = None,
) -> float:
    """The smallest noise multiplier with which ``steps`` steps at ``sample_rate`` stay within (epsilon, delta).

    The epsilon of the result is never above the target and at most 0.1 % below it, except that the result is never
    below 0.02. With ``spent`` it is that of both together: what was released before, and these steps.

    Raises ValueError when a target, the rate or the accountant is invalid, ``steps`` is below 1, or no noise is enough;
    TypeError when one of them is of another kind.

    >>> noise = calibrate_noise_multiplier(target_epsilon=8, target_delta=1e-5, sample_rate=0.01, steps=1000)
    >>> round(noise, 3)
    0.586
    >>> before = Ledger()
    >>> before.append(PoissonGaussian(noise_multiplier=2.0, sample_rate=1.0))
    >>> round(calibrate_noise_multiplier(8, 1e-5, 0.01, 1000, spent=before), 3)
    0.594
    """
    check_epsilon(target_epsilon)
    check_delta(target_delta)
    check_accountant(accountant)
    remedy = "epochs / sample_rate steps, rounded up, make a run."
    if whole("steps", steps, remedy) < 1:
        raise ValueError(f"steps must be 1 or more to calibrate the noise, not {steps}: {remedy}")
    rate = PoissonGaussian(1.0, sample_rate).sample_rate
    if spent is not None and not isinstance(spent, Ledger):
        raise TypeError(f"spent must be a Ledger of what was released before, not {spent!r}: leave it out for none.")
    before = gathered(spent.entries) if spent is not None else ()
    reached = composed_epsilon(before, float(target_delta), accountant) if before else 0.0
    if reached >= target_epsilon:
        raise ValueError(
            f"What was spent before has epsilon {reached:.4g}, which leaves nothing of {target_epsilon:g}: take a "
            "larger epsilon, or spend less before."
        )
    return _calibrate(float(target_epsilon), float(target_delta), rate, int(steps), accountant, before)


class _OutOfReach(ValueError):
    """This accountant proves the target for no noise."""


@functools.lru_cache(maxsize=1024)
def _calibrate(
    target: float, delta: float, sample_rate: float, steps: int, accountant: Accountant, before: tuple[Entry, ...]
) -> float:
    def search(accountant: Accountant, guess: float, factor: float, tolerance: float, coarsening: int = 1) -> float:
        def epsilon_of(noise: float) -> float:
            entries = gathered((*before, (PoissonGaussian(noise, sample_rate), steps)))
            return composed_epsilon(entries, delta, accountant, coarsening)

        return _smallest_noise(epsilon_of, target, guess, factor, tolerance)

    if accountant == "rdp":
        return search("rdp", 1.0, 2.0, _TOLERANCE)
    guess = 1.0
    # Each search starts where a cheaper one ended, so that few evaluations are dear.
    with contextlib.suppress(_OutOfReach):
        guess = search("rdp", guess, 2.0, 20 * _TOLERANCE)
    guess = search("pld", guess, 1.1, 4 * _TOLERANCE, _COARSE)
    return search("pld", guess, 1.005, _TOLERANCE)


def _smallest_noise(
    epsilon_of: Callable[[float], float], target: float, guess: float, factor: float, tolerance: float
) -> float:
    """The root of a falling function, from above: a bracket by growing strides, then regula falsi in log ε and log σ.

    Args:
        factor: first stride of the bracket.
        tolerance: how far, relatively, epsilon may lie below the target.
    """
    low = high = guess
    low_epsilon = high_epsilon = epsilon_of(guess)
    while high_epsilon > target:
        if high > _MOST_NOISE:
            raise _OutOfReach(
                f"No noise keeps epsilon = {target:g} by this accountant, at this delta and these steps: take a larger "
                "epsilon, or a larger delta that is still well below 1 / (number of examples)."
            )
        low, low_epsilon = high, high_epsilon
        high, factor = high * factor, min(factor**2, 2.0**16)
        high_epsilon = epsilon_of(high)
    enough, aim = target * (1 - tolerance), target * (1 - tolerance / 2)
    while low_epsilon < enough:
        high, high_epsilon = low, low_epsilon
        if low <= _LEAST_NOISE:
            return high
        low, factor = max(low / factor, _LEAST_NOISE), factor**2
        low_epsilon = epsilon_of(low)
    if low_epsilon <= target:
        return low
    probes = 0
    while high_epsilon < enough and high / low > 1 + 1e-9:
        # Near linear; every third probe halves instead, to bound their number where it is not.
        probes += 1
        fraction = 0.5
        if probes % 3 and high_epsilon > 0 and low_epsilon < math.inf:
            fraction = math.log(low_epsilon / aim) / math.log(low_epsilon / high_epsilon)
        middle = low * (high / low) ** min(max(fraction, 0.02), 0.98)
        middle_epsilon = epsilon_of(middle)
        if middle_epsilon > target:
            low, low_epsilon = middle, middle_epsilon
        else:
            high, high_epsilon = middle, middle_epsilon
    return high


def max_steps(
    ledger: Ledger, event: PoissonGaussian, target_epsilon: float, target_delta: float, accountant: Accountant = "pld"
) -> int:
    """How many more of ``event`` fit the budget on top of ``ledger``: that many fit, one more does not.

    0 when the budget is spent or ``event`` has no noise; 10⁹ stands for any larger number. Raises ValueError when a
    target or the accountant is invalid, TypeError when one of them is of another kind.

    >>> step = PoissonGaussian(noise_multiplier=1.0, sample_rate=0.01)
    >>> max_steps(Ledger(), step, target_epsilon=8, target_delta=1e-5)
    15587
    """
    if not isinstance(ledger, Ledger):
        raise TypeError(f"max_steps plans on top of a Ledger, not {ledger!r}: give Ledger() where nothing is spent.")
    if not isinstance(event, PoissonGaussian):
        raise TypeError(
            f"max_steps plans private steps, not {event!r}: give PoissonGaussian(noise_multiplier, sample_rate)."
        )
    check_epsilon(target_epsilon)
    check_delta(target_delta)
    check_accountant(accountant)

    def epsilon_after(steps: int, accountant: Accountant, coarsening: int = 1) -> float:
        entries = gathered((*ledger.entries, (event, steps)))
        return composed_epsilon(entries, float(target_delta), accountant, coarsening)

    if epsilon_after(0, accountant) > target_epsilon:
        return 0
    steps = _most_steps(lambda steps: epsilon_after(steps, "rdp"), target_epsilon, guess=1, stride=1)
    if accountant == "pld":  # as in _calibrate
        steps = _most_steps(lambda n: epsilon_after(n, "pld", _COARSE), target_epsilon, steps, stride=1 + steps // 8)
        steps = _most_steps(lambda n: epsilon_after(n, "pld"), target_epsilon, steps, stride=1 + steps // 1000)
        # The true ε only grows with the steps; as computed it jumps by some thousandths, where a grid changes. What a
        # larger number of steps keeps, a smaller one keeps too.
        for ahead in _AHEAD:
            beyond = min(math.ceil(steps * (1 + ahead)), _MOST_STEPS)
            if steps < beyond and epsilon_after(beyond, "pld") <= target_epsilon:
                return _most_steps(lambda n: epsilon_after(n, "pld"), target_epsilon, beyond, stride=1 + beyond // 1000)
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
        if probes % 3 and high_epsilon < math.inf:
            fraction = (target**2 - low_epsilon**2) / (high_epsilon**2 - low_epsilon**2)
        middle = min(max(low + round(fraction * (high - low)), low + 1), high - 1)
        middle_epsilon = epsilon_after(middle)
        if middle_epsilon > target:
            high, high_epsilon = middle, middle_epsilon
        else:
            low, low_epsilon = middle, middle_epsilon
    return low
