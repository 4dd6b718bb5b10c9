"""One private step, and what numbers may describe it."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

# dp-accounting is imported where ε is computed: training at a given noise multiplier does without it.
if TYPE_CHECKING:
    from dp_accounting import dp_event


def real(name: str, value: Any, remedy: str) -> float:
    """``value`` as a float. Raises TypeError for what is no number: text, None, a truth value, an array."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {value!r} of type {type(value).__name__}: {remedy}")
    return float(value)


def whole(name: str, value: Any, remedy: str) -> int:
    """``value`` as an int. Raises TypeError for what is no whole number by its type: 10.0, text, None, True."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, not {value!r} of type {type(value).__name__}: {remedy}")
    return int(value)


def check_epsilon(epsilon: float) -> None:
    """Raise ValueError unless ``epsilon`` is a positive, finite number; TypeError where it is no number.

    >>> check_epsilon(8.0)
    >>> check_epsilon(-1.0)
    Traceback (most recent call last):
    ValueError: epsilon must be a positive, finite number, not -1.0: ...
    """
    remedy = "1 to 8 is usual; to train without privacy set noise_multiplier=0 instead."
    if not 0 < real("epsilon", epsilon, remedy) < math.inf:
        raise ValueError(f"epsilon must be a positive, finite number, not {epsilon}: {remedy}")


def check_delta(delta: float) -> None:
    """Raise ValueError unless ``delta`` lies strictly between 0 and 1; TypeError where it is no number.

    >>> check_delta(1e-5)
    >>> check_delta(1.5)
    Traceback (most recent call last):
    ValueError: delta must lie strictly between 0 and 1, not 1.5: ...
    """
    remedy = "choose one well below 1 / (number of examples)."
    if not 0 < real("delta", delta, remedy) < 1:
        raise ValueError(f"delta must lie strictly between 0 and 1, not {delta}: {remedy}")


def check_promise(delta: float, count: int, units: str) -> None:
    """Raise ValueError where ``delta`` promises next to nothing to one of so many.

    >>> check_promise(1e-5, 1000, "examples")
    >>> check_promise(0.5, 20, "examples")
    Traceback (most recent call last):
    ValueError: delta 0.5 promises nothing to one of 20 examples, since all of one may be published with that ...
    """
    if delta * count >= 1:
        raise ValueError(
            f"delta {delta:g} promises nothing to one of {count} {units}, since all of one may be published with that "
            f"probability: take one well below 1/{count}, for example 1e-5."
        )


@dataclass(frozen=True)
class PoissonGaussian:
    """One private step: every example joins with probability ``sample_rate``; Gaussian noise is added to the sum.

    ``noise_multiplier`` is the noise's standard deviation divided by the sensitivity (the clipping norm); 0 means a
    step without privacy. Raises ValueError for a negative or non-finite noise, or a sample rate outside (0, 1];
    TypeError where one of them is no number.

    >>> PoissonGaussian(noise_multiplier=1.1, sample_rate=64 / 4000)
    PoissonGaussian(noise_multiplier=1.1, sample_rate=0.016)
    """

    noise_multiplier: float
    sample_rate: float

    def __post_init__(self) -> None:
        remedy = "take it from calibrate_noise_multiplier, or 0 to train without privacy."
        noise = real("noise_multiplier", self.noise_multiplier, remedy)
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise_multiplier must be a finite number >= 0, not {self.noise_multiplier}: {remedy}")
        remedy = "it is the expected batch size divided by the number of examples."
        rate = real("sample_rate", self.sample_rate, remedy)
        if not 0 < rate <= 1:
            raise ValueError(f"sample_rate must lie in (0, 1], not {self.sample_rate}: {remedy}")
        # Plain floats, so that NumPy's hash, compare and write to JSON alike.
        object.__setattr__(self, "noise_multiplier", noise)
        object.__setattr__(self, "sample_rate", rate)

    def dp_event(self) -> dp_event.DpEvent:
        """The step as ``dp-accounting`` describes it."""
        from dp_accounting import dp_event

        if self.noise_multiplier == 0:
            return dp_event.NonPrivateDpEvent()
        gaussian = dp_event.GaussianDpEvent(self.noise_multiplier)
        return gaussian if self.sample_rate == 1 else dp_event.PoissonSampledDpEvent(self.sample_rate, gaussian)


Entry = tuple[PoissonGaussian, int]


def gathered(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """Equal steps put together: composition does not depend on the order."""
    counts: dict[PoissonGaussian, int] = {}
    for event, count in entries:
        counts[event] = counts.get(event, 0) + count
    return tuple((event, count) for event, count in counts.items() if count)
