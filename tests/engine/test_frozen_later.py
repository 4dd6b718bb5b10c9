"""A parameter frozen after make_private is left alone; what else is trained stays clipped and noised as it was."""

import pytest
import torch

from tests.models import OPTIMIZERS, examples, mlp, moved, private_run, pure_noise, seeded, snapshot, take_step, train
from tests.support import RULES, make_private

HEAD = {"2.weight", "2.bias"}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_neither_moves_nor_keeps_its_momentum(optimizer):
    model, private, loader = private_run(seeded(), optimizer=optimizer)
    train(model, private, loader.take(3))
    for name in HEAD:
        model.get_parameter(name).requires_grad_(False)
    before, state = snapshot(model), private.state[model[2].weight]
    kept = {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
    train(model, private, loader.take(3))
    private.step_on_empty_batch()
    assert moved(model, before) == {"0.lora_A", "0.lora_B"}
    assert all(torch.equal(value, kept[name]) for name, value in state.items() if name in kept)
    for name in HEAD:
        model.get_parameter(name).requires_grad_(True)
    train(model, private, loader.take(1))
    assert moved(model, before) == {"0.lora_A", "0.lora_B", *HEAD}


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("when", ["before forward", "before step"])
def test_the_rest_is_clipped_and_noised_to_the_same_bound(rule, when):
    model = mlp()
    optimizer = make_private(model, batch_size=8, clipping=rule, max_grad_norm=0.1)
    batch = examples(8)
    if when == "before forward":
        model[2].requires_grad_(False)
        released = take_step(model, optimizer, batch)
    else:
        optimizer.register_step_pre_hook(lambda *_: None)
        optimizer.batch.expect(8)
        torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        model[2].requires_grad_(False)
        optimizer.step()
        released = {name: 8 * p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(released) == {"0.lora_A", "0.lora_B"}
    norm = sum(float(value.double().square().sum()) for value in released.values()) ** 0.5
    assert 0 < norm <= 8 * 0.1 * (1 + 1e-6)
    noisy = mlp()
    optimizer = make_private(noisy, batch_size=8, noise_multiplier=1.0, max_grad_norm=0.1, clipping=rule)
    noisy[2].requires_grad_(False)
    noise = pure_noise(noisy, optimizer, 400)
    assert noise.shape[1] == 2 * 6 + 8 * 2
    assert abs(float(noise.std()) / 0.1 - 1) < 5.4 / (2 * noise.numel()) ** 0.5


def test_each_layer_that_is_left_gets_its_share_of_the_bound():
    """Two adapters of a layer each: per layer, C / √2 with the head frozen is C."""
    model = mlp()
    optimizer = make_private(model, batch_size=1, clipping="per_layer", max_grad_norm=0.01)
    model[2].requires_grad_(False)
    released = take_step(model, optimizer, examples(1))
    norm = sum(float(value.double().square().sum()) for value in released.values()) ** 0.5
    assert norm == pytest.approx(0.01, rel=1e-4)


def test_a_step_of_which_nothing_is_left_is_refused_and_costs_nothing():
    engine = seeded()
    model, optimizer, loader = private_run(engine)
    model.requires_grad_(False)
    for action in (optimizer.step_on_empty_batch, optimizer.step):
        with pytest.raises(RuntimeError, match=r"'0.lora_A' and whatever else .* was frozen .*: unfreeze"):
            action()
    assert engine.ledger.steps == 0
