"""Feature sums: what an example adds is the gradient of its loss, and no longer than the sensitivity."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_dp.losses import IGNORED, feature_sums_loss
from lora_dp.nn.feature_sums import FeatureSums, SumWeights, unit_length


def added(sums: FeatureSums, unit: torch.Tensor, label: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What one example adds: minus the gradients of its loss."""
    sums.zero_grad()
    feature_sums_loss(sums(unit[None]), torch.tensor([label])).sum().backward()
    by_class, over_all = sums.by_class.weight.grad, sums.over_all.weight.grad
    assert by_class is not None and over_all is not None
    return -by_class, -over_all[0]


@pytest.mark.parametrize("start", ["zero", "anywhere"])
def test_an_example_adds_its_features_to_its_class_and_its_moments_to_all(start: str) -> None:
    weights = SumWeights(counts=0.3, first=0.7, second=1.5)
    sums = FeatureSums(4, 3, weights, dtype=torch.float64)
    if start == "anywhere":
        torch.nn.init.normal_(sums.by_class.weight)
        torch.nn.init.normal_(sums.over_all.weight)
    unit = unit_length(torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64))
    by_class, over_all = added(sums, unit, 2)
    torch.testing.assert_close(by_class[2], torch.cat([unit, torch.tensor([0.3], dtype=torch.float64)]))
    assert not by_class[:2].any()
    torch.testing.assert_close(over_all, torch.cat([0.7 * unit, 1.5 * unit * unit]))


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=6), *(st.floats(0, 3) for _ in range(3)))
def test_no_example_adds_more_than_the_sensitivity(
    features: list[float], counts: float, first: float, second: float
) -> None:
    sums = FeatureSums(len(features), 2, SumWeights(counts, first, second), dtype=torch.float64)
    parts = added(sums, unit_length(torch.tensor(features, dtype=torch.float64)), 1)
    norm = math.sqrt(sum(float(part.square().sum()) for part in parts))
    assert norm <= sums.sensitivity * (1 + 1e-12)


def test_the_sensitivity_is_reached() -> None:
    """By features on one axis, whose squares are as long as they are: a smaller bound would be wrong."""
    sums = FeatureSums(3, 2, dtype=torch.float64)
    parts = added(sums, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), 0)
    assert math.sqrt(sum(float(part.square().sum()) for part in parts)) == pytest.approx(sums.sensitivity, rel=1e-12)


@pytest.mark.parametrize("parts", list(itertools.product([0.0, 0.5], repeat=3)))
def test_moments_undo_the_weights_and_leave_out_what_has_none(parts: tuple[float, float, float]) -> None:
    sums = FeatureSums(3, 2, SumWeights(*parts), dtype=torch.float64)
    units = unit_length(torch.randn(5, 3, dtype=torch.float64))
    labels = torch.tensor([0, 1, 1, 0, 1])
    feature_sums_loss(sums(units), labels).mean().backward()
    with torch.no_grad():
        for parameter in sums.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad)
    found = sums.moments(noise=0.25)
    assert found.noise == 0.25
    for label in (0, 1):
        torch.testing.assert_close(found.class_sums[label], units[labels == label].sum(0) / 5)
    expected = (torch.tensor([0.4, 0.6], dtype=torch.float64), units.mean(0), units.square().mean(0))
    for weight, value, right in zip(parts, (found.shares, found.first, found.second), expected, strict=True):
        if weight:
            assert value is not None
            torch.testing.assert_close(value, right)
        else:
            assert value is None


def test_an_example_without_a_class_adds_nothing() -> None:
    sums = FeatureSums(3, 2)
    feature_sums_loss(sums(unit_length(torch.randn(4, 3))), torch.full((4,), IGNORED)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in sums.parameters())


def test_unit_length_is_taken_in_float32_at_least_and_of_any_size() -> None:
    half = unit_length(torch.full((1, 4), 3e4, dtype=torch.float16))  # whose squares float16 cannot hold
    torch.testing.assert_close(half, torch.full((1, 4), 0.5))
    tiny = unit_length(torch.full((1, 4), 1e-30, dtype=torch.float64))
    torch.testing.assert_close(tiny, torch.full((1, 4), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("name", ["counts", "first", "second"])
@pytest.mark.parametrize(("value", "error"), [(-1.0, ValueError), (math.inf, ValueError), ("1", TypeError)])
def test_weights_are_checked(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        SumWeights(**{name: value})  # type: ignore[arg-type]
