"""The private optimizer in the usual training loops: any optimizer, scheduler, order of calls."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models import (
    OPTIMIZERS,
    assert_refuses,
    cross_entropy,
    examples,
    flat,
    mlp,
    moved,
    private_run,
    seeded,
    snapshot,
    take_step,
    train,
)
from tests.support import assert_close, make_private, private_gradients


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_any_optimizer_steps_as_it_would_on_the_same_gradients(optimizer):
    """The private gradients, given to the same optimizer by hand, move a twin to the same place."""
    model, private, loader = private_run(seeded(), optimizer=optimizer, lr=0.05)
    twin = mlp()
    by_hand = optimizer([p for p in twin.parameters() if p.requires_grad], lr=0.05)
    start = snapshot(twin)
    for x, y in loader.take(5):
        F.cross_entropy(model(x), y).backward()
        private.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        by_hand.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)  # a fused step rounds less often
    assert not torch.equal(model[2].weight, start["2.weight"])


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=8),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=8),
    ],
)
@pytest.mark.parametrize("optimizer", [OPTIMIZERS[0], torch.optim.AdamW])
def test_schedulers_change_the_rate_without_a_warning(optimizer, scheduler):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, private, loader = private_run(seeded(), optimizer=optimizer)
        schedule = scheduler(private)
        rates = []
        for x, y in loader.take(5):
            F.cross_entropy(model(x), y).backward()
            private.step()
            schedule.step()
            private.zero_grad()
            rates.append(private.original_optimizer.param_groups[0]["lr"])
    assert len(set(rates)) == len(rates) > 1


def test_step_hooks_see_the_noised_gradients():
    """Before the update and after it; never the private gradients to which the noise was added."""

    def hooked_step(sigma: float) -> list[tuple[Tensor, set[str]]]:
        model, seen = mlp(), []
        optimizer = make_private(model, batch_size=4, noise_multiplier=sigma)
        before = snapshot(model)
        for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
            register(lambda *_: seen.append((flat(private_gradients(model)) * 4, moved(model, before))))
        released = flat(take_step(model, optimizer, examples(4)))
        assert all(torch.equal(gradients, released) for gradients, _ in seen)
        assert [names for _, names in seen] == [set(), {"0.lora_A", "0.lora_B", "2.weight", "2.bias"}]
        return seen

    # 55 normal draws of deviation C = 1 have a norm below 2 with probability below 1e-20.
    assert (hooked_step(1.0)[0][0] - hooked_step(0.0)[0][0]).norm() > 2


@pytest.mark.parametrize("place", ["first", "before backward", "last", "of the model"])
def test_zero_grad_in_every_usual_place(place):
    batch = examples(4)
    model = mlp()
    expected = [take_step(model, make_private(model, batch_size=4, lr=0.1), batch)]
    model = mlp()
    optimizer = make_private(model, batch_size=4, lr=0.1)
    for _ in range(2):
        optimizer.batch.expect(4)
        if place == "first":
            optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        if place == "before backward":
            optimizer.zero_grad()
        if place == "of the model":
            model.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append({name: 4 * g for name, g in private_gradients(model).items()})
        if place == "last":
            optimizer.zero_grad(set_to_none=False)
    assert torch.equal(flat(expected[0]), flat(expected[1]))
    assert not torch.equal(flat(expected[1]), flat(expected[2]))


def test_zero_grad_after_backward_forgets_the_batch():
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    cross_entropy(model, examples(4, seed=9)).backward()
    optimizer.zero_grad()
    assert_refuses(RuntimeError, "No per-example gradient was recorded", optimizer.step)
    reference = mlp()
    assert torch.equal(
        flat(take_step(model, optimizer, examples(4))),
        flat(take_step(reference, make_private(reference, batch_size=4), examples(4))),
    )


def test_closure():
    batch, losses = examples(4), []
    model, reference = mlp(), mlp()
    optimizer = make_private(model, batch_size=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses.append(cross_entropy(model, batch))
        losses[-1].backward()
        return losses[-1]

    optimizer.batch.expect(4)
    with torch.no_grad():
        returned = optimizer.step(closure)
    assert len(losses) == 1
    assert returned is losses[0]
    assert_close(returned, cross_entropy(mlp(), batch))
    released = private_gradients(model)
    assert_close(flat(released) * 4, flat(take_step(reference, make_private(reference, batch_size=4), batch)))


def test_two_forwards_before_a_step_are_refused():
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    cross_entropy(model, examples(4)).backward()
    assert_refuses(RuntimeError, "A second forward pass began", lambda: model(examples(4)[0]))
    optimizer.zero_grad()
    (cross_entropy(model, examples(4)) + cross_entropy(model, examples(4, seed=2))).backward()
    assert_refuses(RuntimeError, "One backward ran through two forward passes", optimizer.step)
    assert optimizer.ledger.steps == 0


def test_step_without_backward_is_refused():
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    assert_refuses(RuntimeError, "call loss.backward() before optimizer.step()", optimizer.step)
    model(examples(4)[0])
    assert_refuses(RuntimeError, "call loss.backward() before optimizer.step()", optimizer.step)


@pytest.mark.parametrize("kind", ["no_grad", "eval with gradients", "eval without"])
def test_evaluation_does_not_disturb_a_pass_under_way(kind):
    """Also a saliency map: gradients of the evaluated model to its input, between forward and backward."""
    batch, reference = examples(4), mlp()
    expected = take_step(reference, make_private(reference, batch_size=4), batch)

    def evaluate() -> None:
        x = examples(9, seed=5)[0].requires_grad_()
        if kind == "no_grad":
            with torch.no_grad():
                model(x)
            return
        model.eval()
        with torch.set_grad_enabled(kind == "eval with gradients"):
            out = model(x)
        if kind == "eval with gradients":
            out.sum().backward()
            assert x.grad is not None and x.grad.any()
        model.train()

    model = mlp()
    optimizer = make_private(model, batch_size=4)
    optimizer.batch.expect(4)
    evaluate()
    loss = cross_entropy(model, batch)
    evaluate()
    loss.backward()
    evaluate()
    optimizer.step()
    assert torch.equal(flat(private_gradients(model)) * 4, flat(expected))


def test_a_schedule_by_the_steps_goes_on_with_empty_batches_too():
    """The number of batches that a loop is given is private: empty ones are not handed over."""
    model, optimizer, loader = private_run(seeded(), batch_size=1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    before, given = optimizer.param_groups[0]["lr"], []
    train(model, optimizer, (given.append(batch) or batch for batch in loader.take(60)))
    assert optimizer.ledger.steps == 60 > len(given)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(before * 0.9**60)
