"""Logical batches of several micro-batches, and masks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lora_dp import PrivacyEngine
from tests.models import assert_refuses, cross_entropy, examples, flat, mlp, moved, snapshot, take_step
from tests.support import assert_close, make_private, private_gradients

# Logical batches


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sizes", [(3, 5), (1, 1, 6), (0, 8)])
def test_micro_batches_equal_one_batch(sizes, reduction):
    (x, y), released = examples(8), []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return losses.sum() / (max(len(batch[1]), 1) if reduction == "mean" else 1)

    for parts in ((8,), sizes):
        model = mlp()
        optimizer = make_private(model, batch_size=8, max_grad_norm=0.3, loss_reduction=reduction, noise_multiplier=0.5)
        optimizer.batch.expect(8)
        for number, part in enumerate(zip(x.split(parts), y.split(parts), strict=True)):
            optimizer.zero_grad()  # keeps what was added to the logical batch
            loss(model, part).backward()
            if number < len(parts) - 1:
                optimizer.signal_skip_step()
            optimizer.step()
        assert optimizer.steps_taken == optimizer.ledger.steps == 1
        released.append(flat(private_gradients(model)))
    assert_close(released[1], released[0], 1e-6)


def test_skipped_step_releases_nothing():
    model = mlp()
    optimizer = make_private(model, batch_size=4, noise_multiplier=1.0)
    before = snapshot(model)
    optimizer.batch.expect(4)
    cross_entropy(model, examples(2)).backward()
    optimizer.signal_skip_step()
    optimizer.step()
    assert not moved(model, before) and optimizer.ledger.steps == optimizer.steps_taken == 0
    assert_refuses(RuntimeError, "A logical batch is under way", optimizer.step_on_empty_batch)
    cross_entropy(model, examples(1)).backward()
    assert_refuses(RuntimeError, "This step saw 3 examples", optimizer.step)
    assert optimizer.ledger.steps == 0


def test_skip_can_be_taken_back():
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    optimizer.signal_skip_step()
    optimizer.signal_skip_step(False)
    take_step(model, optimizer, examples(4))
    assert optimizer.steps_taken == 1


# Masks


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
def test_mask_equals_dropping_the_examples(clipping):
    (x, y), mask = examples(8), torch.tensor([1, 1, 0, 1, 0, 0, 1, 1], dtype=torch.bool)
    reference, model = mlp(), mlp()
    options = {"batch_size": 8, "max_grad_norm": 0.3, "clipping": clipping}
    # Both losses are means over what the model saw: the rescaled gradients must not depend on the padding.
    expected = take_step(reference, make_private(reference, **options), (x[mask], y[mask]))
    optimizer = make_private(model, **options)
    optimizer.batch.expect(5)
    cross_entropy(model, (x, y)).backward()
    optimizer.step(mask=mask)
    assert_close(flat(private_gradients(model)) * 8, flat(expected))


def test_masks_in_micro_batches():
    (x, y), mask = examples(8), torch.tensor([1, 1, 0, 1, 1, 1, 1, 1], dtype=torch.bool)
    reference, model = mlp(), mlp()
    expected = take_step(reference, make_private(reference, batch_size=8), (x[mask], y[mask]))
    optimizer = make_private(model, batch_size=8)
    optimizer.batch.expect(7)
    for part, last in ((slice(0, 4), False), (slice(4, 8), True)):
        cross_entropy(model, (x[part], y[part])).backward()
        optimizer.signal_skip_step(not last)
        optimizer.step(mask=None if last else mask[part])
    assert_close(flat(private_gradients(model)) * 8, flat(expected))


def test_masked_nan_contributes_nothing():
    (x, y), mask = examples(4), torch.tensor([True, False, True, True])
    x[1] = torch.nan
    model, reference = mlp(), mlp()
    expected = take_step(reference, make_private(reference, batch_size=4), (x[mask], y[mask]))
    optimizer = make_private(model, batch_size=4)
    assert_close(flat(take_step(model, optimizer, (x, y), mask=mask)), flat(expected))


def sum_without_the_damaged(x: Tensor, y: Tensor, bound: float) -> Tensor:
    """The clipped sum of the one batch at rate 1, as the guide leaves examples out."""
    model, engine = mlp().train(), PrivacyEngine("rdp")
    model, optimizer, loader = engine.make_private(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=len(x)),
        noise_multiplier=0.0,
        max_grad_norm=bound,
    )
    for inputs, labels in loader:
        optimizer.backward(F.cross_entropy(model(inputs), labels, reduction="none"))
        optimizer.step(mask=inputs.abs().amax(1) < 100)
    assert engine.ledger.steps == 1
    return flat(private_gradients(model)) * len(x)


@pytest.mark.parametrize("damage", [torch.nan, torch.inf, 1e6])
def test_one_damaged_example_takes_nothing_of_the_others_away(damage):
    (x, y), bound = examples(1), 0.01
    x, y = x + 0.01 * torch.randn(30, x.shape[1]), y.expand(30).clone()
    without = sum_without_the_damaged(x, y, bound)
    assert without.norm() > 25 * bound  # what would be missing if the batch were left out
    damaged = torch.cat([x, torch.full_like(x[:1], damage)])
    assert_close(sum_without_the_damaged(damaged, torch.cat([y, y[:1]]), bound), without, 1e-6)


def test_mask_adds_nobody():
    """Ten rows of which all count are no padded draw of three."""
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    optimizer.batch.expect(3)
    cross_entropy(model, examples(10)).backward()
    assert_refuses(
        RuntimeError, "This step saw 10 examples", lambda: optimizer.step(mask=torch.ones(10, dtype=torch.bool))
    )


@pytest.mark.parametrize("mask", [torch.ones(3, dtype=torch.bool), torch.ones(4), torch.ones(4, 1, dtype=torch.bool)])
def test_wrong_mask_is_refused(mask):
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    assert_refuses(
        ValueError,
        "mask must be a bool tensor of shape (4,)",
        lambda: take_step(model, optimizer, examples(4), mask=mask),
    )
