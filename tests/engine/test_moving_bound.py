"""Training at a bound that follows a quantile: accounted, noised, resumed, in every kind of step."""

import contextlib
import copy
import math

import pytest
import torch

from lora_dp import AdaptiveClipping, DPLinear, GraphedStep, PrivacyEngine
from lora_dp.ops.registry import reference_only
from lora_dp.privacy.mechanism import total
from tests.models import (
    OPTIMIZERS,
    assert_refuses,
    cross_entropy,
    examples,
    flat,
    mlp,
    one_by_one,
    private_run,
    seeded,
    snapshot,
    take_step,
    train,
)
from tests.support import brute_force, check_deviation, make_private, private_gradients

WAYS = {"native": contextlib.nullcontext, "torch": reference_only}


def moving(model, batch_size=4, **options):
    adaptive = {name: options.pop(name) for name in ("quantile", "rate", "share") if name in options}
    options = {"noise_multiplier": 1.0, "engine": seeded(), **options}
    return make_private(model, batch_size=batch_size, clipping=AdaptiveClipping(**adaptive), **options)


# What is paid


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_pays_for_the_count(way):
    """Its noise is 1/√(1 − share) of what the ledger says, at the bound of each step."""
    model, share, found = mlp(), 0.5, []
    optimizer = moving(model, lr=0.0, noise_multiplier=0.8, max_grad_norm=1.5, share=share, quantile=0.9)
    for _ in range(150):
        bound = optimizer.max_grad_norm
        with WAYS[way]():
            optimizer.step_on_empty_batch()
        found.append(flat(private_gradients(model)).double() * optimizer.expected_batch_size / bound)
    check_deviation(torch.stack(found), 0.8 / math.sqrt(1 - share))
    assert optimizer.max_grad_norm > 2 * 1.5
    [(event, count)] = optimizer.ledger.entries
    assert (event.noise_multiplier, count) == (0.8, 150) == (optimizer.noise_multiplier, optimizer.steps_taken)


@pytest.mark.slow
def test_the_count_is_noised():
    """What moves the bound is the count and noise of deviation z/(2√share), whatever the batch holds."""
    share, rate, found = 0.04, 0.01, []
    optimizer = moving(mlp(), batch_size=3, noise_multiplier=0.6, share=share, rate=rate, lr=0.0)
    for _ in range(800):
        before = optimizer.max_grad_norm
        optimizer.step_on_empty_batch()
        found.append(-math.log(optimizer.max_grad_norm / before) / rate * 3)
    check_deviation(torch.tensor(found, dtype=torch.float64), 0.6 / (2 * math.sqrt(share)))


@pytest.mark.slow
@pytest.mark.parametrize("largest", [1.0, 1e6])
def test_one_example_moves_both_releases_by_the_claimed_sensitivity(largest):
    """‖(ΔS/(z_Δ C), ΔT/σ_b)‖ ≤ 1/z, and an example beyond the bound reaches it."""
    noise, options, reached = 0.9, AdaptiveClipping(share=0.3), 0.0
    x, y = examples(9)
    x = x * torch.linspace(0, largest, 9).unsqueeze(1)
    for leave in range(9):
        found = []
        for rows in (list(range(9)), [row for row in range(9) if row != leave]):
            model = mlp()
            optimizer = make_private(
                model, batch_size=9, max_grad_norm=0.7, noise_multiplier=noise, clipping=options, engine=seeded()
            )
            cross_entropy(model, (x[rows], y[rows])).backward()
            clipped = optimizer.clip(optimizer.recorder.take(), None)
            order = {id(p): place for place, p in enumerate(model.parameters())}
            sums = torch.cat(
                [total(clipped.sums[key]).double().flatten() for key in sorted(clipped.sums, key=order.get)]
            )
            found.append((sums, float(clipped.centred_count)))
        (sums, count), (others, fewer) = found
        gradient = float((sums - others).norm()) / (options.gradient_noise(noise) * 0.7)
        counted = abs(count - fewer) / options.count_noise(noise)
        assert math.hypot(gradient, counted) <= (1 + 1e-9) / noise
        reached = max(reached, math.hypot(gradient, counted))
    assert reached > 0.9999 / noise


def test_without_noise_the_count_is_exact():
    model = mlp()
    batch, trained = examples(7), {name for name, p in model.named_parameters() if p.requires_grad}
    norms = sorted(float(flat(g).norm()) for g in brute_force(model, cross_entropy, one_by_one(batch), trained))
    bound = (norms[1] + norms[2]) / 2
    optimizer = moving(model, batch_size=5, noise_multiplier=0.0, max_grad_norm=bound, quantile=0.6, lr=0.0)
    take_step(model, optimizer, batch)
    expected = bound * math.exp(-0.2 * (0.5 + (2 - 3.5) / 5 - 0.6))
    assert optimizer.max_grad_norm == pytest.approx(expected, rel=1e-12)
    assert optimizer.ledger.epsilon(1e-5) == math.inf


# Whole batches


@pytest.mark.parametrize("way", WAYS)
def test_micro_batches_count_as_one(way):
    found = []
    for parts in ([7], [3, 4], [1] * 7):
        model = mlp()
        optimizer = moving(model, batch_size=5, noise_multiplier=0.5, max_grad_norm=0.8, lr=0.0)
        with WAYS[way]():
            x, y = examples(7)
            optimizer.batch.expect(7)
            for part in zip(x.split(parts), y.split(parts), strict=True):
                assert optimizer.max_grad_norm == 0.8
                optimizer.signal_skip_step(optimizer.batch.examples + len(part[0]) < 7)
                cross_entropy(model, part).backward()
                optimizer.step()
        found.append(optimizer.max_grad_norm)
    assert found[0] == found[1] == found[2] != 0.8


def test_padding_and_a_count_of_an_earlier_batch_do_not_count():
    found = []
    for padded in (False, True):
        model = mlp()
        optimizer = moving(model, batch_size=4, noise_multiplier=0.0, max_grad_norm=0.8, quantile=0.3, lr=0.0)
        x, y = examples(6)
        optimizer.batch.expect(4)
        rows = range(6) if padded else range(4)
        cross_entropy(model, (x[list(rows)], y[list(rows)])).backward()
        optimizer.step(mask=torch.arange(6) < 4 if padded else None)
        found.append(optimizer.max_grad_norm)
        optimizer.step_on_empty_batch()
        assert optimizer.max_grad_norm == pytest.approx(found[-1] * math.exp(-0.2 * 0.2))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("quantile", [0.3, 0.8])
def test_the_bound_comes_to_the_quantile(quantile):
    """Of planted norms, from ten times above and below: an output's gradient is the example itself."""
    generator = torch.Generator().manual_seed(3)
    data = torch.randn(256, 4, generator=generator)
    data *= torch.randn(256, 1, generator=generator).mul(0.7).exp() / data.norm(dim=1, keepdim=True)
    target = float(data.norm(dim=1).quantile(quantile))
    for start in (10 * target, target / 10):
        model, engine = DPLinear(4, 1, bias=False), seeded()
        model, optimizer, loader = engine.make_private(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
            data_loader=torch.utils.data.DataLoader(data, batch_size=64),
            noise_multiplier=1.0,
            max_grad_norm=start,
            clipping=AdaptiveClipping(quantile=quantile),
        )
        last = []
        for x in loader.take(120):
            optimizer.backward(model(x).sum(1))
            optimizer.step()
            last.append(float((data.norm(dim=1) <= optimizer.max_grad_norm).double().mean()))
        assert abs(sum(last[-40:]) / 40 - quantile) < 0.06


# What goes on


@pytest.mark.slow
@pytest.mark.parametrize("phases", ["AB", "BA"])
def test_a_resumed_run_goes_on_bit_for_bit(phases):
    def fresh():
        engine = seeded()
        options = {"phases": phases, "optimizer": OPTIMIZERS[0], "clipping": AdaptiveClipping(rate=0.5)}
        return engine, *private_run(engine, size=12, batch_size=3, **options)

    engine, model, optimizer, loader = fresh()
    train(model, optimizer, loader.take(8))
    expected, bound = snapshot(model), optimizer.max_grad_norm

    engine, model, optimizer, loader = fresh()
    train(model, optimizer, loader.take(3))
    saved = copy.deepcopy((engine.state_dict(), model.state_dict(), optimizer.state_dict()))
    assert set(saved[2]["clip_bounds"]) == ({"AB"} if phases == "AB" else {"A", "B"})

    engine, model, optimizer, loader = fresh()
    engine.load_state_dict(saved[0])
    model.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    train(model, optimizer, loader.take(5))
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    assert optimizer.max_grad_norm == bound


def test_each_phase_has_a_bound_of_its_own():
    model = mlp()
    optimizer = moving(model, phases="BA", noise_multiplier=0.0, lr=0.0, quantile=0.2, rate=1.0)
    bounds = []
    for _ in range(4):
        bounds.append(optimizer.max_grad_norm)
        optimizer.step_on_empty_batch()  # half of nobody lies within: 0.3 too much
    step = math.exp(-0.3)
    assert bounds == pytest.approx([1.0, 1.0, step, step])


def test_an_optimizer_is_told_the_noise_of_the_bound_it_steps_at():
    class Listening(torch.optim.SGD):
        def set_noise_std(self, stds):
            self.told = stds

    model = mlp()
    optimizer = moving(model, lr=0.0, max_grad_norm=2.0, share=0.36, noise_multiplier=0.8, quantile=0.9)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer.original_optimizer = listening = Listening(trained, lr=0.0)
    for _ in range(3):
        bound = optimizer.max_grad_norm
        optimizer.step_on_empty_batch()
        assert list(listening.told.values()) == pytest.approx([bound / 4] * len(trained), rel=1e-6)
        assert optimizer.max_grad_norm != bound


# What is refused


def test_a_bound_is_not_loaded_in_the_middle_of_a_batch():
    """What was clipped at one bound would get the noise of another."""
    model = mlp()
    optimizer = moving(model)
    optimizer.step_on_empty_batch()
    saved = optimizer.state_dict()
    optimizer.batch.expect(4)
    optimizer.signal_skip_step()
    cross_entropy(model, examples(2)).backward()
    optimizer.step()
    assert_refuses(RuntimeError, "step() it before", lambda: optimizer.load_state_dict(saved))


def test_a_bound_that_moved_is_no_fixed_one():
    optimizer = moving(mlp())
    optimizer.step_on_empty_batch()
    saved = optimizer.state_dict()
    fixed = make_private(mlp(), batch_size=4, noise_multiplier=1.0)
    assert_refuses(ValueError, "give make_private AdaptiveClipping again", lambda: fixed.load_state_dict(saved))
    plain = fixed.state_dict()
    assert "clip_bounds" not in plain
    optimizer.load_state_dict(plain)  # the bound stays where it is
    assert optimizer.state_dict()["clip_bounds"] == saved["clip_bounds"]
    assert_refuses(
        TypeError, "clip_bounds must be a dict", lambda: optimizer.load_state_dict({**saved, "clip_bounds": 1.0})
    )


def test_what_cannot_follow_is_refused():
    model = mlp()
    optimizer = moving(model)
    assert_refuses(
        ValueError,
        "AdaptiveClipping has no graphed step",
        lambda: GraphedStep(model, optimizer, lambda model, x, y: cross_entropy(model, (x, y)), batch_size=4),
    )
    with pytest.raises(AttributeError, match="'max_grad_norm' is fixed"):
        optimizer.max_grad_norm = 3.0
    assert_refuses(
        ValueError, "inf is no bound to begin with", lambda: moving(mlp(), max_grad_norm=math.inf, noise_multiplier=0.0)
    )
    assert_refuses(ValueError, "Unknown clipping", lambda: make_private(mlp(), batch_size=4, clipping=AdaptiveClipping))


@pytest.mark.slow
def test_a_planned_run_is_calibrated_as_with_a_fixed_bound():
    """The entry in the ledger is the same: the count is within it."""
    found = []
    for clipping in ("flat", AdaptiveClipping()):
        options = {"target_epsilon": 2.0, "target_delta": 1e-3, "steps": 2, "clipping": clipping}
        optimizer = private_run(PrivacyEngine("rdp"), **options)[1]
        found.append((optimizer.noise_multiplier, optimizer.mechanism.noise_multiplier))
    assert found[0][0] == found[1][0] == found[0][1] < found[1][1]
