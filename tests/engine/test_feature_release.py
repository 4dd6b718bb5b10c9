"""Feature sums by an engine: the means they are of, the noise they have, and the ledger that counts them first."""

import math

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lora_dp import DPLinear, PrivacyEngine, calibrate_noise_multiplier
from lora_dp.engine import feature_release
from lora_dp.engine.feature_release import release_feature_sums
from lora_dp.losses import IGNORED, classification_loss
from lora_dp.nn.feature_sums import SumWeights, unit_length
from lora_dp.privacy.accounting import PoissonGaussian


def data(n: int = 40, d: int = 5, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, d, generator=generator, dtype=torch.float64) * 7
    return features, torch.randint(classes, (n,), generator=generator)


@pytest.mark.parametrize("rows", [8192, 16])
def test_without_noise_they_are_the_means(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Of all examples, whether these pass in one part or in several."""
    monkeypatch.setattr(feature_release, "_ROWS", rows)
    features, labels = data()
    labels[3] = IGNORED
    found = release_feature_sums(PrivacyEngine(), features, labels, 3, noise_multiplier=0.0)
    units, known = unit_length(features), labels != IGNORED
    near = {"rtol": 1e-5, "atol": 1e-8}  # the margin of the clip bound
    for label in range(3):
        torch.testing.assert_close(found.class_sums[label], units[labels == label].sum(0) / 40, **near)
    assert found.shares is not None and found.first is not None and found.second is not None
    torch.testing.assert_close(
        found.shares, torch.bincount(labels[known], minlength=3) / 40.0, check_dtype=False, **near
    )
    torch.testing.assert_close(found.first, units[known].sum(0) / 40, **near)
    torch.testing.assert_close(found.second, units[known].square().sum(0) / 40, **near)
    assert found.noise == 0


def test_noise_is_as_said_and_matched_to_the_sensitivity() -> None:
    features, labels = data(d=200)
    weights = SumWeights(counts=0.5, first=2.0, second=1.0)
    exact = release_feature_sums(PrivacyEngine(), features, labels, 3, noise_multiplier=0.0, weights=weights)
    noisy = release_feature_sums(
        PrivacyEngine(reproducible_seed=1), features, labels, 3, noise_multiplier=3.0, weights=weights
    )
    assert noisy.noise == pytest.approx(3.0 * math.sqrt(1 + 0.25 + 4 + 1) / 40, rel=1e-5)
    for name, weight in (("class_sums", 1.0), ("first", 2.0), ("second", 1.0)):
        z = (getattr(noisy, name) - getattr(exact, name)) * weight / noisy.noise
        assert abs(float(z.square().mean()) - 1) < 4 * math.sqrt(2 / z.numel())
        assert abs(float(z.mean())) < 4 / math.sqrt(z.numel())


def test_the_ledger_counts_before_the_sums_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own step does: what fails while it draws noise has been counted."""
    engine, (features, labels) = PrivacyEngine(), data()
    monkeypatch.setattr("lora_dp.engine.optimizer.find_fused_step", lambda *_: None)
    monkeypatch.setattr("lora_dp.privacy.mechanism.add_noise", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        release_feature_sums(engine, features, labels, 3, noise_multiplier=2.0)
    assert engine.ledger.entries == ((PoissonGaussian(2.0, 1.0), 1),)


def test_a_run_goes_on_from_it_within_one_budget() -> None:
    engine, (features, labels) = PrivacyEngine(), data()
    release_feature_sums(engine, features, labels, 3, noise_multiplier=8.0)
    noise = calibrate_noise_multiplier(2.0, 1e-5, 0.5, 20, spent=engine.ledger)
    head = DPLinear(5, 3, dtype=torch.float64)
    loader = DataLoader(TensorDataset(features, labels), batch_size=20)
    model, optimizer, batches = engine.make_private(
        model=head,
        optimizer=torch.optim.SGD(head.parameters(), lr=0.1),
        data_loader=loader,
        noise_multiplier=noise,
        max_grad_norm=1.0,
    )
    for x, y in batches.take(20):
        optimizer.backward(classification_loss(model(x), y))
        optimizer.step()
    assert 1.995 < engine.get_epsilon(1e-5) <= 2.0


def test_a_row_that_is_not_finite_adds_nothing() -> None:
    features, labels = data()
    features[7, 2] = math.nan
    found = release_feature_sums(PrivacyEngine(), features, labels, 3, noise_multiplier=0.0)
    kept = torch.arange(40) != 7
    assert found.first is not None
    torch.testing.assert_close(found.first, unit_length(features[kept]).sum(0) / 40, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"features": torch.zeros(4)}, ValueError, "features"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "labels"),
        ({"features": torch.zeros(0, 5), "labels": torch.zeros(0, dtype=torch.int64)}, ValueError, "at least one"),
        ({"labels": torch.tensor([0, 1, 2, 3] * 10)}, ValueError, "none of the classes 0 to 2"),
        ({"labels": torch.tensor([0, 1, 2, -1] * 10)}, ValueError, "none of the classes"),
        ({"labels": torch.zeros(40)}, TypeError, "int64"),
        ({"features": torch.zeros(40, 5, dtype=torch.int64)}, TypeError, "floating-point"),
        ({"classes": 0}, ValueError, "classes"),
        ({"engine": None}, TypeError, "engine"),
    ],
)
def test_what_does_not_fit_is_refused_and_not_counted(
    change: dict[str, object], error: type[Exception], words: str
) -> None:
    engine, (features, labels) = PrivacyEngine(), data()
    given = {"engine": engine, "features": features, "labels": labels, "classes": 3, "noise_multiplier": 1.0}
    with pytest.raises(error, match=words):
        release_feature_sums(**{**given, **change})  # type: ignore[arg-type]
    assert engine.ledger.steps == 0
