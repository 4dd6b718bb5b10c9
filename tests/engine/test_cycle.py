"""Runs with correlated noise: groups in turn, what the ledger counts, and the noise that the optimizer gets."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lora_dp import (
    AdamBC,
    AdaptiveClipping,
    BandedNoise,
    DiSK,
    DPLinear,
    GaussianFilter,
    JamesStein,
    PrivacyBudgetExceeded,
    PrivacyEngine,
    calibrate_noise_multiplier,
)
from lora_dp.auditing import GradientCanaries
from lora_dp.engine.cycle import Cycle
from lora_dp.ops.registry import reference_only
from lora_dp.privacy.accounting import Ledger, PoissonGaussian
from tests.models import assert_refuses, flat, mlp, pure_noise, seeded
from tests.privacy.test_correlated_noise import matrix
from tests.support import check_deviation, make_private


def numbered(bands: int, size: int = 25, batch_size: int = 5, engine: PrivacyEngine | None = None, **options):
    """A run whose examples are their own numbers."""
    model = DPLinear(1, 1, bias=False)
    data = TensorDataset(torch.arange(size, dtype=torch.float32).unsqueeze(1))
    return (engine or PrivacyEngine()).make_private(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        data_loader=DataLoader(data, batch_size=batch_size),
        correlated_noise=BandedNoise(bands),
        **{"noise_multiplier": 1.0, "max_grad_norm": 1.0, **options},
    )


def trained(model, optimizer, batches) -> list[tuple[int, int]]:
    """(step, example) of whoever took part."""
    found = []
    for (x,) in batches:
        found += [(optimizer.steps_taken, int(number)) for number in x]
        optimizer.backward(model(x).sum(1))
        optimizer.step()
    return found


# Groups


@pytest.mark.slow
def test_each_example_takes_part_in_turns_of_its_group_alone():
    bands = 4
    model, optimizer, loader = numbered(bands, size=23)
    found = []
    for steps in (6, 1, 9, 30):  # iterations need not end with a round
        found += trained(model, optimizer, loader.take(steps))
    assert optimizer.steps_taken == 46
    groups = {example: {step % bands for step, other in found if other == example} for _, example in found}
    assert all(len(turns) == 1 for turns in groups.values())
    assert set().union(*groups.values()) == set(range(bands))


def test_an_iteration_that_is_broken_off_leaves_the_groups_in_turn():
    model, optimizer, loader = numbered(3, size=30, engine=seeded())
    group_of: dict[int, int] = {}
    for _ in range(8):
        batches = loader.take(5)
        for _ in range(2):
            for step, example in trained(model, optimizer, [next(batches)]):
                assert group_of.setdefault(example, step % 3) == step % 3
    assert set(group_of.values()) == {0, 1, 2}


def test_a_step_beside_the_loaders_is_noticed():
    model, optimizer, loader = numbered(2, size=30, batch_size=10, engine=seeded())
    batches = loader.take(4)
    trained(model, optimizer, [next(batches)])
    optimizer.step_on_empty_batch()
    assert_refuses(RuntimeError, "a step was taken beside", lambda: next(batches))
    plain = Cycle()
    plain.advance()
    plain.check(0)  # every step draws from all


def test_an_empty_draw_is_of_a_turn_too():
    _, optimizer, loader = numbered(2, size=10, batch_size=1, engine=seeded())
    loader.source.uniform = lambda n: torch.ones(n, dtype=torch.float64)  # nobody is drawn
    taken = []

    def by_hand(*_):
        taken.append(optimizer.steps_taken)
        optimizer._cycle.advance()  # what a step in a hook would do

    optimizer.register_step_post_hook(by_hand)
    assert_refuses(RuntimeError, "a step was taken beside", lambda: list(loader.take(3)))
    assert taken == [0]


def test_too_many_bands_for_the_data_are_refused():
    assert_refuses(ValueError, "choose at most 5 bands", lambda: numbered(6))
    _, optimizer, loader = numbered(5)
    assert (optimizer.sample_rate, loader.turn_rate, loader.sample_rate) == (1.0, 1.0, 0.2)


# The ledger


@pytest.mark.parametrize(("bands", "steps", "turns"), [(2, 5, 3), (4, 8, 2), (4, 9, 3)])
def test_the_ledger_counts_turns_at_the_rate_of_a_group(bands, steps, turns):
    engine = PrivacyEngine("rdp")
    _, optimizer, _ = numbered(bands, size=40, batch_size=4, engine=engine, noise_multiplier=0.9)
    for _ in range(steps):
        optimizer.step_on_empty_batch()
    event = PoissonGaussian(0.9, bands * 0.1)
    assert engine.ledger.entries == ((event, turns),)
    expected = Ledger()
    expected.append(event, turns)
    assert engine.get_epsilon(1e-5) == expected.epsilon(1e-5, "rdp")


def test_a_turn_is_counted_before_the_first_step_of_its_round():
    engine, counts = PrivacyEngine("rdp"), []
    _, optimizer, _ = numbered(3, engine=engine)
    optimizer.register_step_pre_hook(lambda *_: counts.append(engine.ledger.steps))
    for _ in range(7):
        optimizer.step_on_empty_batch()
    assert counts == [1, 1, 1, 2, 2, 2, 3]


@pytest.mark.slow
def test_a_planned_run_is_calibrated_to_its_turns_and_ends_with_them():
    model = DPLinear(1, 1)
    _, optimizer, _ = PrivacyEngine("rdp").make_private_with_epsilon(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(torch.randn(40, 1), batch_size=4),
        target_epsilon=2.0,
        target_delta=1e-3,
        steps=10,
        max_grad_norm=1.0,
        correlated_noise=BandedNoise(4),
    )
    assert optimizer.noise_multiplier == calibrate_noise_multiplier(2.0, 1e-3, 0.4, 3, "rdp")
    for _ in range(12):  # the third round to its end
        optimizer.step_on_empty_batch()
    with pytest.raises(PrivacyBudgetExceeded):
        optimizer.step_on_empty_batch()


# The noise


@pytest.mark.parametrize("way", ["native", "torch"])
def test_what_the_optimizer_gets_has_new_noise_in_each_step(way):
    model, bands, steps = mlp(), 3, 120
    optimizer = make_private(
        model,
        batch_size=2,
        size=8,
        noise_multiplier=0.7,
        max_grad_norm=1.3,
        correlated_noise=BandedNoise(bands),
        engine=PrivacyEngine("rdp"),
        lr=0.0,
    )
    with reference_only() if way == "torch" else torch.no_grad():
        noise = np.stack([pure_noise(model, optimizer, 1).double().numpy().flatten() for _ in range(steps)])
    fresh = matrix(bands, steps) @ noise
    expected = 0.7 * 1.3 * BandedNoise(bands).norm
    check_deviation(torch.from_numpy(fresh).flatten(), expected)
    lagged = (fresh[1:] * fresh[:-1]).mean() / expected**2
    assert abs(lagged) * math.sqrt(fresh[1:].size) < 5.4
    assert (noise[1:] * noise[:-1]).mean() < -0.3 * expected**2  # of what is released: taken back


def test_a_filter_works_on_what_is_released():
    model = mlp()
    options = {"correlated_noise": BandedNoise(2), "low_pass": GaussianFilter(1.0), "noise_multiplier": 1.0}
    optimizer = make_private(model, batch_size=2, size=8, **options)
    optimizer.step_on_empty_batch()
    assert optimizer.steps_taken == 1


# What goes on


def test_a_resumed_run_begins_a_new_chain_and_counts_its_turns_anew():
    engine = PrivacyEngine("rdp")
    model, optimizer, loader = numbered(4, engine=engine)
    trained(model, optimizer, loader.take(5))
    saved = engine.state_dict(), optimizer.state_dict()
    assert engine.ledger.steps == 2 and "noise" not in str(saved[1]).replace("noise_multiplier", "")
    again = PrivacyEngine("rdp")
    model, optimizer, loader = numbered(4, engine=again)
    optimizer.load_state_dict(saved[1])
    assert_refuses(
        RuntimeError, "gone on from 2 private steps and the engine's ledger has 0", optimizer.step_on_empty_batch
    )
    again.load_state_dict(saved[0])
    trained(model, optimizer, loader.take(1))
    assert (again.ledger.steps, optimizer.steps_taken) == (3, 6)


def test_a_state_that_is_loaded_leaves_the_turns_as_they_are():
    engine = PrivacyEngine("rdp")
    model, optimizer, loader = numbered(2, engine=engine)
    saved = optimizer.state_dict()
    optimizer.step_on_empty_batch()
    optimizer.load_state_dict(saved)
    assert optimizer.steps_taken == 0
    optimizer.step_on_empty_batch()
    assert engine.ledger.steps == 1
    optimizer.step_on_empty_batch()
    assert engine.ledger.steps == 2


# What is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clipping": AdaptiveClipping()}, "with AdaptiveClipping it would be of another kind"),
        ({"shrinkage": JamesStein()}, "with shrinkage"),
        ({"regulate_noise": True, "phases": "B"}, "with regulate_noise"),
        ({"phases": "BA"}, "with phases 'BA'"),
    ],
)
def test_what_changes_the_noise_is_refused(options, words):
    assert_refuses(
        ValueError, words, lambda: make_private(mlp(), batch_size=2, size=8, correlated_noise=BandedNoise(2), **options)
    )


def test_no_bands_are_refused():
    assert_refuses(TypeError, "BandedNoise", lambda: make_private(mlp(), batch_size=2, size=8, correlated_noise=4))


@pytest.mark.parametrize("make", [lambda m: AdamBC(m.parameters()), lambda m: DiSK(torch.optim.SGD(m.parameters()), m)])
def test_optimizers_that_take_noise_for_independent_are_refused(make):
    model = DPLinear(2, 1)
    data = DataLoader(torch.randn(8, 2), batch_size=2)
    with pytest.raises(ValueError, match="takes noise for independent"):
        PrivacyEngine().make_private(
            model=model,
            optimizer=make(model),
            data_loader=data,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            correlated_noise=BandedNoise(2),
        )


def test_phases_do_not_change():
    optimizer = make_private(mlp(), batch_size=2, size=8, phases="B", correlated_noise=BandedNoise(2))
    optimizer.set_phases("B")
    assert_refuses(ValueError, "steps with phases 'B'", lambda: optimizer.set_phases("A"))


def test_what_is_trained_does_not_change():
    model = mlp()
    optimizer = make_private(model, batch_size=2, size=8, noise_multiplier=1.0, correlated_noise=BandedNoise(2))
    optimizer.step_on_empty_batch()
    model[2].bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="what is trained has changed"):
        optimizer.step_on_empty_batch()
    assert flat({"weight": model[2].weight}).isfinite().all()


def test_gradient_canaries_are_refused():
    _, optimizer, loader = numbered(2)
    with pytest.raises(ValueError, match="audit without correlated_noise"):
        GradientCanaries(10).play(lambda plant: plant(optimizer, loader), np.ones(10, dtype=bool), torch.Generator())
