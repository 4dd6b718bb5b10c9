"""The account of all clients: the log written ahead, and the ε that it adds up to."""

import json
import math
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_dp.fed.methods import get_method
from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.ledgers import LOG, Account, AheadLog, LogError
from lora_dp.fed.rounds.privacy_plan import UNITS
from lora_dp.privacy.accounting import Ledger, PrivacyBudgetExceeded
from tests.fed.chained import forge, forget, hold
from tests.fed.small import TRAINING, make_federation, plan_for

SIZES = (12, 20, 9)
MANY = tuple(range(41, 50))  # more kinds of clients than are worked out one by one where it must be quick


def account(method: str = "dp-lora", sizes: Sequence[int] = SIZES, **changes: Any) -> Account:
    return Account(plan_for(get_method(method), TRAINING, clients=len(sizes), **changes), sizes)


def log(folder: Path, *rounds: tuple[int, list[int]], reproducible: bool = False, **changes: Any) -> AheadLog:
    found = AheadLog(folder / LOG)
    found.begin(account(**changes), reproducible=reproducible)
    for number, clients in rounds:
        found.append(number, clients)
    return found


def counts(found: Account) -> list[int]:
    return [found.releases(client) for client in range(len(found.sizes))]


def replayed(found: AheadLog, rounds_done: int = 0, *, reproducible: bool = False, **changes: Any) -> list[int]:
    fresh = account(**changes)
    found.replay(fresh, rounds_done=rounds_done, reproducible=reproducible)
    return counts(fresh)


# ε


def subsampled_gaussian_rdp(noise: float, rate: float, order: int) -> float:
    """Rényi divergence of one Poisson-subsampled Gaussian step at an integer order (arXiv 1908.10530, section 3.3)."""
    terms = [
        math.lgamma(order + 1)
        - math.lgamma(k + 1)
        - math.lgamma(order - k + 1)
        + k * math.log(rate)
        + (order - k) * math.log1p(-rate)
        + k * (k - 1) / (2 * noise**2)
        for k in range(order + 1)
    ]
    return float(np.logaddexp.reduce(terms)) / (order - 1)


def oracle(noise: float, rate: float, steps: int, delta: float = 1e-5) -> float:
    """ε from Rényi divergences at integer orders (Canonne, Kamath and Steinke 2020, arXiv 2004.00010, prop. 12)."""
    return min(
        steps * subsampled_gaussian_rdp(noise, rate, order)
        + math.log1p(-1 / order)
        - math.log(delta * order) / (order - 1)
        for order in range(2, 200)
    )


def test_each_clients_epsilon_is_that_of_its_steps():
    found = account()
    assert counts(found) == [0, 0, 0] and found.epsilon(0) == found.worst_epsilon() == 0
    for clients in ([0, 1], [0], [0, 2]):
        found.add_round(clients)
    assert counts(found) == [9, 3, 3]
    for client, steps in enumerate((9, 3, 3)):
        event = found.event(client)
        expected = oracle(event.noise_multiplier, event.sample_rate, steps)
        # The oracle has integer orders only, so that it is an upper bound that lies a little higher.
        assert expected * 0.97 <= found.epsilon(client) <= expected * (1 + 1e-9)
    assert found.worst_epsilon() == max(found.epsilon(client) for client in range(3))


@pytest.mark.parametrize("method", ["dp-lora", "deer"])
def test_a_budget_is_spent_to_the_last_round_and_never_more(method):
    found = account(method, participations=3)
    for index in range(3):
        assert found.eligible() == [0, 1, 2], index
        found.add_round([0, 1, 2])
    assert found.eligible() == []
    assert all(8 * 0.998 < found.epsilon(client) <= 8 for client in range(3))


def test_only_who_has_room_is_eligible():
    found = account(participations=2)
    found.add_round([1])
    found.add_round([1, 2])
    assert found.eligible() == [0, 2]
    assert account(participations=1, epsilon=None).eligible() == [0, 1, 2]


def test_without_privacy_nobody_runs_out_and_epsilon_is_infinite():
    found = account(participations=1, epsilon=None)
    for _ in range(5):
        found.add_round([0])
    assert found.eligible() == [0, 1, 2]
    assert found.epsilon(0) == found.worst_epsilon() == math.inf and found.epsilon(1) == 0
    assert found.report()["clients"][0]["epsilon"] is None


def test_with_noise_by_the_server_there_is_one_account_for_all():
    found = account(unit="client", noise_by="server", client_rate=0.5, rounds=3, delta=0.01)
    for clients in ([], [2], [0, 1, 2]):
        assert found.eligible() == [0, 1, 2]
        found.add_round(clients)
    assert counts(found) == [3, 3, 3] and found.eligible() == []
    event = found.event(0)
    assert event.sample_rate == 0.5
    assert found.worst_epsilon() == pytest.approx(oracle(event.noise_multiplier, 0.5, 3, 0.01), rel=0.03)
    [entry] = found.report()["clients"]
    assert (entry["client"], entry["steps"]) == ("all", 3)


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_the_worst_of_many_clients(accountant):
    """Quickly it may be an upper bound, but never less than the truth nor more than the budget."""
    sizes = [*MANY, 49, 41]
    found = account(sizes=sizes, participations=5, accountant=accountant)
    rng = np.random.default_rng(0)
    for _ in range(4):
        found.add_round(rng.choice(len(sizes), 5, replace=False))
    true = max(found.epsilon(client) for client in range(len(sizes)))
    assert found.worst_epsilon() == true
    assert true <= found.worst_epsilon(exact=False) <= 8
    found.add_round(range(len(sizes)))
    assert true < found.worst_epsilon() <= found.worst_epsilon(exact=False) <= 8


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_where_each_has_spent_its_budget_the_quick_bound_is_the_budget(accountant):
    found = account(sizes=MANY, participations=5, accountant=accountant)
    for _ in range(5):
        found.add_round(range(len(MANY)))
    assert 8 * 0.998 < found.worst_epsilon(exact=False) <= 8


def test_the_quick_bound_tells_that_one_client_has_spent_more_than_its_budget():
    found = account(sizes=MANY, participations=5)
    for _ in range(4):
        found.add_round([3])
    # By this accountant the bound is what it bounds.
    assert found.worst_epsilon(exact=False) == found.worst_epsilon() == found.epsilon(3)
    for _ in range(2):
        found.add_round([3])
    assert found.worst_epsilon(exact=False) == found.worst_epsilon() == found.epsilon(3) > 8


def test_without_privacy_the_worst_of_many_is_infinite_however_quickly():
    found = account(sizes=MANY, epsilon=None)
    found.add_round([3])
    assert found.worst_epsilon(exact=False) == math.inf


def test_what_a_report_and_the_terms_say_is_what_was_planned():
    found = account(participations=3, delta=2e-5)
    noise = [found.event(client).noise_multiplier for client in range(3)]
    rates = [found.event(client).sample_rate for client in range(3)]
    assert sorted(found.noise_multipliers()) == sorted(noise) and len(set(noise)) == 3
    assert (
        found.report().items()
        >= {
            "unit": UNITS["example"],
            "delta": 2e-5,
            "accountant": "rdp",
            "target_epsilon": 8.0,
            "mechanism": "sound",
            "guarantee": None,
            "worst_epsilon": 0.0,
        }.items()
    )
    assert account(epsilon=None).report()["unit"] is None
    assert found.terms() == {
        "unit": "example",
        "delta": 2e-5,
        "epsilon": 8.0,
        "mechanism": "sound",
        "noise_by": None,
        "rounds": 4,
        "releases_per_round": 3,
        "planned_releases": 9,
        "sizes": [12, 20, 9],
        "clients": 3,
        "events": [[noise[client], rates[client]] for client in (2, 0, 1)],
        "options": None,
    }
    whole = account(unit="client", noise_by="client").terms()
    assert (whole["noise_by"], whole["sizes"]) == ("client", None)


def test_of_a_few_kinds_of_clients_the_worst_is_exact_where_a_bound_would_do():
    found = account(accountant="pld")
    found.add_round([0, 1])
    assert found.worst_epsilon(exact=False) == found.worst_epsilon() == max(found.epsilon(i) for i in range(3))


def test_the_rate_that_is_accounted_is_never_below_the_one_that_is_drawn_with():
    """Clients that are nearly alike share one rate, so that a thousand sizes need some hundred calibrations."""
    plan = plan_for(get_method("dp-lora"), TRAINING)
    rates = {size: plan.sample_rate(size) for size in range(1, 3000)}
    for size, rate in rates.items():
        drawn = min(TRAINING.batch_size, size) / size
        assert drawn <= rate <= min(1, drawn * 1.04)
    assert len(set(rates.values())) < 300


def test_the_report_holds_ledgers_that_can_be_loaded():
    found = account()
    found.add_round([0, 2])
    report = json.loads(json.dumps(found.report(), allow_nan=False))
    assert [client["steps"] for client in report["clients"]] == [3, 0, 3]
    assert report["worst_epsilon"] == found.worst_epsilon()
    for index, client in enumerate(report["clients"]):
        ledger = Ledger()
        ledger.load_state_dict(client["ledger"])
        assert ledger.steps == client["steps"] == found.releases(index)
        assert ledger.epsilon(1e-5, "rdp") == client["epsilon"]
    assert [client["examples"] for client in report["clients"]] == list(SIZES)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, 10**8 + 1])
def test_a_size_that_no_client_has_is_refused(size):
    with pytest.raises(ValueError, match="client 1 announces .* as its number of examples"):
        account(sizes=(12, size, 9))


# The log


def test_the_log_says_which_format_it_has(tmp_path):
    log(tmp_path)
    head = json.loads((tmp_path / LOG).read_text())
    assert (head["format"], head["version"]) == ("lora-dp log", 3)


def test_the_log_counts_every_round_that_was_begun(tmp_path):
    found = log(tmp_path, (1, [0, 1]), (2, [1, 2]), (2, [0]), (3, []))
    assert (tmp_path / LOG).read_text().count("\n") == 5
    assert replayed(found) == [6, 6, 3]


def test_a_round_done_again_with_the_same_bits_counts_once(tmp_path):
    found = log(tmp_path, (1, [0, 1]), (2, [0, 1]), (2, [0, 1]), (3, [2]), reproducible=True)
    assert replayed(found, 3, reproducible=True) == [6, 6, 3]
    # From the checkpoint of round 1, rounds 2 and 3 are going to be done again.
    assert replayed(found, 1, reproducible=True) == [3, 3, 0]
    assert replayed(found, 0, reproducible=True) == [0, 0, 0]


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"rounds": 40, "participations": 40}, "rounds"),
        ({"epsilon": 3.0}, "epsilon"),
        ({"delta": 1e-6}, "delta"),
        ({"sizes": (12, 21, 9)}, "sizes"),
        ({"unit": "client"}, "unit"),
        ({"reproducible": True}, "reproducible"),
        ({"epsilon": None}, "epsilon"),
    ],
)
def test_what_was_released_on_other_terms_is_not_counted_on_these(tmp_path, changes, name):
    """More rounds from an edited config.yaml, say: past releases had less noise than the new plan has."""
    found = log(tmp_path, (1, [0, 1]))
    with pytest.raises(ValueError, match=rf"begun on other terms \(.*{name}.* differ\).*restore its config.yaml"):
        replayed(found, **changes)
    assert replayed(found) == [3, 3, 0]


def test_the_last_bit_of_a_calibration_is_no_other_term(tmp_path):
    found = log(tmp_path, (1, [0]))
    calibrated_again(tmp_path / LOG, 1 + 1e-13)
    assert replayed(found) == [3, 0, 0]
    # What no two machines differ by is another noise.
    calibrated_again(tmp_path / LOG, 1 + 1e-8)
    with pytest.raises(LogError, match=r"other terms \(events differ\)"):
        replayed(found)


def calibrated_again(path: Path, factor: float) -> None:
    """Multiplies the noise of a log's terms."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    for entry in entries:
        del entry["digest"]
    events = entries[0]["terms"]["events"]
    entries[0]["terms"]["events"] = [[noise * factor, rate] for noise, rate in events]
    forget(path)
    forge(path, entries)


def test_no_log_is_no_release(tmp_path):
    assert replayed(AheadLog(tmp_path / LOG)) == [0, 0, 0]


@pytest.mark.parametrize("length", range(0, 26, 5))
def test_a_torn_last_line_was_no_round_and_spoils_none(tmp_path, length):
    found = log(tmp_path, (1, [0, 1]), (2, [1, 2]))
    content = (tmp_path / LOG).read_bytes()
    end = content[:-1].rindex(b"\n") + 1
    (tmp_path / LOG).write_bytes(content[: end + length])
    # A crash cannot have come so early: the line was held.
    with pytest.raises(LogError, match="it ends before line 3 of 3.*do not go on"):
        replayed(found)
    hold(tmp_path / LOG, 2)
    assert replayed(found) == [3, 3, 0]
    found.append(2, [0])
    assert replayed(found) == [6, 3, 0]


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"round":2,"clients":[1,2]\x00',
        b'{"round":2,"clients":[1,',
        b"\x00" * 27,
        b'{"round":2}',
        b"[2, [1, 2]]",
        b"",
        b'{"round":2,"clients":7}',
        b'{"round":"x","clients":[1]}',
        b'{"round":0,"clients":[1]}',
    ],
)
def test_a_damaged_line_inside_is_refused(tmp_path, damaged):
    for reproducible in (False, True):
        forget(tmp_path / LOG)
        log(tmp_path, (1, [0, 1]), (2, [1, 2]), (3, [0]), reproducible=reproducible)
        content = (tmp_path / LOG).read_bytes().split(b"\n")
        (tmp_path / LOG).write_bytes(b"\n".join([*content[:2], damaged, *content[3:]]))
        with pytest.raises(ValueError, match="line 3 is damaged.*[Rr]estore it from a backup; do not go on"):
            replayed(AheadLog(tmp_path / LOG), reproducible=reproducible)


@pytest.mark.parametrize(
    "head", [{}, {"format": "lora-dp log", "version": 3}, {"format": "lora-dp log", "version": 3, "terms": [1]}]
)
def test_a_whole_chain_that_begins_with_no_terms_is_damaged(tmp_path, head):
    forge(tmp_path / LOG, [head, {"round": 1, "clients": [0]}])
    with pytest.raises(LogError, match="line 1 is damaged.*do not go on"):
        replayed(AheadLog(tmp_path / LOG))


@pytest.mark.parametrize(
    "wrong",
    [
        {"round": 3, "clients": [0]},
        {"round": 0, "clients": [0]},
        {"round": "x", "clients": [0]},
        {"clients": [0]},
        {"round": 2, "clients": 7},
        {"round": 2, "clients": ["a"]},
        {"round": 2, "clients": [None]},
    ],
)
def test_a_whole_chain_with_a_line_that_is_no_round_in_its_turn_is_damaged(tmp_path, wrong):
    log(tmp_path)
    head = json.loads((tmp_path / LOG).read_text())
    del head["digest"]
    forge(tmp_path / LOG, [head, {"round": 1, "clients": [0]}, {"round": 2, "clients": [1]}])
    assert replayed(AheadLog(tmp_path / LOG)) == [3, 3, 0]
    forge(tmp_path / LOG, [head, {"round": 1, "clients": [0]}, wrong])
    with pytest.raises(LogError, match="line 3 is damaged.*do not go on"):
        replayed(AheadLog(tmp_path / LOG))
    forge(tmp_path / LOG, [head, {"round": 2, "clients": [0]}])
    with pytest.raises(LogError, match="line 2 is damaged.*do not go on"):
        replayed(AheadLog(tmp_path / LOG))


def test_a_log_without_digests_is_gone_on_with_by_the_version_that_wrote_it(tmp_path):
    (tmp_path / LOG).write_text(json.dumps({"terms": account().terms()}) + "\n")
    with pytest.raises(LogError, match="written by an earlier lora-dp, without digests"):
        replayed(AheadLog(tmp_path / LOG))


def test_missing_lines_are_refused(tmp_path):
    found = log(tmp_path, (1, [0]), (2, [0]), (3, [0]))
    content = (tmp_path / LOG).read_bytes().splitlines(keepends=True)
    (tmp_path / LOG).write_bytes(content[0] + content[1] + content[3])
    with pytest.raises(ValueError, match="line 3 is damaged"):
        replayed(found)
    (tmp_path / LOG).write_bytes(b"".join(content[1:]))
    with pytest.raises(ValueError, match="line 1 is damaged"):
        replayed(found)
    (tmp_path / LOG).write_bytes(b"".join(content[:3]))
    with pytest.raises(ValueError, match="ends before line 4 of 4"):
        replayed(found, 2)
    hold(tmp_path / LOG, 3)
    assert replayed(found, 2) == [6, 0, 0]
    with pytest.raises(ValueError, match="ends before round 3"):
        replayed(found, 3)
    (tmp_path / LOG).unlink()
    with pytest.raises(ValueError, match="ends before line 1 of 3"):
        replayed(found, 1)
    assert not (tmp_path / LOG).exists()
    forget(tmp_path / LOG)
    with pytest.raises(ValueError, match="ends before round 1"):
        replayed(found, 1)


@pytest.mark.parametrize("client", [-1, 3])
def test_the_log_of_another_run_is_refused(tmp_path, client):
    with pytest.raises(ValueError, match="names clients that this run does not have"):
        replayed(log(tmp_path, (1, [0]), (2, [1, client])))


def test_the_log_is_on_the_disk_before_anybody_trains(tmp_path, monkeypatch):
    """Line written, file synchronised, its name in the folder too: then the first client begins."""
    federation = make_federation("deer")
    federation.log = AheadLog(tmp_path / LOG)
    federation.log.begin(federation.account, reproducible=True)
    events: list[str] = []
    fsync, train = os.fsync, Trainer.train

    def watched_fsync(number: int) -> None:
        folder = stat.S_ISDIR(os.fstat(number).st_mode)
        held = tmp_path / f"{LOG}.heads"
        if os.path.samestat(os.fstat(number), os.stat(held)):
            events.append(f"{held.read_bytes().count(10)} held")
        else:
            assert os.path.samestat(os.fstat(number), os.stat(tmp_path if folder else tmp_path / LOG))
            events.append("folder" if folder else f"{(tmp_path / LOG).read_bytes().count(10)} lines")
        fsync(number)

    def watched_train(*args: Any, **kwargs: Any) -> Any:
        events.append("train")
        return train(*args, **kwargs)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Trainer, "train", watched_train)
    federation.run_round()
    federation.run_round([1])
    assert events == ["2 lines", "2 held", *["train"] * 6, "3 lines", "3 held", *["train"] * 2]
    rounds = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()[1:]]
    assert [{**entry, "digest": None} for entry in rounds] == [
        {"round": 1, "clients": [0, 1, 2], "digest": None},
        {"round": 2, "clients": [1], "digest": None},
    ]


def test_who_was_drawn_in_secret_is_not_in_the_log(tmp_path):
    federation = make_federation(
        "dp-lora", unit="client", noise_by="server", client_rate=0.5, delta=0.01, weighting="equal"
    )
    federation.log = AheadLog(tmp_path / LOG)
    federation.log.begin(federation.account, reproducible=False)
    for _ in range(3):
        assert federation.run_round().participants is None
    terms, *rounds = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [entry["clients"] for entry in rounds] == [[]] * 3
    # Nor how many examples anybody has.
    assert terms["terms"]["sizes"] is None and len(terms["terms"]["events"]) == 1
    fresh = Account(federation.plan, SIZES)
    federation.log.replay(fresh, rounds_done=3, reproducible=False)
    assert fresh.releases(0) == federation.account.releases(0) == 3


def test_a_client_without_room_takes_no_part(tmp_path):
    """After a resumption too: the releases that a crash lost are spent."""
    federation = make_federation("dp-lora", participations=2, rounds=2, reproducible=False)
    federation.log = log(tmp_path, (1, [0]), (1, [0, 1]), participations=2, rounds=2)
    federation.log.replay(federation.account, rounds_done=0, reproducible=False)
    before = (tmp_path / LOG).read_bytes()
    assert federation.draw() == [1, 2]
    with pytest.raises(PrivacyBudgetExceeded, match="Client 0 has spent its budget"):
        federation.run_round([0, 1])
    assert (tmp_path / LOG).read_bytes() == before
    assert federation.run_round().participants == [1, 2]
    assert federation.run_round().participants == [2]
    with pytest.raises(PrivacyBudgetExceeded, match="No client has budget left"):
        federation.run_round()
    assert counts(federation.account) == [6, 6, 6]
    assert federation.account.worst_epsilon() <= 8


def test_a_round_that_ends_in_the_middle_counts(tmp_path):
    """What clients before the interruption have sent has left."""
    federation = make_federation("dp-lora")
    federation.log = log(tmp_path)

    def interrupt() -> None:
        raise KeyboardInterrupt

    state = dict(federation.server.state)
    with pytest.raises(KeyboardInterrupt):
        federation.run_round(on_step=interrupt)
    assert counts(federation.account) == [3, 3, 3]
    assert federation.log.rounds_begun() == 1
    assert replayed(federation.log) == [3, 3, 3]
    assert federation.rounds_done == 0
    assert all(tensor.equal(federation.server.state[name]) for name, tensor in state.items())


def test_participants_cannot_be_named_where_the_secret_draw_amplifies():
    """Two clients who are there in every round would have twice the ε that the ledger says."""
    federation = make_federation("dp-lora", weighting="equal", unit="client", client_rate=0.5)
    with pytest.raises(ValueError, match="leave participants out"):
        federation.run_round([0, 1])
    assert federation.rounds_done == 0 and federation.account.releases(0) == 0
    federation.run_round()
