"""The server's step from a mean, and the average of states, against their formulas in float64."""

import math

import numpy as np
import pytest
import torch

from lora_dp.fed.config import RunConfig
from lora_dp.fed.rounds.server_optimizer import ServerOptimizer, StateAverage

START = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[0.5]], dtype=torch.float64)}


def means(rounds: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(tensor.shape, generator=generator).to(tensor.dtype) for name, tensor in START.items()}
        for _ in range(rounds)
    ]


def test_the_average_is_untouched_to_the_bit():
    optimizer, [mean] = ServerOptimizer("average", 1.0), means(1)
    found = optimizer.stepped(mean, START, {"a": 0.1})
    assert all(found[name] is tensor for name, tensor in mean.items())
    assert optimizer.tensors() == {} and optimizer.steps == {}


def oracle(name: str, rate: float, changes: list[np.ndarray], noise: float) -> list[np.ndarray]:
    """The steps, one after the other, by the formulas as they are printed."""
    steps, m, v = [], np.zeros_like(changes[0]), np.zeros_like(changes[0])
    for t, change in enumerate(changes, 1):
        if name == "average":
            steps.append(rate * change)
        elif name == "momentum":
            m = 0.9 * m + change
            steps.append(rate * m)
        else:
            m, v = 0.9 * m + 0.1 * change, 0.99 * v + 0.01 * change**2
            corrected = np.maximum(v / (1 - 0.99**t) - noise**2, (noise / 2) ** 2 + 1e-16)
            steps.append(rate * m / (1 - 0.9**t) / np.sqrt(corrected))
    return steps


@pytest.mark.parametrize("name", ["average", "momentum", "adam"])
@pytest.mark.parametrize("rate", [0.03, 1.0])
def test_steps_over_several_rounds_are_those_of_the_formulas(name, rate):
    """Where a tensor is trained in every second round, its moments count its own rounds."""
    optimizer, noise = ServerOptimizer(name, rate), {"a": 0.7, "b": 0.0}
    state = {name: tensor.clone() for name, tensor in START.items()}
    changes: dict[str, list[np.ndarray]] = {"a": [], "b": []}
    for index, mean in enumerate(means(7)):
        trained = {key: mean[key] for key in ("a", "b") if key == "a" or index % 2 == 0}
        for key in trained:
            changes[key].append(trained[key].double().numpy() - state[key].double().numpy())
        found = optimizer.stepped(trained, state, noise)
        assert found.keys() == trained.keys()
        for key, tensor in found.items():
            expected = state[key].double().numpy() + oracle(name, rate, changes[key], noise[key])[-1]
            assert tensor.dtype == state[key].dtype
            np.testing.assert_allclose(tensor.double().numpy(), expected, rtol=1e-6 if key == "a" else 1e-12)
        state.update(found)


ROUNDS, NUMBERS = 300, 4000


def adam(signal: float, noise: float, told: float) -> tuple[ServerOptimizer, torch.Tensor]:
    """Adam after rounds whose mean change is a constant and noise; and its last step."""
    generator, start = torch.Generator().manual_seed(0), {"a": torch.zeros(NUMBERS, dtype=torch.float64)}
    optimizer = ServerOptimizer("adam", 1.0)
    for _ in range(ROUNDS):
        change = signal + noise * torch.randn(NUMBERS, generator=generator, dtype=torch.float64)
        step = optimizer.stepped({"a": change}, start, {"a": told})["a"]
    return optimizer, step


def test_of_pure_noise_nothing_is_left_in_the_second_moment():
    for deviation in (0.01, 3.0):
        optimizer, _ = adam(0.0, deviation, deviation)
        left = optimizer.second["a"] / (1 - 0.99**ROUNDS) - deviation**2
        # Its sampling error: squares have deviation √2·s², and (1 − β)/(1 + β) of that variance is left.
        error = math.sqrt(2 * 0.01 / 1.99 / NUMBERS) * deviation**2
        assert abs(float(left.mean())) < 5 * error
        assert float(left.mean()) + deviation**2 > 100 * error


def test_a_constant_signal_moves_as_it_would_without_noise():
    """But for the sampling error, of which v̂ has a sixth."""
    _, alone = adam(1.0, 0.0, 0.0)
    assert torch.allclose(alone, torch.ones(1, dtype=torch.float64))
    _, known = adam(1.0, 1.0, 1.0)
    assert float(known.mean()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("told", [0.0, 0.5, 1.4])
def test_another_deviation_than_that_of_the_noise_shows(told):
    _, wrong = adam(1.0, 1.0, told)
    assert abs(float(wrong.mean()) - 1.0) > 0.08


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_it_goes_on_from_what_a_checkpoint_holds(name):
    whole, before = ServerOptimizer(name, 0.1), ServerOptimizer(name, 0.1)
    given = means(6)
    for mean in given[:3]:
        whole.stepped(mean, START, {"a": 0.3})
        before.stepped(mean, START, {"a": 0.3})
    after = ServerOptimizer(name, 0.1)
    after.stepped(given[5], START, {})  # forgotten
    after.restore(before.tensors(), before.steps)
    for mean in given[3:]:
        one, two = whole.stepped(mean, START, {"a": 0.3}), after.stepped(mean, START, {"a": 0.3})
        assert all(one[key].equal(two[key]) for key in one)
    assert whole.tensors().keys() == after.tensors().keys() and whole.steps == after.steps


# The average of states


def averaged(kind: str, rounds: int, given: list[dict[str, torch.Tensor]]) -> StateAverage:
    average = StateAverage(kind, rounds)
    for index, state in enumerate(given):
        average.add(state, index + 1)
    return average


@pytest.mark.parametrize("rounds", [1, 2, 7, 8])
def test_the_tail_is_the_mean_of_the_second_half(rounds):
    given = means(rounds)
    found = averaged("tail", rounds, given).of(given[-1])
    for name in START:
        expected = torch.stack([state[name].double() for state in given[rounds // 2 :]]).mean(0)
        torch.testing.assert_close(found[name], expected.to(START[name].dtype))
        assert found[name].dtype == START[name].dtype
    half = averaged("tail", 8, means(4))
    assert half.held == {} and half.of(given[-1]) == given[-1]


def test_an_exponential_average_begins_as_a_plain_one():
    given = means(60)
    for rounds in (1, 2, 20, 21, 60):
        weights = [1.0]
        for count in range(2, rounds + 1):
            part = max(0.05, 1 / count)
            weights = [weight * (1 - part) for weight in weights] + [part]
        found = averaged("ema", 60, given[:rounds]).of(given[0])
        for name in START:
            expected = sum(weight * state[name].double() for weight, state in zip(weights, given, strict=False))
            torch.testing.assert_close(found[name], expected.to(START[name].dtype), rtol=1e-5, atol=1e-6)


def test_what_was_merged_is_not_averaged_and_without_a_kind_nothing_is():
    given = [{**state, "a.merged": state["a"]} for state in means(4)]
    found = averaged("ema", 4, given)
    assert set(found.held) == {"a", "b"} and found.of(given[-1])["a.merged"] is given[-1]["a.merged"]
    none = averaged("none", 4, given)
    assert none.held == {} and none.of(given[-1])["a"] is given[-1]["a"]


# What is refused


@pytest.mark.parametrize("method", ["flora", "flexlora", "lora-fair", "rac-lora", "galore", "flat-lora:lora-fair"])
@pytest.mark.parametrize("option", [{"server_optimizer": "momentum"}, {"server_lr": 0.5}, {"averaging": "tail"}])
def test_a_method_that_does_more_than_average_takes_none(method, option):
    RunConfig.from_flat({"method": method})
    with pytest.raises(ValueError, match="does more than average, so that no server optimizer or averaging fits"):
        RunConfig.from_flat({"method": method, **option})


@pytest.mark.parametrize(
    "options",
    [
        {"method": "dp-lora", "optimizer": "adamw"},
        {"method": "deer"},
        {"method": "deer", "unit": "client", "noise_by": "client"},
        {"method": "la-lora", "mechanism": "as-released"},
    ],
)
def test_adam_must_know_the_noise(options):
    RunConfig.from_flat({**options, "server_optimizer": "momentum"})
    with pytest.raises(ValueError, match="server_optimizer adam must know the noise in a mean: choose momentum"):
        RunConfig.from_flat({**options, "server_optimizer": "adam"})


def test_rates_by_default():
    assert RunConfig.from_flat({"method": "dp-lora"}).optimization.server_lr == 1
    for name, rate in (("momentum", 1.0), ("adam", 0.03)):
        assert RunConfig.from_flat({"method": "dp-lora", "server_optimizer": name}).optimization.server_lr == rate
    with pytest.raises(ValueError, match="server_lr must be positive"):
        RunConfig.from_flat({"server_lr": 0.0})


@pytest.mark.parametrize("option", ["balanced", "warm_start"])
def test_what_uses_the_sums_needs_them(option):
    RunConfig.from_flat({option: True, "sums_share": 0.1})
    with pytest.raises(ValueError, match="need the release of feature sums: set sums_share"):
        RunConfig.from_flat({option: True})


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0])
def test_a_share_of_the_budget_is_a_part_of_it(share):
    with pytest.raises(ValueError, match="sums_share must be from 0 to below 1"):
        RunConfig.from_flat({"sums_share": share})
