"""Several backward passes, and several uses in one: an example's gradient is the sum of all."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_dp import DPLinear
from lora_dp.ops.per_example_grad import per_example_grad
from tests.models import cross_entropy, examples, mlp, one_by_one
from tests.nn.slots import check, give, outer, slot_of, weighted_sum
from tests.support import assert_close, brute_force, make_private, private_gradients


def test_a_backward_that_stopped_between_the_two_factors_of_a_use_leaves_no_half():
    torch.manual_seed(0)
    slot, left, right = slot_of((3, 6), 4, "ghost"), torch.randn(4, 5, 3), torch.randn(4, 5, 6)
    _, first, second = slot.receive(left, 3, 6)
    first.backward(torch.randn_like(left))
    assert not slot.filled
    torch.autograd.backward([first, second], [left, right])
    check(slot, outer(left, right))


@pytest.mark.parametrize("method", ["direct", "ghost"])
def test_two_backward_passes_through_one_graph_add_up(method):
    """And the norm is never below that of what is summed."""
    torch.manual_seed(0)
    slot, right = slot_of((3, 6), 4, method), torch.randn(4, 2, 6)
    lefts = torch.randn(2, 4, 2, 3)
    ghost, first, second = slot.receive(lefts[0], 3, 6, 1.5)
    for left in lefts:
        found = (left, right) if ghost else per_example_grad(left, right, 1.5)
        torch.autograd.backward([first, second], list(found))
    total = outer(lefts.sum(0), right, 1.5)
    ones = torch.eye(4)
    for i in range(4):
        assert_close(weighted_sum(slot, ones[i]), total[i], 1e-5)
    assert (slot.norms().square() >= total.square().sum((1, 2)) * (1 - 1e-6)).all()


@pytest.mark.parametrize("method", ["direct", "ghost"])
def test_of_several_optimizers_the_active_one_says_how_norms_are_computed(method):
    model, (x, y) = mlp(), examples(4)
    optimizer = make_private(model, batch_size=4, norm_method=method)
    make_private(model, batch_size=4, norm_method="ghost" if method == "direct" else "direct")
    optimizer.activate()
    F.cross_entropy(model(x), y).backward()
    head = next(slot for slot in optimizer.recorder.current.slots.values() if slot.name == "2.weight")
    assert (head.kept is None) == (method == "ghost")


def test_a_kept_graph_leaves_the_activations_alone():
    """Two losses, two backward passes: neither may write into what the graph or the user holds."""
    model = nn.Sequential(DPLinear(6, 8), nn.Tanh(), DPLinear(8, 3))
    optimizer = make_private(model, batch_size=4, norm_method="ghost")
    x = torch.randn(4, 6)
    before = x.clone()
    logits = model(x)
    logits.square().mean().backward(retain_graph=True)
    logits.exp().mean().backward()
    assert torch.equal(x, before)
    optimizer.batch.expect(4)
    optimizer.step()


def test_a_mean_and_losses_of_single_examples_give_the_same_sum():
    """What a mean has divided by N is multiplied by it; a vector's sum is not."""
    batch = examples(4)
    model = mlp()
    parts = brute_force(model, cross_entropy, one_by_one(batch), {name for name, _ in model.named_parameters()})
    for vector in (False, True):
        model = mlp()
        optimizer = make_private(model, batch_size=4, max_grad_norm=1e6)
        optimizer.batch.expect(4)
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        optimizer.backward(losses) if vector else losses.mean().backward()
        optimizer.step()
        for name, gradient in private_gradients(model).items():
            assert_close(4 * gradient, torch.stack([part[name] for part in parts]).sum(0))


@pytest.mark.slow
@pytest.mark.parametrize("end", ["step", "zero_grad"])
def test_a_pass_that_is_over_keeps_nothing_alive(end):
    """Its outputs, and so its graph, are freed before the next forward takes memory."""
    model = nn.Sequential(DPLinear(6, 8), nn.Tanh(), DPLinear(8, 3))
    optimizer = make_private(model, batch_size=4)
    optimizer.batch.expect(4)
    logits = model(torch.randn(4, 6))
    held = weakref.ref(logits)
    logits.square().mean().backward()
    getattr(optimizer, end)()
    del logits
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("order", ["oow", "owo", "woo"])
@pytest.mark.parametrize("swapped", [False, True])
def test_uses_of_either_way_count_together(order, swapped):
    """An outer product (o), and what comes whole (w): the norm of one of them alone would be too small."""
    torch.manual_seed(0)
    slot, total = slot_of((3, 6), 4, "direct"), torch.zeros(4, 3, 6, dtype=torch.float64)
    for number, way in enumerate(order):
        if (way == "w") != swapped:
            other = torch.randn(4, 3, 6)
            slot.receive_whole(torch.zeros(4, 2, 6)).backward(other)
            total += other
        else:
            left, right = torch.randn(4, 2, 3), torch.randn(4, 2, 6)
            give(slot, left, right)
            total += outer(left, right)
        if number:
            check(slot, total)


@pytest.mark.parametrize("wholes", [0, 1, 2])
@pytest.mark.parametrize("products", [1, 2])
def test_uses_that_one_backward_fills_count_together(products, wholes):
    torch.manual_seed(0)
    slot, total = slot_of((3, 6), 4, "direct"), torch.zeros(4, 3, 6, dtype=torch.float64)
    leaves, found = [], []
    for _ in range(products):
        left, right = torch.randn(4, 2, 3), torch.randn(4, 2, 6)
        leaves += slot.receive(left, 3, 6)[1:]
        found += per_example_grad(left, right, 1.0)
        total += outer(left, right)
    for _ in range(wholes):
        leaves.append(slot.receive_whole(torch.zeros(4, 2, 6)))
        found.append(torch.randn(4, 3, 6))
        total += found[-1]
    torch.autograd.backward(leaves, found)
    check(slot, total)
