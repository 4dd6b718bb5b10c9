"""Whose pass it is: models shared by several optimizers, copied, saved and dropped."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

from lora_dp import PrivateOptimizer
from tests.models import assert_refuses, cross_entropy, examples, flat, mlp, moved, seeded, snapshot, take_step
from tests.support import make_private, private_gradients


def test_two_optimizers_share_one_model():
    """As the clients of a federation: own phases, bounds, ledgers; each steps on its own passes alone."""
    model = mlp()
    engines = [seeded(), seeded()]
    first = make_private(model, batch_size=4, engine=engines[0], phases="B", lr=0.0, max_grad_norm=0.2)
    second = make_private(model, batch_size=8, engine=engines[1], phases="A", lr=0.0, max_grad_norm=0.4)
    for _ in range(2):
        for optimizer, phases, n in ((first, "B", 4), (second, "A", 8)):
            optimizer.activate()
            reference = mlp()
            expected = take_step(
                reference,
                make_private(
                    reference, batch_size=n, phases=phases, max_grad_norm=optimizer.mechanism.rule.max_grad_norm
                ),
                examples(n),
            )
            assert torch.equal(flat(take_step(model, optimizer, examples(n))), flat(expected))
    assert [engine.ledger.steps for engine in engines] == [2, 2]
    first.batch.expect(4)
    assert_refuses(RuntimeError, "call activate() before forward", lambda: take_step(model, first, examples(4)))


def test_examples_of_one_optimizer_never_enter_a_step_of_another():
    model = mlp()
    first, second = (make_private(model, batch_size=4, engine=seeded()) for _ in range(2))
    first.activate()
    cross_entropy(model, examples(4)).backward()
    second.activate()
    second.batch.expect(4)
    assert_refuses(RuntimeError, "No per-example gradient was recorded", second.step)
    assert second.ledger.steps == 0


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_copy_of_a_private_model_trains_on_its_own(copied):
    """Copied in the middle of a pass, which goes on as if there were no copy."""
    batch, others = examples(4), examples(6, seed=5)
    expected = [
        flat(take_step(reference, make_private(reference, batch_size=len(taken[0])), taken))
        for reference, taken in ((mlp(), batch), (mlp(), others))
    ]

    model = mlp()
    optimizer = make_private(model, batch_size=4)
    optimizer.batch.expect(4)
    loss = cross_entropy(model, batch)
    before, twin = snapshot(model), copied(model)
    with torch.no_grad():
        assert torch.equal(twin(batch[0]), model(batch[0]))
    assert_refuses(RuntimeError, "This is a copy of a private model", lambda: twin(others[0]))
    with torch.no_grad():
        twin(batch[0])  # refused training does not spoil evaluation

    twins = make_private(twin, batch_size=6)
    assert torch.equal(flat(take_step(twin, twins, others)), expected[1])
    assert moved(twin, before) and not moved(model, before)
    after = snapshot(twin)
    loss.backward()
    optimizer.step()
    assert torch.equal(flat(private_gradients(model)) * 4, expected[0])
    assert not moved(twin, after)
    assert twins.ledger.steps == optimizer.ledger.steps == 1


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps, lambda o: torch.save(o, io.BytesIO())])
def test_copy_of_a_private_optimizer_is_refused_and_breaks_no_other(copier):
    """torch's own restoring of an optimizer would replace methods of the class."""
    reference = mlp()
    expected = take_step(reference, make_private(reference, batch_size=4), examples(4))
    model, methods = mlp(), dict(vars(PrivateOptimizer))
    optimizer = make_private(model, batch_size=4)
    assert_refuses(TypeError, "cannot be copied or pickled, its noise would repeat", lambda: copier(optimizer))
    assert dict(vars(PrivateOptimizer)) == methods
    assert torch.equal(flat(take_step(model, optimizer, examples(4))), flat(expected))


@pytest.mark.slow
def test_dropped_model_is_freed():
    """Its isolation check, optimizer and step have left nothing that holds it."""
    model = mlp()
    take_step(model, make_private(model, batch_size=4), examples(4))
    alive = [weakref.ref(model), *(weakref.ref(p) for p in model.parameters())]
    del model
    gc.collect()
    assert [reference() for reference in alive] == [None] * len(alive)
