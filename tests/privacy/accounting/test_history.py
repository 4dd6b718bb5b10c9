"""Steps of another history are told from as many of one's own."""

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lora_dp import Ledger, PrivacyEngine
from lora_dp.engine.optimizer import PrivateOptimizer
from lora_dp.privacy.accounting import PoissonGaussian
from lora_dp.privacy.accounting.history import History, Spent, read_runs
from tests.models import assert_refuses, mlp
from tests.support import make_private

EVENT = PoissonGaussian(1.0, 0.1)
ELSEWHERE = "lacks steps that this engine has taken, .* load it into a new engine before the first step, and sum"


def started(steps: int, engine: PrivacyEngine | None = None) -> tuple[PrivacyEngine, PrivateOptimizer]:
    engine = PrivacyEngine("rdp") if engine is None else engine
    optimizer = make_private(mlp(), batch_size=4, engine=engine, noise_multiplier=1.0)
    for _ in range(steps):
        optimizer.step_on_empty_batch()
    return engine, optimizer


def without(state: dict[str, Any]) -> dict[str, Any]:
    """As it was saved before runs had names."""
    groups = [
        {name: value for name, value in group.items() if name != "ledger_runs"}
        for group in state.get("param_groups", [])
    ]
    rest = {name: value for name, value in state.items() if name not in ("runs", "ledger_runs")}
    return {**rest, "param_groups": groups} if groups else rest


@pytest.mark.parametrize("own", [1, 3, 4])
def test_steps_of_ones_own_do_not_pass_for_those_of_the_saved_run(own: int) -> None:
    """The loading was forgotten at first: what was released since then would be left out."""
    before, _ = started(3)
    engine, optimizer = started(own)
    with pytest.raises(ValueError, match=ELSEWHERE):
        engine.load_state_dict(before.state_dict())
    assert engine.ledger.steps == own
    optimizer.step_on_empty_batch()
    assert engine.ledger.steps == own + 1


def test_a_model_of_another_run_is_not_trained_under_this_ledger() -> None:
    before, saved = started(3)
    engine, optimizer = started(5)
    optimizer.load_state_dict(saved.state_dict())
    assert_refuses(
        RuntimeError,
        "gone on from 3 private steps and the engine's ledger has 5, perhaps of another run",
        optimizer.step_on_empty_batch,
    )
    again, optimizer = started(0)
    optimizer.load_state_dict(saved.state_dict())
    again.load_state_dict(before.state_dict())
    optimizer.step_on_empty_batch()
    assert again.ledger.steps == 4


def test_nor_where_the_state_was_loaded_before_make_private() -> None:
    _, saved = started(3)
    engine, _ = started(5)
    model = mlp()
    plain = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    plain.load_state_dict(saved.state_dict())
    _, optimizer, _ = engine.make_private(
        model=model,
        optimizer=plain,
        data_loader=DataLoader(TensorDataset(torch.zeros(4)), batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    assert_refuses(RuntimeError, "perhaps of another run", optimizer.step_on_empty_batch)


def test_two_that_go_on_from_one_state_are_two() -> None:
    first, _ = started(3)
    early = first.state_dict()
    one, more = started(0)
    one.load_state_dict(early)
    other, _ = started(0)
    other.load_state_dict(early)
    for _ in range(4):
        more.step_on_empty_batch()
    make_private(mlp(), batch_size=4, engine=other, noise_multiplier=1.0).step_on_empty_batch()
    with pytest.raises(ValueError, match=ELSEWHERE):
        other.load_state_dict(one.state_dict())
    third, optimizer = started(0)
    third.load_state_dict(one.state_dict())
    assert third.ledger.steps == 7
    optimizer.step_on_empty_batch()
    third.load_state_dict(third.state_dict())
    assert_refuses(
        ValueError,
        "load the model and the optimizer alone, and keep the engine",
        lambda: third.load_state_dict(one.state_dict()),
    )


def test_an_earlier_point_of_the_same_run_is_gone_back_to_without_the_engine() -> None:
    engine, optimizer = started(2)
    saved = optimizer.state_dict()
    optimizer.step_on_empty_batch()
    optimizer.load_state_dict(saved)
    optimizer.step_on_empty_batch()
    assert engine.ledger.steps == 4


def test_states_that_were_saved_before_runs_had_names() -> None:
    before, saved = started(3)
    engine, optimizer = started(0)
    optimizer.load_state_dict(without(saved.state_dict()))
    assert_refuses(
        RuntimeError, "gone on from 3 private steps and the engine's ledger has 0", optimizer.step_on_empty_batch
    )
    engine.load_state_dict(without(before.state_dict()))
    optimizer.step_on_empty_batch()
    assert engine.ledger.steps == 4
    with pytest.raises(ValueError, match="lacks steps"):
        engine.load_state_dict(without(before.state_dict()))
    fresh = PrivacyEngine("rdp")
    fresh.load_state_dict(without(PrivacyEngine("rdp").state_dict()))
    assert fresh.ledger.steps == 0 and fresh.history.runs == []


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ([["a", 2]], "other steps than its 3"),
        ([["a", 3], ["b", 1]], "other steps than its 3"),
        ([], "other steps"),
        ([["a"]], "cannot be read"),
        (5, "cannot be read"),
        ([["a", "3"]], "cannot be read"),
    ],
)
def test_damaged_names_are_refused_and_change_nothing(runs: Any, words: str) -> None:
    before, saved = started(3)
    engine, optimizer = started(0)
    with pytest.raises(ValueError, match=words):
        engine.load_state_dict({**before.state_dict(), "runs": runs})
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict({**saved.state_dict(), "ledger_runs": runs})
    assert engine.ledger.steps == 0
    optimizer.step_on_empty_batch()


def test_runs_are_names_and_steps_in_order() -> None:
    ledger = Ledger()
    history = History(ledger)
    assert history.runs == [] and history.holds([])
    ledger.append(EVENT, 3)
    (first,) = history.runs
    assert first[1] == 3 and history.holds([(first[0], 2)]) and not history.holds([(first[0], 4)])
    assert not history.holds([("another", 2)]) and History(ledger).runs[0][0] != first[0]
    history.go_on_from(read_runs([list(first)], 3))
    assert history.runs == [first]
    ledger.append(EVENT, 2)
    assert history.runs[0] == first and history.runs[1][1] == 2 and history.runs[1][0] != first[0]
    assert history.holds([first]) and history.holds(history.runs) and not history.holds([(first[0], 5)])
    assert not history.holds([history.runs[1]]) and not history.holds([(first[0], 2), history.runs[1]])
    assert read_runs(None, 4) == [("", 4)] and read_runs(None, 0) == []


def test_the_ledger_of_an_engine_is_its_own() -> None:
    """Its optimizers write to it: another in its place would stay as it is."""
    engine, optimizer = started(2)
    saved = Ledger()
    saved.append(optimizer.event, 5)
    with pytest.raises(AttributeError, match=r"'ledger' is fixed, .* engine.load_state_dict"):
        engine.ledger = saved
    engine.ledger.load_state_dict(saved.state_dict())
    optimizer.step_on_empty_batch()
    assert engine.ledger.steps == 6


def test_what_was_spent_is_told_by_steps_and_by_runs() -> None:
    first, optimizer = started(2)
    before = Spent.of(first.state_dict())
    assert (before.ledger.steps, before.runs) == (2, first.history.runs)
    optimizer.step_on_empty_batch()
    after = first.history.spent
    assert after.continues(before)
    assert not before.continues(after)
    other, _ = started(5)  # as many steps and more, by another run
    assert not other.history.spent.continues(before)
    # The runs of the one with the steps of another kind
    other_steps = Ledger()
    other_steps.append(PoissonGaussian(2.0, 0.1), 3)
    assert not Spent(other_steps, after.runs).continues(before)
    with pytest.raises(KeyError):
        Spent.of({})
