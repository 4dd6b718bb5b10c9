"""Where correlated noise pays: the error of summed gradients, and the loss of a logistic regression, over ε and steps.

    python -m benchmarks.correlated_noise

Both compare runs at one (ε, 1e-5), each with the noise that its own sampling needs. It takes about two minutes.
"""

import math

import numpy as np

from lora_dp import BandedNoise, calibrate_noise_multiplier

DELTA = 1e-5
EPSILONS = (0.5, 1, 2, 4, 8, 16)
BANDS = (1, 2, 4, 8, 16)
Floats = np.ndarray


def coefficients(bands: int) -> Floats:
    """1, c₁, …, c_{b−1}; (1,) where noise is independent."""
    return np.array(BandedNoise(bands).coefficients if bands > 1 else (1.0,))


def noise_multiplier(epsilon: float, rate: float, steps: int, bands: int) -> float:
    """σ of a run with this many bands; infinite where its groups would be smaller than a batch."""
    if bands * rate > 1:
        return math.inf
    return calibrate_noise_multiplier(epsilon, DELTA, bands * rate, math.ceil(steps / bands), "rdp")


def noises(bands: int, steps: int, fresh: Floats) -> Floats:
    """C⁻¹·fresh, (steps, …)."""
    c, found = coefficients(bands), np.zeros_like(fresh)
    for t in range(steps):
        found[t] = fresh[t] - sum(c[j] * found[t - j] for j in range(1, min(t, bands - 1) + 1))
    return found


def error_of_sums(bands: int, steps: int) -> float:
    """Root mean square, over all steps, of the noise in the sum of the gradients so far, at σ = C = 1."""
    one = np.zeros((steps, 1))
    one[0] = 1.0
    summed = np.cumsum(noises(bands, steps, one)[:, 0])
    return float(np.linalg.norm(coefficients(bands)) * math.sqrt(np.mean(np.cumsum(summed**2))))


def trained_loss(bands: int, steps: int, batch_size: int, noise: float, rate: float, seed: int) -> float:
    """Loss on new data, after DP-SGD of a logistic regression of 2,000 examples in 50 dimensions at clip bound 1."""
    generator = np.random.default_rng(seed)
    size, width = 2000, 50
    truth = generator.normal(size=width)
    x = generator.normal(size=(2 * size, width)) / math.sqrt(width)
    y = np.where(generator.random(2 * size) < 1 / (1 + np.exp(-3 * x @ truth)), 1.0, -1.0)
    c, weights = coefficients(bands), np.zeros(width)
    group = generator.permutation(size) % bands
    scale = noise * float(np.linalg.norm(c))
    noised = noises(bands, steps, scale * generator.normal(size=(steps, width)))
    for t in range(steps):
        drawn = np.flatnonzero((group == t % bands) & (generator.random(size) < bands * batch_size / size))
        gradients = -(y[drawn] / (1 + np.exp(y[drawn] * (x[drawn] @ weights))))[:, None] * x[drawn]
        gradients /= np.maximum(1.0, np.linalg.norm(gradients, axis=1, keepdims=True))
        weights = weights - rate * (gradients.sum(0) + noised[t]) / batch_size
    return float(np.logaddexp(0, -y[size:] * (x[size:] @ weights)).mean())


def best_loss(bands: int, steps: int, batch_size: int, noise: float, seeds: int) -> float:
    """Over rates, the mean over seeds."""
    if math.isinf(noise):
        return math.nan
    rates = [2.0**power for power in range(-3, 5)]
    return min(
        float(np.mean([trained_loss(bands, steps, batch_size, noise, rate, seed) for seed in range(seeds)]))
        for rate in rates
    )


def print_table(title: str, entries: dict[str, dict[int, list[float]]], digits: int) -> None:
    """A Markdown table: a row for each run and number of bands, a column for each ε."""
    print(f"\n{title}\n\n| run | bands | " + " | ".join(f"ε = {e:g}" for e in EPSILONS) + " |")
    print("| --- |" + " ---: |" * (1 + len(EPSILONS)))
    for run, rows in entries.items():
        for bands, values in rows.items():
            print(f"| {run} | {bands} | " + " | ".join(f"{value:.{digits}f}" for value in values) + " |")


def main() -> None:
    sums: dict[str, dict[int, list[float]]] = {}
    for rate, steps in ((0.01, 400), (0.01, 2000), (0.05, 100), (0.05, 400)):
        base = [error_of_sums(1, steps) * noise_multiplier(e, rate, steps, 1) for e in EPSILONS]
        sums[f"{steps} steps at {rate:g}"] = {
            bands: [
                error_of_sums(bands, steps) * noise_multiplier(e, rate, steps, bands) / plain
                for e, plain in zip(EPSILONS, base, strict=True)
            ]
            for bands in BANDS[1:]
        }
    print_table("Error of sums, over that of independent noise", sums, 2)
    losses = {
        f"{steps} steps, batch {batch}": {
            bands: [
                best_loss(bands, steps, batch, noise_multiplier(e, batch / 2000, steps, bands), seeds=10)
                for e in EPSILONS
            ]
            for bands in (1, 4, 16)
        }
        for steps, batch in ((100, 20), (400, 20), (400, 100))
    }
    print_table("Loss of the logistic regression", losses, 3)


if __name__ == "__main__":
    main()
