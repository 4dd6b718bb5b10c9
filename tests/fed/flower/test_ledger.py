"""A node's own ledger: written before anything leaves it, and a budget that the server cannot stretch."""

import fcntl
import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from lora_dp.errors import TooFewClients
from lora_dp.fed.config import RunConfig
from lora_dp.fed.flower.ledger import ClientLedger, Refused
from lora_dp.fed.flower.server import FlowerEngine, connected
from lora_dp.fed.methods import get_method
from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.head_start import start_head
from lora_dp.privacy.accounting import Ledger, PoissonGaussian
from tests.fed.flower.loopback import LoopbackGrid
from tests.fed.small import TRAINING, plan_for

UNPROTECTED = "sends nothing that secret noise of its own does not protect"
TINY = {"clients": 2, "rounds": 3, "local_steps": 2, "batch_size": 16, "accountant": "rdp", "device": "cpu"}


@pytest.fixture(autouse=True)
def nobody_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """All nodes answer at once: a server that waits would do so for ever."""

    def pause(self: FlowerEngine) -> None:
        raise AssertionError("the server waits")

    monkeypatch.setattr(FlowerEngine, "_pause", pause)


def tiny(**options: Any) -> RunConfig:
    return RunConfig.from_flat({**TINY, **options})


def grid(ledger: Any, **budget: float) -> LoopbackGrid:
    return LoopbackGrid([{"partition-id": 0}, {"partition-id": 1, "ledger": str(ledger), **budget}])


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"epsilon": 8.0, "delta": 1e-5}, "must name ledger, epsilon and delta together"),
        ({"ledger": "/x", "epsilon": 8.0}, "must name ledger, epsilon and delta together"),
        ({"ledger": "/x", "epsilon": -1.0, "delta": 1e-5}, "a budget in its node-config that is none"),
        ({"ledger": "/x", "epsilon": 1.0, "delta": 2.0}, "a budget in its node-config that is none"),
        ({"ledger": "/x", "unit": "patient"}, "unit as example or client"),
        ({"unit": "client"}, "must name a ledger"),
    ],
)
def test_half_a_budget_is_none(node, words):
    with pytest.raises(Refused, match=words):
        ClientLedger.of_node(node)


def test_a_nodes_ledger_and_budget_are_those_of_its_config():
    """Flower takes numbers from a command line, too: as text."""
    assert ClientLedger.of_node({}) is None
    assert ClientLedger.of_node({"ledger": "/x"}) == ClientLedger(Path("/x"), "example")
    assert ClientLedger.of_node({"ledger": "/x", "unit": "client"}) == ClientLedger(Path("/x"), "client")
    for epsilon, delta in (("3", "1e-6"), (3, 1e-6)):
        found = ClientLedger.of_node({"ledger": "/x", "epsilon": epsilon, "delta": delta})
        assert found == ClientLedger(Path("/x"), "example", 3.0, 1e-6) and isinstance(found.epsilon, float)
    for epsilon, delta in ((1, "1"), ("0", 1e-6), ("much", 1e-6)):
        with pytest.raises(Refused, match="a budget in its node-config that is none"):
            ClientLedger.of_node({"ledger": "/x", "epsilon": epsilon, "delta": delta})
    limited = ClientLedger(Path("/x"), "client").limited(8.0, 1e-5)
    assert limited == ClientLedger(Path("/x"), "client", 8.0, 1e-5, written=False)


@pytest.mark.parametrize(
    ("changes", "reproducible", "words"),
    [
        ({}, True, UNPROTECTED),
        ({"epsilon": None}, False, UNPROTECTED),
        ({"mechanism": "as-released"}, False, UNPROTECTED),
        ({"unit": "client"}, False, UNPROTECTED),
        ({"unit": "client", "noise_by": "client"}, False, "for the unit example, but the run protects the unit client"),
    ],
)
def test_what_noise_of_its_own_does_not_protect_is_not_spent(tmp_path, changes, reproducible, words):
    plan, ledger = plan_for(get_method("dp-lora"), TRAINING, **changes), ClientLedger(tmp_path / "ledger.json")
    for refuse in (ledger.check, lambda plan, **how: ledger.spend(plan, PoissonGaussian(1.5, 0.25), **how)):
        with pytest.raises(Refused, match=words):
            refuse(plan, reproducible=reproducible)
    assert not ledger.path.exists()


def test_a_budget_is_spent_to_its_last_bit_and_the_owner_is_told(tmp_path, caplog):
    plan, event = plan_for(get_method("dp-lora"), TRAINING), PoissonGaussian(1.5, 0.25)
    once = Ledger()
    once.append(event, plan.releases_per_turn)
    reached = once.epsilon(1e-5, "rdp")
    below = ClientLedger(tmp_path / "below.json", "example", math.nextafter(reached, 0), 1e-5)
    with pytest.raises(Refused, match="no budget left"):
        below.spend(plan, event, reproducible=False)
    ClientLedger(tmp_path / "none.json").spend(plan, event, reproducible=False)
    assert not below.path.exists() and caplog.text == ""
    ClientLedger(tmp_path / "just.json", "example", reached, 1e-5).spend(plan, event, reproducible=False)
    assert f"is at ε = {reached:.4g} of {reached:g} over all runs, at δ = 1e-05." in caplog.text
    assert Ledger.load(tmp_path / "just.json").entries == once.entries


def test_one_process_at_a_time_spends(tmp_path):
    """Two that read the same file would write one turn over the other."""
    plan, event, path = plan_for(get_method("dp-lora"), TRAINING), PoissonGaussian(1.5, 0.25), tmp_path / "ledger.json"
    ledger = ClientLedger(path)
    spending = threading.Thread(target=lambda: ledger.spend(plan, event, reproducible=False))
    with (tmp_path / "ledger.json.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        spending.start()
        spending.join(0.3)
        assert spending.is_alive() and not path.exists()
    spending.join(60)
    assert Ledger.load(path).steps == plan.releases_per_turn


@pytest.mark.slow
def test_it_holds_what_the_server_counts_too(tmp_path):
    path = tmp_path / "ledger.json"
    federation = connected(tiny(), grid(path, epsilon=8.0, delta=1e-5))
    for done in (1, 2, 3):
        assert federation.run_round().participants == [0, 1]
        ledger = Ledger.load(path)
        assert ledger.entries == ((federation.account.event(1), 2 * done),)
        assert ledger.epsilon(1e-5, "rdp") == federation.account.epsilon(1) <= 8


@pytest.mark.slow
def test_it_is_on_the_disk_before_the_client_trains(tmp_path, monkeypatch):
    path = tmp_path / "ledger.json"
    counted = []

    def crash(*_: Any, **__: Any) -> None:
        counted.append(Ledger.load(path).steps if path.exists() else 0)
        raise KeyboardInterrupt

    federation = connected(tiny(), grid(path))
    monkeypatch.setattr(Trainer, "train", crash)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            federation.run_round([1])
    assert counted == [2, 4] and Ledger.load(path).steps == 4


@pytest.mark.slow
def test_a_server_that_asks_for_more_than_the_clients_own_budget_is_refused(tmp_path):
    path = tmp_path / "ledger.json"
    # The server's word: ε = 8 for this run. The client's: 3 for all its data, ever.
    federation = connected(tiny(min_clients=1), grid(path, epsilon=3.0, delta=1e-5))
    result = federation.run_round()
    assert result.participants == [0]
    assert result.failed == [{"client": 1, "reason": "has no budget left: this turn would lead above its own ε of 3"}]
    assert not path.exists()


@pytest.mark.slow
def test_it_adds_up_over_runs(tmp_path):
    path = tmp_path / "ledger.json"
    for _ in range(2):
        federation = connected(tiny(), grid(path, epsilon=8.0, delta=1e-5))
        failed = [federation.run_round().failed for _ in range(3)]
    # The budget was planned for one run: the second gets nothing.
    assert all(entry[0]["client"] == 1 and "no budget left" in entry[0]["reason"] for entry in failed)
    assert Ledger.load(path).steps == 6


@pytest.mark.slow
@pytest.mark.parametrize("accountant", ["rdp", "pld"])
@pytest.mark.parametrize("options", [{}, {"method": "deer"}, {"clients": 3, "clients_per_round": 2, "rounds": 3}])
def test_without_a_budget_there_is_room_for_a_whole_run_and_not_for_a_second(tmp_path, options, accountant):
    path = tmp_path / "ledger.json"
    options = {"accountant": accountant, **options}
    nodes = [{"partition-id": 0}, {"partition-id": 1, "ledger": str(path)}, {"partition-id": 2}]
    for seed, room in ((0, True), (1, False)):
        config = tiny(**options, seed=seed)
        federation = connected(config, LoopbackGrid(nodes[: config.federation.clients]))
        for _ in range(federation.plan.participations):
            failed = federation.run_round([0, 1]).failed
            assert [entry["client"] for entry in failed] == ([] if room else [1])
            assert room or "for all runs together" in failed[0]["reason"]
        ledger = Ledger.load(path)
        assert ledger.steps == federation.plan.planned_releases and 7 < ledger.epsilon(1e-5, accountant) <= 8


@pytest.mark.slow
def test_a_run_that_is_begun_anew_ends_where_its_plan_does(tmp_path):
    """As after a crash of the server, when nobody resumes: the node has answered a round, the new server asks all."""
    path = tmp_path / "ledger.json"
    connected(tiny(epsilon=2.0), grid(path)).run_round()
    federation = connected(tiny(epsilon=2.0), grid(path))
    answered = [federation.run_round().participants for _ in range(3)]
    assert answered == [[0, 1], [0, 1], [0]]
    assert Ledger.load(path).epsilon(1e-5, "rdp") <= 2


@pytest.mark.parametrize(
    "options", [{"epsilon": "none"}, {"reproducible": True}], ids=["without-privacy", "noise-from-a-public-seed"]
)
def test_a_client_with_a_ledger_sends_nothing_unprotected(tmp_path, options):
    path = tmp_path / "ledger.json"
    federation = connected(tiny(**options), grid(path))
    with pytest.raises(TooFewClients, match=UNPROTECTED):
        federation.run_round([1])
    assert not path.exists()


def test_nor_to_a_server_that_adds_the_noise(tmp_path):
    path = tmp_path / "ledger.json"
    federation = connected(tiny(unit="client", noise_by="server"), grid(path))
    [left_out] = federation.run_round([1]).failed
    assert left_out["client"] == 1 and UNPROTECTED in left_out["reason"] and not path.exists()


@pytest.mark.slow
def test_a_client_that_noises_its_whole_update_counts_one_release(tmp_path):
    path = tmp_path / "ledger.json"
    nodes = LoopbackGrid([{"partition-id": 0}, {"partition-id": 1, "ledger": str(path), "unit": "client"}])
    federation = connected(tiny(unit="client", noise_by="client"), nodes)
    federation.run_round()
    assert Ledger.load(path).entries == ((federation.plan.event(1), 1),)


@pytest.mark.slow
@pytest.mark.parametrize(("kept", "asked"), [("client", "example"), ("example", "client")])
def test_a_ledger_is_of_one_unit(tmp_path, kept, asked):
    """What hides an example leaves the client in sight, and what hides a client at σ an example at σ/2."""
    path = tmp_path / "ledger.json"
    nodes = LoopbackGrid([{"partition-id": 0}, {"partition-id": 1, "ledger": str(path), "unit": kept}])
    noise = {} if asked == "example" else {"unit": "client", "noise_by": "client"}
    [left_out] = connected(tiny(**noise), nodes).run_round().failed
    assert left_out["client"] == 1 and f"for the unit {kept}" in left_out["reason"] and not path.exists()


def test_the_file_knows_its_unit_too(tmp_path):
    plan = connected(tiny(), grid(tmp_path / "other")).plan
    path = tmp_path / "ledger.json"
    ClientLedger(path).spend(plan, PoissonGaussian(1.0, 0.02), reproducible=False)
    before = path.read_text()
    whole = replace(plan, unit="client", noise_by="client")
    with pytest.raises(Refused, match="another file"):
        ClientLedger(path, "client").spend(whole, PoissonGaussian(1.0, 1.0), reproducible=False)
    assert path.read_text() == before


@pytest.mark.slow
def test_a_damaged_ledger_stops_the_client(tmp_path):
    path = tmp_path / "ledger.json"
    path.write_text("{")
    federation = connected(tiny(), grid(path))
    assert federation.run_round().failed == [{"client": 1, "reason": "raised ValueError"}]
    assert path.read_text() == "{"


def test_the_ledger_composes_events_of_different_runs(tmp_path):
    plan = connected(tiny(), grid(tmp_path / "other")).plan
    ledger = ClientLedger(tmp_path / "ledger.json", "example", 4.0, 1e-5)
    events = [PoissonGaussian(1.0, 0.02), PoissonGaussian(2.0, 0.01)]
    for event in events:
        ledger.spend(plan, event, reproducible=False)
    assert Ledger.load(ledger.path).entries == tuple((event, plan.releases_per_turn) for event in events)
    with pytest.raises(Refused, match="no budget left"):
        ledger.spend(replace(plan, steps=10**5), events[0], reproducible=False)
    assert Ledger.load(ledger.path).steps == 2 * plan.releases_per_turn


@pytest.mark.slow
def test_a_ledger_is_plain_json(tmp_path):
    federation = connected(tiny(), grid(tmp_path / "ledger.json"))
    federation.run_round()
    [entry] = json.loads((tmp_path / "ledger.json").read_text())["entries"]
    assert entry["count"] == 2 and entry["noise_multiplier"] > 0


# Feature sums


def summed_ledger(path: Path, **changes: Any) -> tuple[Any, ClientLedger]:
    changes = {"sums_share": 0.1, "batch_size": 1000, **changes}
    plan = plan_for(get_method("dp-lora"), TRAINING, **changes)
    return plan, ClientLedger(path, plan.unit).of_run("0" * 64)


@pytest.mark.parametrize("whole", [{}, {"unit": "client", "noise_by": "client"}])
def test_sums_are_released_once_and_take_no_steps_place(tmp_path, whole):
    """Nor the reverse: neither all steps nor the sums leave room for more of the other."""
    plan, ledger = summed_ledger(tmp_path / "ledger.json", **whole)
    sums, event = plan.sums_event, plan.event(20)
    ledger.spend(plan, sums, reproducible=False, sums=True)
    with pytest.raises(Refused, match="has released all that this run's plan accounts for"):
        ledger.spend(plan, sums, reproducible=False, sums=True)
    for _ in range(plan.planned_releases // plan.releases_per_turn):
        ledger.spend(plan, event, reproducible=False)
    for again in (False, True):
        with pytest.raises(Refused, match="has released all that this run's plan accounts for"):
            ledger.spend(plan, sums if again else event, reproducible=False, sums=again)
    found = Ledger.load(ledger.path)
    assert found.entries == ((sums, 1), (event, plan.planned_releases))
    assert 8 * 0.998 < found.epsilon(1e-5, "rdp") <= 8
    runs = json.loads(ledger.path.read_text())["node"]["runs"]
    assert runs == {"0" * 64: plan.planned_releases, f"{'0' * 64} sums": 1}


def test_steps_first_leave_room_for_the_sums(tmp_path):
    plan, ledger = summed_ledger(tmp_path / "ledger.json")
    for _ in range(4):
        ledger.spend(plan, plan.event(20), reproducible=False)
    ledger.spend(plan, plan.sums_event, reproducible=False, sums=True)
    assert Ledger.load(ledger.path).epsilon(1e-5, "rdp") <= 8


def test_sums_beyond_the_nodes_own_budget_are_refused(tmp_path):
    plan, ledger = summed_ledger(tmp_path / "ledger.json", sums_share=0.9)
    with pytest.raises(Refused, match="has no budget left"):
        replace(ledger, epsilon=3.0, delta=1e-5).spend(plan, plan.sums_event, reproducible=False, sums=True)
    assert not ledger.path.exists()


SUMS = {"method": "head-only", "features": "unit", "sums_share": 0.1, "batch_size": 4096}


@pytest.mark.slow
def test_a_nodes_ledger_has_the_sums_before_they_are_computed_and_holds_what_the_server_counts(tmp_path, monkeypatch):
    path = tmp_path / "ledger.json"
    federation = connected(tiny(**SUMS, rounds=2), grid(path, epsilon=8.0, delta=1e-5))
    train, seen = Trainer.train, []

    def noted(self: Trainer, client: int, examples: Any, task: Any, *rest: Any) -> Any:
        if client == 1:
            seen.append((task.sums, Ledger.load(path).steps if path.exists() else 0))
        return train(self, client, examples, task, *rest)

    monkeypatch.setattr(Trainer, "train", noted)
    start_head(federation)
    sums = federation.plan.sums_event
    assert Ledger.load(path).entries == ((sums, 1),)
    [again] = federation.engine.train([(1, replace(federation.server.task(0, 0, 0), sums=True))], lambda: None)
    assert "has released all that this run's plan accounts for" in str(again.failure)
    for _ in range(2):
        assert federation.run_round().participants == [0, 1]
    assert seen == [(True, 1), (False, 3), (False, 5)]
    found = Ledger.load(path)
    assert found.entries == ((sums, 1), (federation.account.event(1), 4))
    assert 8 * 0.998 < found.epsilon(1e-5, "rdp") == federation.account.epsilon(1) <= 8


@pytest.mark.slow
def test_a_node_refuses_sums_that_the_run_does_not_have(tmp_path):
    """Nothing is opened in the ledger for them."""
    path = tmp_path / "ledger.json"
    federation = connected(tiny(), grid(path))
    task = replace(federation.server.task(0, 0, 4), sums=True)
    [reply] = federation.engine.train([(1, task)], lambda: None)
    assert reply.failure == "was asked for feature sums, which the run does not have, or not there"
    summed = connected(tiny(**SUMS), grid(path))
    for changes in ({"round": 1}, {"round": 2}):
        task = replace(summed.server.task(0, 0, 0), sums=True, **changes)
        [reply] = summed.engine.train([(1, task)], lambda: None)
        assert reply.failure == "was asked for feature sums, which the run does not have, or not there"
    assert not path.exists()
