"""What a private run was accounted for cannot be changed afterwards, nor what would have no effect be set."""

from typing import Any

import pytest
import torch
from torch import nn

from lora_dp import Ledger
from lora_dp.privacy.accounting import PoissonGaussian
from lora_dp.privacy.accounting.history import History
from lora_dp.privacy.clipping import FlatClipping
from lora_dp.privacy.mechanism import Mechanism
from lora_dp.privacy.randomness import SeededSource
from tests.models import private_run, seeded, train


@pytest.mark.parametrize(
    "name", ["noise_multiplier", "max_grad_norm", "sample_rate", "expected_batch_size", "event", "loss_reduction"]
)
def test_what_the_optimizer_was_made_for_cannot_be_changed(name: str) -> None:
    model, private, _ = private_run(seeded(), noise_multiplier=1.5, max_grad_norm=0.5)
    before = getattr(private, name)
    with pytest.raises(AttributeError, match=rf"^'{name}' is fixed, .*: call make_private again for another\.$"):
        setattr(private, name, "sum" if name == "loss_reduction" else 5.0)
    assert getattr(private, name) is before
    assert (private.noise_multiplier, private.max_grad_norm, private.sample_rate, private.expected_batch_size) == (
        1.5,
        0.5,
        0.2,
        8,
    )


def test_nor_what_it_and_the_loader_hold() -> None:
    _, private, loader = private_run(seeded())
    for holder, names in (
        (private.mechanism, ("noise_multiplier", "rule", "source")),
        (loader, ("sample_rate", "expected_batch_size", "dataset", "source")),
    ):
        for name in names:
            with pytest.raises(AttributeError, match=f"'{name}' is fixed"):
                setattr(holder, name, getattr(holder, name))
    with pytest.raises(AttributeError):
        private.mechanism.rule.max_grad_norm = 5.0
    with pytest.raises(AttributeError):
        private.event.noise_multiplier = 5.0


ACCOUNT = r"is fixed, for the engine computes ε .*: a saved account is taken up by engine\.load_state_dict\.$"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ledger", Ledger(), ACCOUNT),
        ("history", None, ACCOUNT),
        ("history", History(Ledger()), ACCOUNT),
        (
            "mechanism",
            Mechanism(FlatClipping(1.0), 0.01, SeededSource(1)),
            r"is fixed, .*: call make_private again for",
        ),
    ],
)
def test_nor_what_writes_its_account_and_makes_its_noise(name: str, value: Any, words: str) -> None:
    """Steps that go to another ledger are missing in the printed ε."""
    engine = seeded()
    model, private, loader = private_run(engine, noise_multiplier=1.5, max_grad_norm=0.5)
    before = getattr(private, name)
    with pytest.raises(AttributeError, match=f"^'{name}' {words}"):
        setattr(private, name, value)
    assert getattr(private, name) is before
    train(model, private, loader.take(4))
    spent = Ledger()
    spent.append(PoissonGaussian(1.5, 0.2), 4)
    assert engine.ledger is private.ledger and engine.ledger.entries == spent.entries
    assert engine.get_epsilon(1e-3) == spent.epsilon(1e-3, "rdp") > 0


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("source", SeededSource(1), "'source' is fixed, .*: make another PrivacyEngine"),
        ("history", History(Ledger()), "'history' is fixed, .* taken up by engine.load_state_dict"),
    ],
)
def test_nor_what_the_engine_gave_to_them(name: str, value: Any, words: str) -> None:
    engine = seeded()
    private_run(engine)
    before = getattr(engine, name)
    with pytest.raises(AttributeError, match=words):
        setattr(engine, name, value)
    assert getattr(engine, name) is before


@pytest.mark.parametrize(
    ("of", "name", "value", "remedy"),
    [
        ("engine", "noise_multiplier", 5.0, "call make_private again with another, for the optimizer"),
        ("engine", "max_grad_norm", 5.0, "call make_private again with another, for the optimizer"),
        ("engine", "clipping", "flat", "call make_private again with another, for the optimizer"),
        ("engine", "sample_rate", 0.5, "call make_private again with a DataLoader of another batch size"),
        ("engine", "expected_batch_size", 4, "call make_private again with a DataLoader of another batch size"),
        ("engine", "reproducible_seed", 4, "make another PrivacyEngine"),
        ("optimizer", "clipping", "automatic", "call make_private again with another"),
        ("optimizer", "low_pass", None, "call make_private again with another"),
        ("optimizer", "norm_method", "ghost", "call make_private again with another"),
        ("optimizer", "regulate_noise", True, "call make_private again with another"),
        ("optimizer", "shrinkage", None, "call make_private again with another"),
        ("optimizer", "phases", "B", "call optimizer.set_phases"),
    ],
)
def test_what_would_be_set_without_effect_is_refused(of: str, name: str, value: Any, remedy: str) -> None:
    engine = seeded()
    _, optimizer, loader = private_run(engine)
    holder = {"engine": engine, "optimizer": optimizer, "loader": loader}[of]
    with pytest.raises(AttributeError, match=rf"^'{name}' would be without effect here: {remedy}[^.]*\.$"):
        setattr(holder, name, value)
    assert not hasattr(holder, name)
    with pytest.raises(AttributeError, match=rf"^'{type(holder).__name__}' has no '{name}'\.$"):
        getattr(holder, name)


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("batch_size", 5, "call make_private again with a DataLoader that has it"),
        ("collate_fn", list, "call make_private again with a DataLoader that has it"),
        ("num_workers", 2, "call make_private again with a DataLoader that has it"),
        ("batch_sampler", [[1]], "batches are drawn by Poisson sampling, so give make_private a Subset"),
        ("sampler", range(5), "batches are drawn by Poisson sampling, so give make_private a Subset"),
        ("drop_last", True, "batches are drawn by Poisson sampling, so give make_private a Subset"),
    ],
)
def test_what_a_loader_shows_is_not_set(name: str, value: Any, remedy: str) -> None:
    _, _, loader = private_run(seeded())
    before = repr(getattr(loader, name)).partition(" at ")[0]
    with pytest.raises(AttributeError, match=rf"^'{name}' would be without effect here: {remedy}[^.]*\.$"):
        setattr(loader, name, value)
    assert repr(getattr(loader, name)).partition(" at ")[0] == before


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_grad_scaler_is_refused_before_anything_is_released(unscaled: bool) -> None:
    engine = seeded()
    model, private, loader = private_run(engine)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    x, y = next(loader.take(1))
    scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
    if unscaled:
        scaler.unscale_(private)
    with pytest.raises(RuntimeError, match="^GradScaler scales losses before clipping .*: leave it out"):
        scaler.step(private)
    assert engine.ledger.steps == 0
    private.zero_grad()
    train(model, private, [(x, y)])
    off = torch.amp.GradScaler("cpu", enabled=False)  # as scripts leave it where autocast is in bfloat16
    x, y = next(loader.take(1))
    off.scale(nn.functional.cross_entropy(model(x), y)).backward()
    off.step(private)
    off.update()
    assert engine.ledger.steps == 2
