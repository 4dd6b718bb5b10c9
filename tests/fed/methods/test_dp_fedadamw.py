"""DP-FedAdamW: moments from noised gradients alone, shared by all clients, and a pull along the last change."""

from dataclasses import replace

import pytest
import torch

from lora_dp.fed.config import RunConfig
from lora_dp.fed.methods import get_method
from lora_dp.fed.methods.dp_fedadamw import DIRECTION, SECOND
from lora_dp.fed.rounds.messages import Task
from lora_dp.fed.rounds.update_statistics import expected_noise
from tests.fed.small import TRAINING, make_federation, updates

SLOW = replace(TRAINING, learning_rate=0.01)
UNITS = [{}, {"unit": "client", "noise_by": "server"}, {"unit": "client", "noise_by": "client"}, {"epsilon": None}]


@pytest.mark.slow
def test_what_a_client_says_of_its_moments_comes_from_its_noised_gradients():
    """Worked out anew from what the wrapped optimizer was given, with the variance that the budget asks for."""
    federation, seen = make_federation("dp-fedadamw", SLOW), []
    federation.run_round([0, 1, 2])
    start = federation.server.state

    def watch(client, optimizer, batches):
        model = federation.model

        def record(*_):
            seen.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

        optimizer.register_step_pre_hook(record)

    update = replace(federation.trainer, on_turn=watch).train(1, federation.engine.parts[1], Task(1, 0, 2, start))
    variance = (federation.plan.event(20).noise_multiplier * 1.0 / 8) ** 2
    assert len(seen) == 3 and variance > 0
    for name in seen[0]:
        second = start[name + SECOND]
        for gradients in seen:
            second = 0.999 * second + 0.001 * (gradients[name].square().mean() - variance)
        torch.testing.assert_close(update.tensors[name + SECOND], second, rtol=0, atol=1e-6 * variance)
        assert not second.equal(start[name + SECOND])


@pytest.mark.slow
@pytest.mark.parametrize("privacy", [UNITS[0], UNITS[3]])
def test_the_server_averages_moments_and_remembers_its_last_change(privacy):
    federation, twin = (make_federation("dp-fedadamw", SLOW, weighting="equal", **privacy) for _ in range(2))
    for _ in range(2):
        before, sent = dict(twin.server.state), updates(twin)
        for one in (federation, twin):
            one.run_round([0, 1, 2])
        after = federation.server.state
        for name in before:
            if name.endswith(DIRECTION):
                parameter = name.removesuffix(DIRECTION)
                torch.testing.assert_close(after[name], after[parameter] - before[parameter], rtol=0, atol=1e-14)
                assert all(name not in update for update in sent) and after[name].any()
            else:
                mean = sum(update[name] for update in sent) / 3
                torch.testing.assert_close(after[name], mean, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("pull", [0.0, 0.7])
def test_local_steps_go_on_by_a_share_of_the_last_change(pull):
    """At a rate of zero by nothing else, whatever the gradients."""
    federation = make_federation("dp-fedadamw", replace(TRAINING, learning_rate=0.0), options={"pull": pull})
    state = federation.server.state
    for name in state:
        if name.endswith(DIRECTION):
            state[name] = torch.randn(state[name].shape, dtype=torch.float64)
    for update in updates(federation):
        for name, tensor in update.items():
            if not name.endswith(SECOND):
                moved = pull * state[name + DIRECTION]
                torch.testing.assert_close(tensor, state[name] + moved, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("privacy", UNITS)
def test_nothing_is_said_of_moments_where_gradients_carry_no_noise(privacy):
    """Unless nothing is private."""
    federation = make_federation("dp-fedadamw", SLOW, weighting="equal", **privacy)
    federation.check_model()
    told = privacy.get("unit") != "client"
    for _ in range(2):
        federation.run_round()
    state = federation.server.state
    assert ("1.lora_A" + SECOND in state) is told and "1.lora_A" + DIRECTION in state
    assert all(("4.weight" + SECOND in update) is told for update in updates(federation))
    if told:
        assert any(state[name].any() for name in state if name.endswith(SECOND))
    if privacy.get("epsilon", 1.0) is not None:
        assert 0 < federation.account.worst_epsilon() <= 8


def test_no_formula_is_claimed_for_the_noise_of_its_updates():
    federation = make_federation("dp-fedadamw")
    task = federation.server.task(0, 0, 2)
    assert expected_noise(federation.trainer, task, 12, 1.0) is None
    whole = make_federation("dp-fedadamw", unit="client", noise_by="client", weighting="equal")
    found = expected_noise(whole.trainer, whole.server.task(0, 0, 2), 12, 1.0)
    assert found is not None and not any(name.endswith(DIRECTION) for name in found)


def test_another_optimizer_is_refused():
    with pytest.raises(ValueError, match="dp-fedadamw has an optimizer of its own: leave optimizer out"):
        RunConfig.from_flat({"method": "dp-fedadamw", "optimizer": "adamw"})
    assert RunConfig.from_flat({"method": "dp-fedadamw", "epsilon": 1.0}).optimization.lr == pytest.approx(
        get_method("dp-fedadamw").learning_rates[1]
    )


def test_what_is_kept_beside_the_model_is_made_once():
    """A second trainer of the same model goes on with what the first has loaded."""
    federation = make_federation("dp-fedadamw")
    workspace = federation.workspace
    state = {name: torch.randn_like(tensor) for name, tensor in workspace.state().items()}
    workspace.load(state)
    again = replace(federation.trainer, on_turn=None)
    assert again.workspace.names == workspace.names == list(state)
    assert all(tensor.equal(state[name]) for name, tensor in workspace.state().items())
    assert workspace.beside == {name for name in state if name.endswith((SECOND, DIRECTION))}
