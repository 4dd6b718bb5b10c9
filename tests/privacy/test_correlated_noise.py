"""Noise that later steps take back: against dense matrices, what a turn of an example moves, and how it is noised."""

import itertools
import math

import numpy as np
import pytest
import torch

from lora_dp import BandedNoise
from lora_dp.privacy.clipping import FlatClipping
from lora_dp.privacy.correlated_noise import BandedSource, CorrelatedMechanism
from lora_dp.privacy.randomness import SecureSource, SeededSource
from tests.sources import CPU
from tests.support import check_deviation

SCALE = 2.0**32 * 1.3


def matrix(bands: int, steps: int) -> np.ndarray:
    """C, from the definition: the binomial series of (1 − x)^(−1/2), cut off."""
    column = [math.comb(2 * j, j) / 4**j if j < bands else 0.0 for j in range(steps)]
    return np.array([[column[t - k] if t >= k else 0.0 for k in range(steps)] for t in range(steps)])


def stacked(source, steps: int, size: int, scale: float = SCALE) -> np.ndarray:
    return np.stack([source.rounded_gaussians([(size,)], scale, CPU)[0].numpy() for _ in range(steps)])


# The noise


@pytest.mark.parametrize("bands", [2, 3, 8])
def test_the_noise_is_that_of_dense_matrices(bands):
    steps = 3 * bands + 1
    found = stacked(BandedSource(BandedNoise(bands), SeededSource(5)), steps, 40)
    fresh, c = stacked(SeededSource(5), steps, 40), matrix(bands, steps)
    expected = np.linalg.solve(c, fresh.astype(np.float64))
    # Coefficients are rounded to 2⁻¹⁶.
    assert np.abs(found - expected).max() < 1e-4 * SCALE
    rounded = np.round(c * 2**16).astype(np.int64).astype(object)
    assert np.abs(rounded @ found.astype(object) - fresh.astype(object) * 2**16).max() <= 2**15


def test_coefficients_are_a_square_root_of_sums():
    c = matrix(6, 6)
    assert np.allclose(c @ c, np.tril(np.ones((6, 6))))
    assert np.abs(np.array(BandedNoise(6).coefficients) - c[:, 0]).max() <= 2.0**-17
    assert BandedNoise(6).norm == pytest.approx(np.linalg.norm(c[:, 0]), abs=1e-4)


def test_noise_has_the_covariance_of_the_factorisation():
    bands, steps, size = 3, 6, 40_000
    found = stacked(BandedSource(BandedNoise(bands), SecureSource()), steps, size) / SCALE
    inverse = np.linalg.inv(matrix(bands, steps))
    expected = inverse @ inverse.T
    deviation = np.sqrt((expected**2 + np.outer(np.diag(expected), np.diag(expected))) / size)
    assert (np.abs(found @ found.T / size - expected) < 5.4 * deviation).all()


def test_sums_of_noise_stay_smaller():
    """What it is for: the deviation of 64 summed noises, at the same privacy of a turn."""
    options = BandedNoise(8)
    summed = stacked(BandedSource(options, SeededSource(1)), 64, 4000).sum(0) / SCALE
    assert 0.35 < options.norm * summed.std() / 8 < 0.45


@pytest.mark.parametrize("source", [SecureSource(), SeededSource(0)])
def test_it_is_as_secret_as_its_source(source):
    assert BandedSource(BandedNoise(2), source).secure is source.secure


def test_other_shapes_are_refused():
    source = BandedSource(BandedNoise(2), SeededSource(0))
    source.rounded_gaussians([(2,), (3,)], SCALE, CPU)
    with pytest.raises(RuntimeError, match="what is trained has changed since"):
        source.rounded_gaussians([(2,)], SCALE, CPU)


# What a turn moves


@pytest.mark.parametrize("bands", [2, 3, 4])
def test_no_turns_of_a_group_share_a_row(bands):
    """Over all patterns that the sampler admits, k turns move C·S by √k·‖c‖, each in rows of its own."""
    steps = 9
    c, norm = matrix(bands, steps), np.linalg.norm(matrix(bands, bands)[:, 0])
    for group in range(bands):
        turns = range(group, steps, bands)
        for chosen in itertools.chain.from_iterable(itertools.combinations(turns, k) for k in range(len(turns) + 1)):
            columns = c[:, list(chosen)]
            gram = columns.T @ columns
            assert np.array_equal(gram, np.diag(np.diag(gram)))
            assert np.linalg.norm(columns.sum(1)) <= math.sqrt(len(chosen)) * norm * (1 + 1e-12)
    # One step nearer, they would.
    assert c[:, 0] @ c[:, bands - 1] > 0


def test_what_rounding_moves_is_within_the_sensitivity():
    """Given the same releases, the centres N of two neighbours: apart by ‖c‖ times their sums, and a step a number."""
    bands, steps, size, turn = 4, 9, 30, 3
    generator, whole = np.random.default_rng(0), np.round(matrix(4, 9)[:, 0] * 2**16).astype(np.int64)
    for _ in range(20):
        one = generator.integers(-(2**30), 2**30, (steps, size))
        other = one.copy()
        other[turn] += generator.integers(-1000, 1000, size)
        released = one + generator.integers(-(2**34), 2**34, (steps, size))

        def centres(sums, released=released):
            noise = released - sums
            back = [sum(whole[j] * noise[t - j] for j in range(1, min(t, bands - 1) + 1)) for t in range(steps)]
            return np.stack([sums[t] - (np.asarray(back[t]) + 2**15 >> 16) for t in range(steps)])

        moved, norm = centres(one) - centres(other), BandedNoise(bands).norm
        assert not moved[:turn].any() and not moved[turn + bands :].any()
        assert np.linalg.norm(moved) <= norm * np.linalg.norm(one - other) + math.sqrt((bands - 1) * size)


@pytest.mark.parametrize(("bands", "noise"), [(2, 0.7), (5, 3.0)])
def test_noise_is_for_all_that_a_turn_moves(bands, noise):
    mechanism = CorrelatedMechanism(FlatClipping(0.4), noise, SeededSource(0), BandedNoise(bands))
    for size in (1, 10**6):
        least = noise * BandedNoise(bands).norm * 0.4
        rounding = mechanism.grid(size)[0] * math.sqrt(size) * (1 + math.sqrt(bands - 1))
        assert least + noise * BandedNoise(bands).norm * rounding <= mechanism.noise_std(size) < least * (1 + 1e-4)


@pytest.mark.parametrize("bands", [2, 4])
def test_every_release_has_new_noise_of_the_stated_deviation(bands):
    """C times the releases is C times the sums with independent noise: less, or some that came before, is a leak."""
    steps, noise, bound = 40, 0.8, 1.5
    mechanism = CorrelatedMechanism(FlatClipping(bound), noise, SecureSource(), BandedNoise(bands))
    sums = torch.randn(steps, 2, 25, generator=torch.Generator().manual_seed(0))
    released = torch.stack([torch.stack(mechanism.release(list(step))) for step in sums]).flatten(1).double().numpy()
    fresh = matrix(bands, steps) @ (released - sums.flatten(1).double().numpy())
    expected = noise * bound * np.linalg.norm(matrix(bands, bands)[:, 0])
    check_deviation(torch.from_numpy(fresh).flatten(), expected)
    for lag in range(1, bands + 1):
        products = fresh[lag:] * fresh[:-lag] / expected**2
        assert abs(products.mean()) * math.sqrt(products.size) < 5.4


def test_without_noise_sums_are_released_as_they_are():
    mechanism = CorrelatedMechanism(FlatClipping(1.0), 0.0, SeededSource(0), BandedNoise(2))
    for _ in range(3):
        [released] = mechanism.release([torch.tensor([0.25, -3.0])])
        assert released.tolist() == [0.25, -3.0]


@pytest.mark.parametrize(("bands", "error"), [(1, ValueError), (0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_bands_are_two_or_more(bands, error):
    with pytest.raises(error, match="bands must be"):
        BandedNoise(bands)
