"""The private optimizer at its edges: batches without anybody, what is refused and when, whose step it is."""

from typing import Any

import pytest
import torch
from torch import nn

import lora_dp.engine.optimizer
from tests.models import assert_refuses, cross_entropy, examples, flat, mlp, moved, seeded, snapshot, take_step
from tests.support import assert_close, make_private, private_gradients


def test_a_drawn_batch_without_anybody_is_stepped_and_done_with():
    optimizer = make_private(mlp(), batch_size=4, noise_multiplier=1.0)
    optimizer.batch.expect(0)
    optimizer.step_on_empty_batch()
    optimizer.batch.check_stepped()
    assert optimizer.steps_taken == optimizer.ledger.steps == 1
    optimizer.batch.expect(0)
    optimizer.batch.expect(3)
    assert_refuses(RuntimeError, "(3 examples) cannot be left out", optimizer.step_on_empty_batch)
    assert optimizer.ledger.steps == 1


def test_an_empty_batch_is_a_step_of_the_optimizer_that_takes_it():
    """Whichever was active on the model: its factors move, and no other."""
    model = mlp()
    first = make_private(model, batch_size=4, noise_multiplier=1.0, phases="B", engine=seeded())
    second = make_private(model, batch_size=4, noise_multiplier=1.0, phases="A", engine=seeded())
    before = snapshot(model)
    first.step_on_empty_batch()
    assert moved(model, before) == {"0.lora_B", "2.weight", "2.bias"}
    assert (first.ledger.steps, second.ledger.steps) == (1, 0)
    second.step_on_empty_batch()
    assert "0.lora_A" in moved(model, before)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda model: model.requires_grad_(False), "frozen after make_private"),
        (lambda model: model.to(torch.bfloat16), "is torch.bfloat16 now"),
    ],
)
def test_a_micro_batch_of_a_changed_model_is_refused_at_once(change, words):
    """Before it is added to the logical batch, which goes on when the change is taken back."""
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    optimizer.batch.expect(4)
    cross_entropy(model, examples(4)).backward()
    change(model)
    optimizer.signal_skip_step()
    assert_refuses(RuntimeError, words, optimizer.step)
    model.float().requires_grad_(True)
    optimizer.signal_skip_step(False)
    optimizer.step()
    assert optimizer.ledger.steps == 1


def test_groups_that_are_added_reach_the_wrapped_optimizer():
    """With their own learning rate; one that is not covered is refused at the next step."""
    model = mlp()
    optimizer = make_private(model, batch_size=4, phases="B", lr=0.0)
    held = list(optimizer.param_groups[0]["params"])
    head = [p for p in held if p is model[2].weight]
    optimizer.param_groups[0]["params"] = [p for p in held if p is not model[2].weight]
    optimizer.add_param_group({"params": head, "lr": 1.0})
    assert optimizer.param_groups[1]["params"] == head and optimizer.original_optimizer.param_groups[1]["lr"] == 1.0
    before = snapshot(model)
    take_step(model, optimizer, examples(4))
    assert moved(model, before) == {"2.weight"}
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ValueError):
        take_step(model, optimizer, examples(4))


def test_a_gradient_that_was_left_on_what_a_step_does_not_train_is_gone():
    """Whatever optimizer is wrapped, it would move it."""
    model = mlp()
    optimizer = make_private(model, batch_size=4, phases="B")
    model[0].lora_A.grad = torch.ones_like(model[0].lora_A)
    before = snapshot(model)
    optimizer.batch.expect(4)
    cross_entropy(model, examples(4)).backward()
    optimizer.step()
    assert model[0].lora_A.grad is None and "0.lora_A" not in moved(model, before)


def test_a_batch_of_several_parts_is_not_taken_for_a_whole_one():
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    optimizer.batch.check_whole()
    optimizer.signal_skip_step()
    assert_refuses(RuntimeError, "of several micro-batches is under way", optimizer.batch.check_whole)
    optimizer.batch.expect(4)
    cross_entropy(model, examples(2)).backward()
    optimizer.step()
    assert_refuses(RuntimeError, "of several micro-batches is under way", optimizer.batch.check_whole)
    cross_entropy(model, examples(2)).backward()
    optimizer.step()
    optimizer.batch.check_whole()


def test_what_was_no_drawn_batch_is_in_no_later_step():
    model, other = mlp(), mlp()
    optimizer = make_private(model, batch_size=4)
    optimizer.batch.expect(3)
    cross_entropy(model, examples(5, seed=7)).backward()
    assert_refuses(RuntimeError, "This step saw 5 examples", optimizer.step)
    assert optimizer.batch.examples == 0 and optimizer.batch.collect() == {}
    assert_refuses(RuntimeError, "This step saw 5 examples", lambda: take_step(model, optimizer, examples(4)))
    optimizer = make_private(model, batch_size=4)
    released = take_step(model, optimizer, examples(4))
    assert flat(released).equal(flat(take_step(other, make_private(other, batch_size=4), examples(4))))
    assert optimizer.ledger.steps == 1


def test_a_step_that_was_refused_for_another_reason_loses_none_of_its_examples(monkeypatch):
    """They go with the next one, summed as if they had come together."""
    x, y = examples(8)
    model, whole = mlp(), mlp()
    optimizer = make_private(model, batch_size=8, max_grad_norm=0.3)
    with monkeypatch.context() as patch:
        patch.setattr(lora_dp.engine.optimizer, "check_one_process", lambda: 1 / 0)
        optimizer.batch.expect(5)
        cross_entropy(model, (x[:5], y[:5])).backward()
        assert_refuses(ZeroDivisionError, "division by zero", optimizer.step)
    assert optimizer.ledger.steps == 0
    optimizer.batch.expect(8)
    cross_entropy(model, (x[5:], y[5:])).backward()
    optimizer.step()
    expected = take_step(whole, make_private(whole, batch_size=8, max_grad_norm=0.3), (x, y))
    assert_close(8 * flat(private_gradients(model)), flat(expected))


@pytest.mark.parametrize("name", ["check_optimizer", "total", "release", "find_fused_step"])
def test_a_batch_whose_step_fails_is_not_gone_on_without(name, monkeypatch):
    """It might fail by what one example holds: before the entry in the ledger, or between that and the noise."""
    optimizer = make_private(model := mlp(), batch_size=4, noise_multiplier=1.0)
    if name in ("total", "release"):
        optimizer.register_step_pre_hook(lambda *_: None)  # so that torch takes the step
    optimizer.batch.expect(4)
    cross_entropy(model, examples(4)).backward()

    def fails(*_: Any, **__: Any) -> None:
        raise MemoryError("none left")

    where = optimizer.mechanism if name == "release" else lora_dp.engine.optimizer
    with monkeypatch.context() as patch:
        patch.setattr(where, name, (lambda *_: fails) if name == "find_fused_step" else fails)
        with pytest.raises(MemoryError):
            optimizer.step()
    assert optimizer.ledger.steps == (name != "check_optimizer")
    for later in (optimizer.batch.begin, optimizer.step_on_empty_batch):
        assert_refuses(RuntimeError, "tells of its examples: call make_private again", later)
