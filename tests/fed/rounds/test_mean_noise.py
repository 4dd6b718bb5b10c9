"""The noise in a round's mean, against what clients and server really add."""

import math
from dataclasses import replace

import pytest
import torch

from lora_dp.fed.methods import State
from lora_dp.fed.rounds.mean_noise import noise_of_mean
from lora_dp.fed.rounds.messages import Task
from lora_dp.fed.rounds.privacy_plan import PrivacyPlan
from lora_dp.fed.rounds.server_optimizer import ServerOptimizer
from lora_dp.fed.rounds.update_statistics import expected_noise, expected_noise_norm
from lora_dp.privacy.accounting import PoissonGaussian
from tests.fed.small import TRAINING, make_federation

CLIENT = {"unit": "client", "noise_by": "client"}
SERVER = {"unit": "client", "noise_by": "server"}
ROUNDS = 6


@pytest.fixture
def loud(monkeypatch):
    """Noise beside which gradients are nothing, and of a deviation that hangs on the number of examples."""
    monkeypatch.setattr(PrivacyPlan, "event", lambda plan, n: PoissonGaussian(1e5 * (1 + n / 10), plan.sample_rate(n)))


@pytest.mark.parametrize(
    ("method", "training", "settings"),
    [
        ("dp-lora", {"lr_ratio": 3.0, "low_pass": "gaussian", "low_pass_strength": 1.0}, {"clipping": "per_layer"}),
        ("la-lora", {"local_steps": 4}, {"weighting": "equal", "max_grad_norm": 0.3}),
        ("ffa-lora", {"batch_size": 1000}, {}),
        ("dp-lora", {}, {**CLIENT, "max_update_norm": 0.2}),
        ("dp-lora", {"optimizer": "adamw"}, {**CLIENT, "weighting": "equal"}),
        ("dp-lora", {}, {**SERVER, "weighting": "equal", "client_rate": 0.5, "max_update_norm": 0.2}),
    ],
)
def test_each_number_of_the_mean_has_the_noise_that_is_told(loud, monkeypatch, method, training, settings):
    """Three clients of unequal sizes, whose weights and noise differ."""
    z: dict[str, list[torch.Tensor]] = {}

    def stay(self: ServerOptimizer, mean: State, start: State, noise: dict[str, float]) -> State:
        assert noise.keys() == mean.keys()
        for name, tensor in mean.items():
            z.setdefault(name, []).append((tensor - start[name]).flatten() / noise[name])
        return {name: start[name] for name in mean}

    monkeypatch.setattr(ServerOptimizer, "stepped", stay)
    made = replace(TRAINING, **training, server_optimizer="momentum")
    federation = make_federation(method, made, r=6, rounds=ROUNDS, participations=ROUNDS, **settings)
    federation.fault_norm = math.inf
    for _ in range(ROUNDS):
        federation.run_round(evaluate=False)
    for name, parts in z.items():
        found = torch.cat(parts)
        # A filter makes neighbours alike, so that fewer numbers are independent.
        count = len(found) / (2 if "low_pass" in training else 1)
        assert abs(float(found.square().mean()) - 1) < 4.5 * math.sqrt(2 / count), name


def test_one_tensor_by_another_it_is_the_norm_that_is_told():
    for method, settings in (("dp-lora", {}), ("la-lora", {}), ("dp-lora", CLIENT)):
        federation = make_federation(method, replace(TRAINING, low_pass="gaussian", low_pass_strength=0.7), **settings)
        task: Task = federation.server.task(0, 0, 2)
        by_tensor = expected_noise(federation.trainer, task, 12, 1.5)
        whole = expected_noise_norm(federation.trainer, task, 12, 1.5)
        assert by_tensor and all(noise > 0 for noise in by_tensor.values())
        squares = sum(task.state[name].numel() * noise**2 for name, noise in by_tensor.items())
        assert whole == pytest.approx(math.sqrt(squares), rel=1e-12)


def test_the_mean_has_less_noise_the_more_clients_are_in_it():
    federation = make_federation("dp-lora", **CLIENT)
    one, four = (noise_of_mean(federation.trainer, federation.server, 0, 0, [(2.0, 2, 12)] * count) for count in (1, 4))
    sigma = federation.plan.event(12).noise_multiplier
    for name, noise in one.items():
        assert noise == pytest.approx(sigma) and four[name] == pytest.approx(sigma / 2)


def test_without_privacy_there_is_none():
    federation = make_federation("dp-lora", epsilon=None)
    assert noise_of_mean(federation.trainer, federation.server, 0, 0, [(1.0, 2, 12)]) == {}
