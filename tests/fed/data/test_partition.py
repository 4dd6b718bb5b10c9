import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_dp.fed.data.partition import partition


def skew(labels: np.ndarray, parts: list[np.ndarray]) -> float:
    """Mean distance between a client's shares of the classes and those of all the data."""
    classes = labels.max() + 1
    overall = np.bincount(labels, minlength=classes) / len(labels)
    shares = [np.bincount(labels[part], minlength=classes) / len(part) for part in parts]
    return float(np.mean([np.abs(share - overall).sum() for share in shares]))


LABELS = np.random.default_rng(0).integers(0, 10, 1500)


@settings(deadline=None, max_examples=50)
@given(
    clients=st.integers(1, 12),
    size=st.integers(200, 400),
    scheme=st.sampled_from(["iid", "dirichlet"]),
    seed=st.integers(0, 99),
)
def test_every_example_is_at_exactly_one_client(clients, size, scheme, seed):
    parts = partition(LABELS[:size], clients, scheme, alpha=1.0, seed=seed, min_examples=5)
    assert len(parts) == clients
    assert sorted(np.concatenate(parts)) == list(range(size))
    assert min(map(len, parts)) >= 5


def test_iid_deals_evenly():
    sizes = {len(part) for part in partition(LABELS[:1003], 7, "iid")}
    assert sizes <= {143, 144}


def test_small_alpha_skews_and_large_alpha_does_not():
    skews = [skew(LABELS, partition(LABELS, 10, "dirichlet", alpha=alpha)) for alpha in (0.1, 1.0, 1000.0)]
    assert skews[0] > 1.0 > skews[1] > 0.4
    assert skews[2] < 0.2


@pytest.mark.parametrize("scheme", ["iid", "dirichlet"])
def test_the_seed_decides(scheme):
    first, again, other = (partition(LABELS, 5, scheme, seed=seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_redraws_until_every_client_has_enough():
    # a single draw of this leaves some client below 30 nearly always
    for seed in range(5):
        parts = partition(LABELS, 10, "dirichlet", alpha=0.3, seed=seed, min_examples=30)
        assert min(map(len, parts)) >= 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clients": 0}, "at least 1"),
        ({"clients": 200}, "too few for 200 clients"),
        ({"clients": 5, "min_examples": 0}, "min_examples"),
        ({"clients": 5, "scheme": "dirichlet", "alpha": 0.0}, "must be positive"),
        ({"clients": 5, "scheme": "dirichlet", "alpha": float("nan")}, "must be positive"),
        ({"clients": 5, "scheme": "sorted"}, 'take "iid" or "dirichlet"'),
        ({"clients": 10, "scheme": "dirichlet", "alpha": 1e-3, "min_examples": 140}, "larger alpha or fewer"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        partition(LABELS, **arguments)
