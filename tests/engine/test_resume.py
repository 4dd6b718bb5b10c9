"""Seeded runs repeat bit for bit, and saved runs go on where they stopped."""

import copy
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lora_dp import PrivacyEngine
from tests.models import OPTIMIZERS, assert_refuses, mlp, private_run, seeded, snapshot, train
from tests.support import make_private


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_seeded_run_repeats_bit_for_bit(workers):
    results = []
    for _ in range(2):
        model, optimizer, loader = private_run(
            seeded(), size=12, batch_size=2, phases="BA", optimizer=torch.optim.AdamW, workers=workers
        )
        train(model, optimizer, loader.take(9))
        assert optimizer.steps_taken == 9
        results.append(snapshot(model))
    assert all(torch.equal(results[0][name], p) for name, p in results[1].items())


@pytest.mark.slow
@pytest.mark.parametrize("taken", [3, 4])
def test_resumed_run_goes_on_bit_for_bit(taken):
    """At an odd step too, in the middle of the cycle of phases."""

    def fresh() -> Any:
        engine = seeded()
        return engine, *private_run(
            engine,
            size=12,
            batch_size=3,
            phases="BA",
            optimizer=OPTIMIZERS[0],
            target_epsilon=8.0,
            target_delta=1e-3,
            steps=8,
        )

    engine, model, optimizer, loader = fresh()
    train(model, optimizer, loader.take(8))
    expected, epsilon = snapshot(model), engine.get_epsilon(1e-3)

    engine, model, optimizer, loader = fresh()
    train(model, optimizer, loader.take(taken))
    saved = copy.deepcopy((engine.state_dict(), model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, loader.take(2))  # lost in the crash

    engine, model, optimizer, loader = fresh()
    engine.load_state_dict(saved[0])
    model.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    assert engine.ledger.steps == optimizer.steps_taken == taken
    train(model, optimizer, loader.take(8 - taken))
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    assert engine.get_epsilon(1e-3) == epsilon


def test_optimizer_state_dict_fits_the_plain_optimizer():
    model, optimizer, loader = private_run(seeded(), optimizer=torch.optim.AdamW)
    train(model, optimizer, loader.take(3))
    plain = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    plain.load_state_dict(optimizer.state_dict())
    assert int(plain.state[model[2].weight]["step"]) == 3
    model, optimizer, _ = private_run(seeded(), optimizer=torch.optim.AdamW)
    optimizer.load_state_dict(plain.state_dict())
    assert int(optimizer.state[model[2].weight]["step"]) == 3


def test_engines_that_differ_in_their_source_are_not_restored():
    secure, other = PrivacyEngine("rdp"), seeded()
    assert secure.state_dict()["source"] is None
    assert_refuses(ValueError, "reproducible_seed", lambda: secure.load_state_dict(other.state_dict()))
    assert_refuses(ValueError, "reproducible_seed", lambda: other.load_state_dict(secure.state_dict()))
    third = PrivacyEngine("rdp")
    private_run(third)[1].step_on_empty_batch()
    secure.load_state_dict(third.state_dict())
    assert secure.ledger.steps == 1
    assert_refuses(
        ValueError, "accountant 'rdp', this one 'pld'", lambda: PrivacyEngine("pld").load_state_dict(third.state_dict())
    )


def test_steps_taken_cannot_be_unspent():
    """Going back to an earlier checkpoint with the same engine must not shrink its ledger."""
    engine = PrivacyEngine("rdp")
    optimizer = private_run(engine)[1]
    optimizer.step_on_empty_batch()
    early = engine.state_dict()
    optimizer.step_on_empty_batch()
    assert_refuses(ValueError, "cannot be taken back", lambda: engine.load_state_dict(early))
    assert engine.ledger.steps == 2
    engine.load_state_dict(engine.state_dict())
    assert engine.ledger.steps == 2


def test_a_run_that_goes_on_without_its_ledger_is_refused():
    model, engine = mlp(), PrivacyEngine(accountant="rdp", reproducible_seed=0)
    optimizer = make_private(model, batch_size=4, engine=engine, noise_multiplier=1.0)
    for _ in range(3):
        optimizer.step_on_empty_batch()
    saved, ledger = optimizer.state_dict(), engine.state_dict()
    again = PrivacyEngine(accountant="rdp", reproducible_seed=0)
    optimizer = make_private(mlp(), batch_size=4, engine=again, noise_multiplier=1.0)
    optimizer.load_state_dict(saved)
    assert_refuses(
        RuntimeError, "gone on from 3 private steps and the engine's ledger has 0", optimizer.step_on_empty_batch
    )
    again.load_state_dict(ledger)
    optimizer.step_on_empty_batch()
    assert again.ledger.steps == 4


def test_a_run_that_goes_on_without_the_steps_of_its_last_phase_is_refused():
    """Two optimizers of one engine: the ledger has the steps of both, the second's state says how many those were."""
    model, engine = mlp(), PrivacyEngine(accountant="rdp", reproducible_seed=0)
    for steps in (3, 2):
        optimizer = make_private(model, batch_size=4, engine=engine, noise_multiplier=1.0)
        early = engine.state_dict()
        for _ in range(steps):
            optimizer.step_on_empty_batch()
    again = PrivacyEngine(accountant="rdp", reproducible_seed=0)
    again.load_state_dict(early)
    saved, ledger = optimizer.state_dict(), engine.state_dict()
    optimizer = make_private(mlp(), batch_size=4, engine=again, noise_multiplier=1.0)
    optimizer.load_state_dict(saved)
    assert optimizer.steps_taken == 2
    assert_refuses(
        RuntimeError, "gone on from 5 private steps and the engine's ledger has 3", optimizer.step_on_empty_batch
    )
    again.load_state_dict(ledger)
    optimizer.step_on_empty_batch()
    assert again.ledger.steps == 6


def test_a_count_of_steps_that_is_none_is_refused():
    optimizer = make_private(mlp(), batch_size=4, noise_multiplier=1.0)
    for name in ("steps_taken", "ledger_steps"):
        assert_refuses(
            TypeError, name, lambda name=name: optimizer.load_state_dict({**optimizer.state_dict(), name: "3"})
        )


def test_states_that_are_loaded_before_make_private_are_seen_too():
    """The order of torch's tutorials: model and optimizer first."""
    model, engine = mlp(), PrivacyEngine(accountant="rdp", reproducible_seed=0)
    optimizer = make_private(model, batch_size=4, engine=engine, noise_multiplier=1.0)
    for _ in range(3):
        optimizer.step_on_empty_batch()
    saved, ledger = optimizer.state_dict(), engine.state_dict()
    model, again = mlp(), PrivacyEngine(accountant="rdp", reproducible_seed=0)
    plain = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    plain.load_state_dict(saved)
    _, optimizer, _ = again.make_private(
        model=model,
        optimizer=plain,
        data_loader=DataLoader(TensorDataset(torch.zeros(4)), batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    assert_refuses(
        RuntimeError, "gone on from 3 private steps and the engine's ledger has 0", optimizer.step_on_empty_batch
    )
    again.load_state_dict(ledger)
    optimizer.step_on_empty_batch()
    assert again.ledger.steps == 4
