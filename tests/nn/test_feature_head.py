"""The feature head: what it computes, and how released sums start it."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import LoRAConfig, inject_lora, load_adapter, save_adapter
from lora_dp.losses import feature_sums_loss
from lora_dp.nn.feature_head import MEAN, PRIOR, SCALE, FeatureHead, feature_head_of, feature_statistics, started_head
from lora_dp.nn.feature_sums import FeatureMoments, SumWeights, unit_length
from lora_dp.privacy.shrinkage import JamesStein
from tests.support import RULES, assert_close, brute_force, clip_and_sum, make_private, private_gradients


def head_at_random(d: int = 5, classes: int = 3, dtype: torch.dtype = torch.float64) -> FeatureHead:
    torch.manual_seed(0)
    head = FeatureHead(d, classes, dtype=dtype)
    for tensor in head.state_dict().values():
        nn.init.normal_(tensor)
    return head


def exact_moments(units: Tensor, labels: Tensor, classes: int, weights: SumWeights | None = None) -> FeatureMoments:
    """Sums without noise, from their definitions."""
    sums = torch.stack([units[labels == label].sum(0) for label in range(classes)]) / len(units)
    shares = torch.bincount(labels, minlength=classes).to(units) / len(units)
    return FeatureMoments(sums, shares, units.mean(0), units.square().mean(0), 0.0, weights or SumWeights())


def clusters(count: int = 600, d: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features (N, d) at unit length, of three classes of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), count, True, generator=generator)
    centres = torch.randn(3, d, dtype=torch.float64, generator=generator) + 1
    noise = torch.randn(count, d, dtype=torch.float64, generator=generator)
    return unit_length(centres[labels] + 0.5 * noise), labels


# What it computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_are_those_of_the_formula(dtype: torch.dtype) -> None:
    head = head_at_random(dtype=dtype)
    x = torch.randn(4, 5, dtype=dtype) * torch.tensor([1e-20, 1.0, 1e3, 1e15], dtype=dtype)[:, None]
    wide = {name: tensor.double() for name, tensor in head.state_dict().items()}
    units = x.double() / x.double().square().sum(1, keepdim=True).sqrt()
    expected = ((units - wide[MEAN]) * wide[SCALE]) @ wide["linear.weight"].t() + 0.3 * wide["linear.bias"]
    expected = math.sqrt(3 / 2) * expected
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(head.eval()(x).double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(head.train()(x).double(), expected + wide[PRIOR], rtol=tolerance, atol=tolerance)


def test_at_first_it_is_a_linear_layer_on_units() -> None:
    head = FeatureHead(4, 2)
    x = torch.randn(3, 4)
    for mode in (True, False):
        expected = unit_length(x) @ head.linear.weight.t() + 0.3 * head.linear.bias
        torch.testing.assert_close(head.train(mode)(x), expected, rtol=1e-5, atol=1e-6)


def test_the_bias_takes_little_of_an_examples_squared_gradient() -> None:
    """That of the weight is as long as that of the logits, for features of unit length."""
    head = FeatureHead(4, 3, dtype=torch.float64)
    logits = head(torch.randn(1, 4, dtype=torch.float64))
    toward = torch.tensor([[0.3, -0.2, -0.1]], dtype=torch.float64)
    logits.backward(toward)
    toward = math.sqrt(3 / 2) * toward
    assert float(head.linear.weight.grad.norm()) == pytest.approx(float(toward.norm()))
    torch.testing.assert_close(head.linear.bias.grad, 0.3 * toward[0])


def test_logits_of_few_classes_and_of_many_differ_by_the_square_root() -> None:
    assert [FeatureHead(4, classes).logit_scale for classes in (1, 2, 8, 200)] == [1, 1, 2, 10]


def test_a_feature_of_zeros_has_finite_logits_and_gradients() -> None:
    head = FeatureHead(4, 2)
    x = torch.zeros(1, 4, requires_grad=True)
    head(x).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


def test_statistics_are_buffers_that_no_step_trains() -> None:
    model = nn.Sequential(nn.Tanh(), head_at_random(dtype=torch.float32))
    assert {name for name, _ in model.named_parameters()} == {"1.linear.weight", "1.linear.bias"}
    statistics = feature_statistics(model)
    assert set(statistics) == {f"1.{name}" for name in (MEAN, SCALE, PRIOR)}
    found = feature_head_of(model)
    assert found is not None and found == ("1", model[1])
    assert statistics["1.feature_mean"] is model[1].feature_mean
    before = {name: tensor.clone() for name, tensor in statistics.items()}
    optimizer = make_private(model.train(), batch_size=4, noise_multiplier=1.0)
    optimizer.batch.expect(4)
    F.cross_entropy(model(torch.randn(4, 5)), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in feature_statistics(model).items())
    plain = nn.Sequential(nn.Linear(2, 2))
    assert feature_head_of(plain) is None and feature_statistics(plain) == {}


@pytest.mark.parametrize(("sizes", "name"), [((-1, 2), "in_features"), ((3, -1), "out_features")])
def test_sizes_are_checked(sizes: tuple[int, int], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        FeatureHead(*sizes)


# Private steps


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_a_private_step_are_those_of_brute_force(rule: str) -> None:
    """In training mode, in which the classes' shares are in the logits; beside an adapter that is in front of it."""
    torch.manual_seed(1)
    model = inject_lora(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), head_at_random()).double(),
        LoRAConfig(r=2, target_modules=["0"], trainable_modules=["2"]),
    ).train()
    nn.init.normal_(model[0].lora_B)
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0])
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {"0.lora_A", "0.lora_B", "2.linear.weight", "2.linear.bias"}
    singles = brute_force(model, loss, [(x[i : i + 1], y[i : i + 1]) for i in range(6)], names)
    expected = clip_and_sum(singles, rule, 0.5, lambda name: name.rpartition(".")[0])
    optimizer = make_private(model, batch_size=6, max_grad_norm=0.5, clipping=rule)
    optimizer.batch.expect(6)
    loss(model, (x, y)).backward()
    optimizer.step()
    found = private_gradients(model)
    assert found.keys() == names
    for name in names:
        assert_close(found[name] * 6, expected[name])


def test_a_step_of_sums_through_the_head_releases_them() -> None:
    """Noise aside; the head's own layer stays as it is."""
    model = nn.Sequential(nn.Identity(), head_at_random(dtype=torch.float32))
    x, y = torch.randn(8, 5), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with model[1].summing(SumWeights()) as sums:
        assert [name for name, p in model.named_parameters() if p.requires_grad] == [
            f"1._sums.{name}" for name, _ in sums.named_parameters()
        ]
        optimizer = make_private(model.train(), batch_size=8, max_grad_norm=sums.sensitivity)
        optimizer.batch.expect(8)
        optimizer.backward(feature_sums_loss(model(x), y))
        optimizer.step()
        released = sums.moments(0.0)
    right = exact_moments(unit_length(x.double()), y, 3)
    torch.testing.assert_close(released.class_sums, right.class_sums, rtol=1e-5, atol=1e-6)
    for name in ("shares", "first", "second"):
        torch.testing.assert_close(getattr(released, name), getattr(right, name), rtol=1e-5, atol=1e-6)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("fails", [False, True])
def test_summing_ends_as_it_began(fails: bool) -> None:
    head = head_at_random()
    head.linear.bias.requires_grad_(False)
    x = torch.randn(3, 5, dtype=torch.float64)
    before = head(x)
    try:
        with head.summing(SumWeights(counts=0.3)) as sums:
            assert head(x).shape == (3, 4) and sums.weights.counts == 0.3
            assert not head.linear.weight.requires_grad
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert torch.equal(head(x), before)
    assert head.linear.weight.requires_grad and not head.linear.bias.requires_grad
    assert {name for name, _ in head.named_parameters()} == {"linear.weight", "linear.bias"}


# On disk


def test_an_adapter_on_disk_has_the_statistics(tmp_path) -> None:
    def made() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), FeatureHead(5, 3))

    config = LoRAConfig(r=2, target_modules=[], trainable_modules=["2"])
    base = made()
    trained = inject_lora(made(), config)
    trained[0].load_state_dict(base[0].state_dict())
    for tensor in trained[2].state_dict().values():
        nn.init.normal_(tensor)
    save_adapter(trained, tmp_path)
    x = torch.randn(2, 4)
    for model in (base, inject_lora(made(), config)):
        model[0].load_state_dict(trained[0].state_dict())
        load_adapter(model, tmp_path)
        for mode in (True, False):  # the first tells the prior, too
            assert torch.equal(model.train(mode)(x), trained.train(mode)(x))
        assert [name for name, p in model.named_parameters() if p.requires_grad] == ["2.linear.weight", "2.linear.bias"]


# Its start


def test_without_noise_the_start_is_exact() -> None:
    units, labels = clusters()
    head, released = FeatureHead(6, 3, dtype=torch.float64), exact_moments(units, labels, 3)
    found = started_head(head, released, balanced=True, warm=True)
    torch.testing.assert_close(found[MEAN], units.mean(0))
    variance = units.var(0, correction=0)
    assert float(variance.min()) > 0.1 * float(variance.mean())  # none is lifted
    torch.testing.assert_close(found[SCALE], (variance * 6).rsqrt())
    torch.testing.assert_close(found[PRIOR], (torch.bincount(labels).double() / len(labels)).log())
    scaled = (units - found[MEAN]) * found[SCALE]
    torch.testing.assert_close(scaled.square().sum(1).mean(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("balanced", [True, False])
def test_without_noise_the_warm_head_is_that_of_the_nearest_class_mean(balanced: bool) -> None:
    """Logits differ as −d/2 · the squared distances do, in features that are scaled to a variance of 1/d."""
    units, labels = clusters()
    head = FeatureHead(6, 3, dtype=torch.float64)
    found = started_head(head, exact_moments(units, labels, 3), balanced=balanced, warm=True)
    assert (PRIOR in found) == balanced
    head.load_state_dict({**head.state_dict(), **found})
    scaled = (units - head.feature_mean) * head.feature_scale
    means = torch.stack([scaled[labels == label].mean(0) for label in range(3)])
    expected = -0.5 * 6 * torch.cdist(scaled, means).square()
    if not balanced:  # then a class is the likelier, the more common it is
        expected = expected + (torch.bincount(labels).double() / len(labels)).log()
    logits = head.eval()(units)
    torch.testing.assert_close(logits - logits[:, :1], expected - expected[:, :1])
    assert float((logits.argmax(1) == labels).double().mean()) > 0.9


def test_switches_decide_what_is_started() -> None:
    units, labels = clusters()
    head, released = FeatureHead(6, 3, dtype=torch.float64), exact_moments(units, labels, 3)
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    for balanced in (True, False):
        for warm in (True, False):
            found = started_head(head, released, balanced=balanced, warm=warm)
            expected = {MEAN, SCALE, "linear.weight", "linear.bias"} | ({PRIOR} if balanced else set())
            assert set(found) == expected
            assert all(tensor.shape == before[name].shape for name, tensor in found.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())


def test_a_head_that_has_learnt_judges_as_before_on_features_that_are_now_centred_and_scaled() -> None:
    """And again, where it had been centred and scaled before."""
    units, labels = clusters()
    head = FeatureHead(6, 3, dtype=torch.float64).eval()
    for released in (exact_moments(units, labels, 3), exact_moments(units[::3], labels[::3], 3)):
        before = head(units)
        values = started_head(head, released, balanced=True, warm=False)
        assert not torch.equal(values[SCALE], head.feature_scale)
        head.load_state_dict({**head.state_dict(), **values})
        torch.testing.assert_close(head(units), before, rtol=1e-10, atol=1e-12)


def test_what_was_not_released_is_made_without() -> None:
    units, labels = clusters()
    released = exact_moments(units, labels, 3, SumWeights(0, 0, 0))
    released = replace(released, shares=None, first=None, second=None)
    found = started_head(FeatureHead(6, 3, dtype=torch.float64), released, balanced=True, warm=False)
    torch.testing.assert_close(found[MEAN], units.mean(0))  # the class sums' sum
    assert torch.equal(found[SCALE], torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(found[PRIOR], torch.full((3,), -math.log(3), dtype=torch.float64))


def noise_alone(d: int, classes: int, noise: float, generator: torch.Generator) -> FeatureMoments:
    weights = SumWeights()

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=torch.float64, generator=generator)

    return FeatureMoments(
        noise * drawn(classes, d),
        noise / weights.counts * drawn(classes),
        noise / weights.first * drawn(d),
        noise / weights.second * drawn(d),
        noise,
        weights,
    )


def test_under_noise_alone_the_head_is_left_next_to_where_it_was() -> None:
    """Scales are alike, and never far from 1: that features have length 1 is known."""
    d, classes, noise = 400, 4, 0.05
    head, generator = FeatureHead(d, classes, dtype=torch.float64), torch.Generator().manual_seed(3)
    found = [started_head(head, noise_alone(d, classes, noise, generator), balanced=True, warm=True) for _ in range(40)]
    means = torch.stack([values[MEAN] for values in found])
    assert float(means.square().sum(1).mean()) < 0.01 * d * noise**2
    assert float(means.mean(0).norm()) < 0.2 * noise  # that of 400 numbers: with nothing shrunk, 2 · noise
    scales = torch.stack([values[SCALE] for values in found])
    assert float((scales.std(1) / scales.mean(1)).median()) < 0.1
    # A feature counts a tenth of the mean variance at least: 3.2 times the mean scale at most.
    assert float(scales.min()) > 0.3 and float(scales.max()) < 3.5 and 0.8 < float(scales.median()) < 1.3
    for values in found:
        assert all(bool(tensor.isfinite().all()) for tensor in values.values())


def test_two_views_of_the_mean_are_joined_by_the_inverse_of_their_variances() -> None:
    """No other weighting has as little noise; so little that shrinking it plays no part here."""
    generator = torch.Generator().manual_seed(4)
    d, classes, noise, first = 30, 5, 1e-3, 0.7
    mean = torch.full((d,), 0.1, dtype=torch.float64)
    errors = []
    for _ in range(500):
        drawn = torch.randn(classes + 1, d, dtype=torch.float64, generator=generator)
        sums = mean / classes + noise * drawn[:-1]
        released = FeatureMoments(sums, None, mean + noise / first * drawn[-1], None, noise, SumWeights(0, first, 0))
        head = FeatureHead(d, classes, dtype=torch.float64)
        errors.append(started_head(head, released, balanced=False, warm=False)[MEAN] - mean)
    found = float(torch.stack(errors).square().mean())
    best = noise**2 / (1 / classes + first**2)
    # 15,000 squares of normals: a relative deviation of 0.0115
    assert found == pytest.approx(best, rel=0.05)
    drawn = torch.randn(classes + 1, d, dtype=torch.float64, generator=generator)
    views = noise * drawn[:-1].sum(0), noise / first * drawn[-1]
    w = first**2 / (first**2 + 1 / classes)
    released = FeatureMoments(
        mean / classes + noise * drawn[:-1], None, mean + views[1], None, noise, SumWeights(0, first, 0)
    )
    head = FeatureHead(d, classes, dtype=torch.float64)
    joined = mean + (1 - w) * views[0] + w * views[1]
    torch.testing.assert_close(
        started_head(head, released, balanced=False, warm=False)[MEAN],
        JamesStein()(joined, math.sqrt(best)),
        rtol=1e-12,
        atol=0,
    )


def test_shares_stay_positive_and_add_up_to_one_under_noise() -> None:
    generator = torch.Generator().manual_seed(5)
    head = FeatureHead(4, 10, dtype=torch.float64)
    for noise in (0.01, 0.1, 10.0):
        for _ in range(20):
            found = started_head(head, noise_alone(4, 10, noise, generator), balanced=True, warm=False)[PRIOR].exp()
            assert float(found.sum()) == pytest.approx(1) and float(found.min()) > 0
    shares = torch.tensor([0.7, 0.4, -0.1, *[0.0] * 7], dtype=torch.float64)  # noise made one negative
    released = replace(noise_alone(4, 10, 0.1, generator), shares=shares)
    found = started_head(head, released, balanced=True, warm=False)[PRIOR].exp()
    assert float(found[0]) > float(found[1]) > float(found[2]) > 0


@pytest.mark.parametrize("narrow", [False, True])
def test_the_warm_start_is_nearer_to_the_exact_one_than_the_released_means(narrow: bool) -> None:
    """Also where features vary little and are scaled up: their noise is scaled up with them."""
    generator = torch.Generator().manual_seed(6)
    d, classes, noise = 60, 3, 0.01
    centres = torch.randn(classes, d, dtype=torch.float64, generator=generator)
    labels = torch.arange(900) % classes
    features = centres[labels] + 3 * torch.randn(900, d, dtype=torch.float64, generator=generator)
    units = unit_length(features + (20 if narrow else 0))
    head, exact = FeatureHead(d, classes, dtype=torch.float64), exact_moments(units, labels, classes)
    right = started_head(head, exact, balanced=True, warm=True)
    assert (float(right[SCALE].mean()) > 4) == narrow
    raw = risk = 0.0
    for _ in range(40):
        added = noise * torch.randn(classes, d, dtype=torch.float64, generator=generator)
        # Mean and scale are as they are without noise: the class means alone are at stake.
        noisy = replace(exact, class_sums=exact.class_sums + added - added.mean(0), noise=noise)
        noisy = replace(noisy, weights=SumWeights(0.5, 1e6, 1e6))
        found = started_head(head, noisy, balanced=True, warm=True)
        unshrunk = ((noisy.class_sums * classes) - found[MEAN]) * found[SCALE] * d
        truth = ((exact.class_sums * classes) - found[MEAN]) * found[SCALE] * d
        risk += float((head.logit_scale * found["linear.weight"] - truth).square().sum())
        raw += float((unshrunk - truth).square().sum())
    assert risk < 0.8 * raw


def test_a_class_mean_that_is_shrunk_is_nearest_to_itself() -> None:
    """Boundaries lie half-way between the means that the weights stand for, however much noise was taken out."""
    units, labels = clusters()
    released = replace(exact_moments(units, labels, 3), noise=0.02)
    head = FeatureHead(6, 3, dtype=torch.float64)
    found = started_head(head, released, balanced=True, warm=True)
    weight, bias = (head.logit_scale * found[name] for name in ("linear.weight", "linear.bias"))
    means = weight / 6
    scores = means @ weight.t() + 0.3 * bias
    expected = -0.5 * 6 * torch.cdist(means, means).square()
    torch.testing.assert_close(scores - scores.diagonal()[:, None], expected)


# Shrinking


def test_shrinking_lowers_the_risk_and_never_lengthens() -> None:
    generator = torch.Generator().manual_seed(7)
    for d in (3, 10, 100):
        for length in (0.0, 1.0, 5.0):
            truth = torch.full((d,), length / math.sqrt(d), dtype=torch.float64)
            noise = 0.5
            raw = truth + noise * torch.randn(500, d, dtype=torch.float64, generator=generator)
            found = torch.stack([JamesStein()(row, noise) for row in raw])
            assert bool((found.norm(dim=1) <= raw.norm(dim=1) * (1 + 1e-12)).all())
            assert float((found - truth).square().sum()) < float((raw - truth).square().sum())


@pytest.mark.parametrize("d", [1, 2, 3])
def test_shrinking_never_lengthens_short_vectors(d: int) -> None:
    """For d < 3 no such estimator is nearer to the truth, and none is needed."""
    x = torch.full((d,), 0.5, dtype=torch.float64)
    found = JamesStein()(x, 1.0)
    assert float(found.norm()) <= float(x.norm()) and bool((found >= 0).all())
    assert not JamesStein()(torch.zeros(d), 1.0).any()


def test_without_noise_nothing_is_shrunk() -> None:
    x = torch.randn(7)
    assert torch.equal(JamesStein()(x, 0.0), x)


def test_the_factor_is_that_of_james_and_stein() -> None:
    x = torch.randn(9, dtype=torch.float64)
    expected = x * (1 - 7 * 0.04 / float(x @ x))
    torch.testing.assert_close(JamesStein()(x, 0.2), expected)
