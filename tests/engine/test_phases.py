"""Which factors a step trains, and that nothing else moves or counts."""

import pytest
import torch
import torch.nn.functional as F

from lora_dp import PrivacyEngine
from lora_dp.engine.phases import PhaseCycle
from tests.models import (
    OPTIMIZERS,
    assert_refuses,
    cross_entropy,
    examples,
    flat,
    loader_of,
    mlp,
    moved,
    one_by_one,
    private_run,
    seeded,
    snapshot,
    take_step,
)
from tests.support import assert_close, brute_force, clip_and_sum, make_private, private_gradients


@pytest.mark.slow
@pytest.mark.parametrize(("phases", "cycle"), [("B", ["B"]), ("A", ["A"]), ("AB", ["AB"]), ("BA", ["B", "A"])])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_phases_move_their_factors_and_no_other(phases, cycle, optimizer):
    """Momentum and weight decay included: the frozen factor keeps every bit. The head moves in every step."""
    model, private, loader = private_run(seeded(), phases=phases, optimizer=optimizer)
    for step, (x, y) in enumerate(loader.take(5)):
        before = snapshot(model)
        F.cross_entropy(model(x), y).backward()
        private.step()
        factors = {f"0.lora_{factor}" for factor in cycle[step % len(cycle)]}
        assert moved(model, before) == factors | {"2.weight", "2.bias"}
        assert set(private_gradients(model)) == factors | {"2.weight", "2.bias"}


def test_empty_batches_count_in_the_cycle():
    model, private, _ = private_run(seeded(), phases="BA")
    for factor in "BABA":
        before = snapshot(model)
        private.step_on_empty_batch()
        assert moved(model, before) == {f"0.lora_{factor}", "2.weight", "2.bias"}


def test_only_the_phase_counts_towards_the_norm():
    """In phase B the gradient of A neither moves anything nor uses up the bound."""
    batch = examples(5)
    for phases, name in (("A", "0.lora_A"), ("B", "0.lora_B")):
        model = mlp()
        trained = {name, "2.weight", "2.bias"}
        gradients = brute_force(model, cross_entropy, one_by_one(batch), trained)
        optimizer = make_private(model, batch_size=5, max_grad_norm=0.1, phases=phases)
        assert_close(flat(take_step(model, optimizer, batch)), flat(clip_and_sum(gradients, "flat", 0.1, str)))


def test_set_phases():
    model = mlp()
    optimizer = make_private(model, batch_size=4, phases="B")
    take_step(model, optimizer, examples(4))
    optimizer.set_phases("A")
    assert "0.lora_A" in take_step(model, optimizer, examples(4))
    optimizer.set_phases("BA")  # two steps were taken: the cycle stands at B
    assert "0.lora_B" in take_step(model, optimizer, examples(4))
    optimizer.batch.expect(4)
    cross_entropy(model, examples(4)).backward()
    assert_refuses(RuntimeError, "inside a logical batch", lambda: optimizer.set_phases("B"))
    assert_refuses(ValueError, "choose one of B, A, AB, BA", lambda: PhaseCycle("C"))


def test_phases_of_a_factor_that_the_wrapped_optimizer_lacks_are_refused():
    model = mlp()
    held = [p for name, p in model.named_parameters() if p.requires_grad and name != "0.lora_A"]
    _, optimizer, _ = PrivacyEngine("rdp").make_private(
        model=model,
        optimizer=torch.optim.SGD(held, lr=0.1),
        data_loader=loader_of(40, 8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        phases="B",
    )
    for phases in ("A", "BA", "AB"):
        assert_refuses(ValueError, "lora_A", lambda phases=phases: optimizer.set_phases(phases))
    optimizer.set_phases("B")


def test_phase_of_each_step():
    assert [sorted(PhaseCycle("BA").factors(step)) for step in range(3)] == [["B"], ["A"], ["B"]]
    assert [sorted(PhaseCycle("AB").factors(step)) for step in range(2)] == [["A", "B"]] * 2
