"""Batches that are drawn and never stepped."""

import pytest
import torch

from lora_dp import PrivacyEngine
from tests.models import assert_refuses, examples, mlp, private_run
from tests.support import make_private


def test_a_batch_that_is_skipped_is_noticed():
    model, optimizer, loader = private_run(PrivacyEngine("rdp", reproducible_seed=0))
    batches = iter(loader)
    x, y = next(batches)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    next(batches)  # looked at, and left out
    assert_refuses(RuntimeError, "was never stepped", lambda: next(batches))


def test_the_refusal_names_the_mask_as_the_remedy():
    model, optimizer, loader = private_run(PrivacyEngine("rdp", reproducible_seed=0))
    batches = loader.take(2)
    next(batches)
    assert_refuses(
        RuntimeError,
        "step every batch once, and leave out a single example by optimizer.step(mask=mask), whose entry "
        "for an example depends on that example alone",
        lambda: next(batches),
    )


def test_the_last_batch_is_noticed_too():
    model, optimizer, loader = private_run(PrivacyEngine("rdp", reproducible_seed=0))

    def skip_all() -> None:
        for _ in loader.take(1):
            pass

    assert_refuses(RuntimeError, "was never stepped", skip_all)


def test_a_new_iteration_does_not_forget_a_skipped_batch():
    model, optimizer, loader = private_run(PrivacyEngine("rdp", reproducible_seed=0))
    for number, (x, y) in enumerate(loader):
        if number == 1:
            break
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert_refuses(RuntimeError, "was never stepped", lambda: next(iter(loader)))


def test_looking_at_a_batch_before_training_is_no_skip():
    model, optimizer, loader = private_run(PrivacyEngine("rdp", reproducible_seed=0))
    next(iter(loader))
    for x, y in loader.take(2):
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert optimizer.ledger.steps == 2


def test_one_batch_may_be_looked_at_before_training_and_no_second():
    _, _, loader = private_run(PrivacyEngine("rdp", reproducible_seed=0))
    next(iter(loader))
    next(iter(loader))
    assert_refuses(RuntimeError, "was never stepped", lambda: next(iter(loader)))


def test_what_was_looked_at_is_no_batch_that_waits_for_its_step():
    """Of two batches of one size, the second is the one that is stepped."""
    model, (x, y) = mlp(), examples(4)
    optimizer = make_private(model, batch_size=4)
    for _ in range(2):
        optimizer.batch.begin()
        optimizer.batch.expect(4)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.batch.check_stepped()


@pytest.mark.parametrize("micro", [False, True])
def test_a_batch_that_was_not_stepped_is_refused_for_good(micro):
    """A loop that passes over the error of one epoch, and goes on, tells by what is missing in it."""
    model, (x, y) = mlp(), examples(4)
    optimizer = make_private(model, batch_size=4)
    optimizer.batch.expect(4)
    if micro:
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.signal_skip_step()
        optimizer.step()
        optimizer.recorder.discard()
    assert_refuses(RuntimeError, "drew (4 examples) was never stepped", optimizer.batch.check_stepped)
    before = model[2].weight.detach().clone()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    for again in (optimizer.batch.check_stepped, optimizer.batch.begin, optimizer.step, optimizer.step_on_empty_batch):
        assert_refuses(RuntimeError, "tells of its examples: call make_private again", again)
    assert optimizer.ledger.steps == 0 and torch.equal(model[2].weight, before)


def test_a_step_on_another_batch_than_was_drawn_is_refused_for_good():
    """Who leaves an odd example out of a batch, and passes over the refusal, leaves out the batch."""
    model, (x, y) = mlp(), examples(4)
    optimizer = make_private(model, batch_size=4)
    optimizer.batch.expect(4)
    torch.nn.functional.cross_entropy(model(x[1:]), y[1:]).backward()
    assert_refuses(RuntimeError, "This step saw 3 examples", optimizer.step)
    optimizer.zero_grad()
    optimizer.batch.expect(4)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    assert_refuses(RuntimeError, "This step saw 3 examples", optimizer.step)
    assert optimizer.ledger.steps == 0


@pytest.mark.parametrize("options", [{}, {"set_to_none": True}, {"set_to_none": False}])
def test_gradients_are_forgotten_as_torch_forgets_them(options):
    model, (x, y) = mlp(), examples(4)
    optimizer = make_private(model, batch_size=4)
    optimizer.batch.expect(4)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad(**options)
    left = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is None if options.get("set_to_none", True) else not grad.any() for grad in left)


def test_noise_alone_may_not_stand_for_a_batch():
    """Who left a batch out for what one example holds would take away what all others add."""
    model, optimizer, loader = private_run(PrivacyEngine("rdp", reproducible_seed=0))
    for number, (x, y) in enumerate(loader.take(3)):
        if number == 1:
            before = model[2].weight.detach().clone()
            assert_refuses(
                RuntimeError,
                f"the private loader drew ({len(x)} examples) cannot be left out, since one example would take away "
                "what all others add: step it, and leave out a single example by optimizer.step(mask=mask)",
                optimizer.step_on_empty_batch,
            )
            assert torch.equal(model[2].weight, before) and optimizer.ledger.steps == 1
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert optimizer.ledger.steps == number + 1
