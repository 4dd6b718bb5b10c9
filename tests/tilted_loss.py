"""δ of a composition far out in the tail, where a plain Fourier transform leaves rounding errors only."""

import math

import numpy as np
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from scipy import fft

POINTS = 2**20


def tilted_delta(noise: float, rate: float, steps: int, epsilon: float, interval: float) -> float:
    """δ(ε) of ``steps`` Poisson-sampled Gaussian steps, for removing an example.

    One step's loss, as dp-accounting puts it on the grid, is weighted by exp(loss) before it is convolved, and back
    afterwards (Esscher's transform): what is rounded off beyond ε is smaller by a factor of exp(ε).
    """
    one = from_gaussian_mechanism(
        noise, value_discretization_interval=interval, sampling_prob=rate, use_connect_dots=True
    )
    pmf = one._pmf_remove.to_dense_pmf()
    losses = (np.arange(pmf.size) + pmf._lower_loss) * interval
    weights = pmf._probs * np.exp(losses)
    total = weights.sum()
    composed = fft.irfft(fft.rfft(weights / total, POINTS) ** steps, POINTS)
    assert composed[-POINTS // 8 :].max() < 1e-13  # nothing has wrapped around
    sums = steps * losses[0] + np.arange(POINTS) * interval
    beyond = sums > epsilon
    back = np.exp(steps * math.log(total) - sums[beyond])
    return float(np.sum(-np.expm1(epsilon - sums[beyond]) * composed[beyond] * back))
