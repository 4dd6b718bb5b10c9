"""Ways to a backward: by several losses, passes, threads and edges; what was not examined is refused."""

import concurrent.futures
import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import IsolationError, PrivacyEngine
from lora_dp.isolation.loss_checks.backward_calls import show_backward_to
from lora_dp.losses import classification_loss
from tests.isolation.loss_checks.outside_losses import N
from tests.models import assert_refuses, examples, mlp, take_step
from tests.support import make_private


def test_each_backward_of_a_kept_graph_has_a_weight_of_its_own():
    """Two passes through one graph are two constants; that one of them follows the batch is refused as ever."""
    model = mlp()
    optimizer = make_private(model, batch_size=N)

    def twice(second: float, n: int) -> None:
        x, y = examples(n)
        optimizer.batch.expect(n)
        loss = F.cross_entropy(model(x), y)
        loss.backward(retain_graph=True)
        (second * loss).backward()
        optimizer.step()

    twice(-0.9, N)
    twice(-0.9, 1)
    assert optimizer.ledger.steps == 2
    with pytest.raises(IsolationError, match="weighs an example by -0.8, that of an earlier one by -0.9"):
        twice(-0.8, 5)


def test_a_loss_that_passes_by_the_outputs_is_refused():
    """From a hook's features the reduction cannot be followed to the examples."""
    model, kept = mlp(), []
    model[0].register_forward_hook(lambda module, inputs, output: kept.append(output))
    optimizer = make_private(model, batch_size=4)
    optimizer.batch.expect(4)
    x, y = examples(4)
    out = model(x)
    for loss in (kept[-1].sum(), F.cross_entropy(out, y) + 0.01 * kept[-1].mean(0).square().sum()):
        with pytest.raises(IsolationError, match="beside what the model returned"):
            loss.backward(retain_graph=True)
    with pytest.raises(IsolationError, match="beside what the model returned"):
        optimizer.backward(F.cross_entropy(out, y, reduction="none") + kept[-1].mean(0).square().sum())


def test_losses_of_two_forward_passes_are_told_from_unknown_functions():
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    optimizer.batch.expect(4)
    x, y = examples(4)
    first, second = model(x), model(x + 0.1)
    losses = F.cross_entropy(second, y, reduction="none") + (first - second).square().sum(1)
    words = "another forward pass of the model, or on values within it that it does not return: join several views"
    assert_refuses(IsolationError, words, lambda: optimizer.backward(losses))


def test_a_gradient_by_another_way_than_backward_is_refused():
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    optimizer.batch.expect(4)
    out = model(examples(4)[0])
    nn.Linear(3, 1)(out.detach()).mean().backward()  # a loss that does not depend on the model
    torch.autograd.Variable._execution_engine.run_backward(
        (out,), (torch.ones_like(out),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )
    assert_refuses(IsolationError, "from a loss that was not seen", optimizer.step)
    assert optimizer.ledger.steps == 0


def test_several_losses_in_one_backward_are_examined():
    model, (x, y) = mlp(), examples(4)
    optimizer = make_private(model, batch_size=4)
    optimizer.batch.expect(4)
    out = model(x)
    with pytest.raises(IsolationError, match="'Max'"):
        torch.autograd.backward([F.cross_entropy(out, y), out.max()])
    torch.autograd.backward([F.cross_entropy(out, y), out.square().mean()])
    optimizer.step()
    assert optimizer.ledger.steps == 1


def test_a_backward_from_an_edge_of_the_graph_is_refused():
    model, (x, y) = mlp(), examples(4)
    optimizer = make_private(model, batch_size=4)
    optimizer.batch.expect(4)
    loss = F.cross_entropy(model(x), y)
    torch.autograd.backward([torch.autograd.graph.get_gradient_edge(loss)], [torch.ones(())])
    assert_refuses(IsolationError, "from a loss that was not seen", optimizer.step)


def test_a_vector_with_weights_is_refused():
    model = mlp()
    make_private(model, batch_size=4)
    x, y = examples(4)
    losses = F.cross_entropy(model(x), y, reduction="none")
    with pytest.raises(IsolationError, match="backward\\(\\) of a vector with weights cannot be followed: hand"):
        losses.backward(torch.ones(4))


def test_other_models_are_none_of_our_business():
    model, other = mlp(), nn.Linear(6, 3)
    make_private(model, batch_size=4)
    x, _ = examples(4)
    model(x)
    other(x).max().backward()
    other(x).backward(torch.ones(4, 3))
    number = torch.ones((), requires_grad=True)
    number.backward()
    assert other.weight.grad is not None and float(number.grad) == 1


def test_an_unknown_graph_is_taken_once_the_criterion_was_tested():
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value / 2

        @staticmethod
        def backward(ctx, g):
            return g / 2

    def criterion(out: Tensor, y: Tensor) -> Tensor:
        return Half.apply(F.cross_entropy(out, y))

    engine, model, batch = PrivacyEngine("rdp", reproducible_seed=0), mlp(), examples(4)
    optimizer = make_private(model, batch_size=4, engine=engine)
    with pytest.raises(IsolationError, match="the operation 'Half"):
        criterion(model(batch[0]), batch[1]).backward()
    optimizer.zero_grad()
    engine.check_isolation(model, batch, criterion)
    take_step(model, optimizer, batch, lambda m, b: criterion(m(b[0]), b[1]))
    assert optimizer.ledger.steps == 1
    engine.check_isolation(model, batch, lambda out, y: criterion(out * 0.5, y))
    take_step(model, optimizer, batch, lambda m, b: criterion(m(b[0]) * 0.5, b[1]))
    with pytest.raises(IsolationError, match="weighs an example by 0.4, that of an earlier one by 0.5"):
        take_step(model, optimizer, batch, lambda m, b: criterion(m(b[0]) * 0.4, b[1]))


@pytest.mark.parametrize("way", ["set_default_device", "device"])
def test_losses_are_followed_under_a_default_device_too(way):
    """torch's backward comes back to itself there."""
    model = mlp().train()
    optimizer = make_private(model, batch_size=4)
    x, y = examples(4)
    torch.set_default_device("cpu" if way == "set_default_device" else None)
    try:
        with torch.device("cpu") if way == "device" else contextlib.nullcontext():
            for _ in range(2):
                optimizer.zero_grad()
                optimizer.batch.expect(4)
                optimizer.backward(classification_loss(model(x), y))
                optimizer.step()
            optimizer.zero_grad()
            with pytest.raises(IsolationError):
                (F.cross_entropy(model(x), y) + model(x).var(0).mean()).backward()
    finally:
        torch.set_default_device(None)


def test_losses_are_followed_in_a_thread_too():
    def run():
        model = mlp().train()
        make_private(model, batch_size=4)
        outputs = model(examples(4)[0])
        (F.cross_entropy(outputs, examples(4)[1]) + outputs.var(0).mean()).backward()

    with concurrent.futures.ThreadPoolExecutor(1) as pool, pytest.raises(IsolationError):
        pool.submit(run).result()


def test_after_a_backward_that_failed_losses_are_followed_still():
    model = mlp().train()
    optimizer = make_private(model, batch_size=4)
    x, y = examples(4)

    def fails(gradient):
        raise ZeroDivisionError

    outputs = model(x)
    outputs.register_hook(fails)
    with pytest.raises(ZeroDivisionError):
        F.cross_entropy(outputs, y).backward()
    optimizer.zero_grad()
    with pytest.raises(IsolationError):
        outputs = model(x)
        (F.cross_entropy(outputs, y) + outputs.var(0).mean()).backward()


def test_a_graph_is_not_kept_after_the_step():
    """What the watch holds of the outputs goes with the pass."""
    model, (x, y) = mlp(), examples(N)
    optimizer = make_private(model, batch_size=N)
    take_step(model, optimizer, (x, y))
    assert optimizer.recorder.losses._outputs is None


@pytest.mark.slow
def test_the_deepest_graph_does_not_exhaust_the_stack():
    model, (x, y) = mlp(), examples(N)
    optimizer = make_private(model, batch_size=N)
    out = model(x)
    for _ in range(5000):
        out = out + 0.0
    optimizer.batch.expect(N)
    total = F.cross_entropy(out, y)
    for _ in range(5000):
        total = total + 0.0
    total.backward()
    optimizer.step()
    assert optimizer.ledger.steps == 1 and math.isfinite(float(total))


def test_a_watch_is_told_of_the_end_of_its_own_backwards_alone():
    class Noting:
        followed, waiting = False, True

        def __init__(self, mine: Tensor) -> None:
            self.mine, self.ended, self.seen = mine, 0, 0

        def scalar(self, loss: Tensor, gradient: Tensor | None = None) -> None:
            self.seen += 1
            if loss is self.mine:
                self.followed = True

        def after_backward(self) -> None:
            self.ended += 1

    leaf = torch.ones((), requires_grad=True)
    own, other = 2 * leaf, 3 * leaf
    watch = Noting(own)
    show_backward_to(watch)
    own.backward()
    assert (watch.seen, watch.ended) == (1, 1)
    other.backward()
    assert (watch.seen, watch.ended) == (2, 1)
    watch.waiting = False
    (4 * leaf).backward()
    assert (watch.seen, watch.ended) == (2, 1)
