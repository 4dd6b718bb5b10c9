"""The account of all clients: the log written ahead, and the ε that it adds up to."""

import json
import math

import numpy as np
import pytest

from lora_dp.fed.methods import get_method
from lora_dp.fed.rounds.ledgers import LOG
from lora_dp.fed.rounds.privacy_plan import UNITS
from lora_dp.privacy.accounting import Ledger, PrivacyBudgetExceeded, max_steps
from tests.fed.rounds.accounts import SIZES, account, counts, log
from tests.fed.small import TRAINING, make_federation, plan_for

MANY = tuple(range(41, 50))  # more kinds of clients than are worked out one by one where it must be quick

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


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dp-lora", "deer"])
def test_a_budget_is_spent_to_the_last_round_and_never_more(method):
    found = account(method, participations=3)
    for index in range(3):
        assert found.eligible() == [0, 1, 2], index
        found.add_round([0, 1, 2])
    assert found.eligible() == []
    assert all(8 * 0.998 < found.epsilon(client) <= 8 for client in range(3))


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_where_each_has_spent_its_budget_the_quick_bound_is_the_budget(accountant):
    found = account(sizes=MANY, participations=5, accountant=accountant)
    for _ in range(5):
        found.add_round(range(len(MANY)))
    assert 8 * 0.998 < found.worst_epsilon(exact=False) <= 8


@pytest.mark.slow
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


@pytest.mark.slow
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
        "sums": None,
        "events": [[noise[client], rates[client]] for client in (2, 0, 1)],
        "options": None,
    }
    whole = account(unit="client", noise_by="client").terms()
    assert (whole["noise_by"], whole["sizes"]) == ("client", None)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_participants_cannot_be_named_where_the_secret_draw_amplifies():
    """Two clients who are there in every round would have twice the ε that the ledger says."""
    federation = make_federation("dp-lora", weighting="equal", unit="client", client_rate=0.5)
    with pytest.raises(ValueError, match="leave participants out"):
        federation.run_round([0, 1])
    assert federation.rounds_done == 0 and federation.account.releases(0) == 0
    federation.run_round()


# Feature sums

SUMS = {"sums_share": 0.1, "batch_size": 1000}
SUMMED = {"example": {}, "client": {"unit": "client", "noise_by": "client"}, "server": {"unit": "client"}}


@pytest.mark.parametrize("way", SUMMED)
def test_sums_are_an_entry_of_their_own_in_every_ledger(way):
    found = account(**SUMS, **SUMMED[way])
    event, sums = found.event(0), found.plan.sums_event
    assert found.ledger(0).steps == 0 and found.has_room_for_sums()
    found.add_sums(range(3))
    assert counts(found) == [0, 0, 0] and found.ledger(1).entries == ((sums, 1),)
    assert found.terms()["sums"] == [sums.noise_multiplier, 1.0]
    alone = Ledger()
    alone.append(sums)
    assert found.epsilon(2) == found.worst_epsilon() == alone.epsilon(1e-5, "rdp") > 0
    for index in range(4):
        assert found.eligible() == [0, 1, 2], index
        found.add_round([0, 1, 2])
    assert found.eligible() == []
    assert found.ledger(0).entries == ((sums, 1), (event, found.plan.planned_releases))
    assert 8 * 0.998 < found.worst_epsilon() <= 8
    [entry, *_] = found.report()["clients"]
    assert entry["ledger"]["entries"][0]["noise_multiplier"] == sums.noise_multiplier


@pytest.mark.parametrize("way", SUMMED)
def test_sums_that_a_crash_had_released_twice_leave_as_many_rounds_as_fit(way):
    found = account(**SUMS, **SUMMED[way], rounds=9, participations=9)
    for _ in range(2):
        found.add_sums(range(3))
    before = Ledger()
    before.append(found.plan.sums_event, 2)
    fits = max_steps(before, found.event(0), 8.0, 1e-5, "rdp")
    assert 0 < fits < found.plan.planned_releases
    rounds = 0
    while found.eligible():
        assert found.eligible() == [0, 1, 2]
        found.add_round([0, 1, 2])
        rounds += 1
    assert rounds == fits // found.plan.releases_per_round
    assert found.worst_epsilon() <= 8 < _after(found, fits + 1)


def _after(found, releases: int) -> float:
    ledger = Ledger()
    ledger.append(found.plan.sums_event, 2)
    ledger.append(found.event(0), releases)
    return ledger.epsilon(1e-5, "rdp")


def test_only_whose_sums_were_repeated_has_fewer_rounds():
    found = account(**SUMS, rounds=9, participations=9)
    found.add_sums(range(3))
    found.add_sums([1])
    rounds = 0
    while found.eligible() == [0, 1, 2]:
        found.add_round(range(3))
        rounds += 1
    assert rounds < 9
    while found.eligible():
        assert found.eligible() == [0, 2]
        found.add_round([0, 2])
    assert counts(found) == [27, 3 * rounds, 27] and found.worst_epsilon() <= 8


@pytest.mark.parametrize("share, room", [(0.3, 3), (0.45, 2), (0.51, 1)])
@pytest.mark.parametrize("way", SUMMED)
def test_whether_there_is_room_for_sums_once_more_is_what_they_add_up_to(way, share, room):
    found = account(**{**SUMS, "sums_share": share}, **SUMMED[way])
    times = 0
    while found.has_room_for_sums():
        found.add_sums(range(3))
        times += 1
    assert times == room
    ledger = Ledger()
    ledger.append(found.plan.sums_event, times + 1)
    assert found.worst_epsilon() <= 8 < ledger.epsilon(1e-5, "rdp")
    free = account(epsilon=None, sums_share=share)
    free.add_sums(range(3))
    assert free.has_room_for_sums() and free.eligible() == [0, 1, 2] and free.worst_epsilon() == math.inf


@pytest.mark.slow
def test_the_quick_bound_counts_the_sums():
    """Also those that came twice: then the budget is no bound."""
    found = account(sizes=MANY, batch_size=1, sums_share=0.45, participations=5)
    found.add_sums(range(len(MANY)))
    assert 0 < found.worst_epsilon() <= found.worst_epsilon(exact=False) <= 8
    for _ in range(2):
        found.add_sums([3])
    assert found.worst_epsilon(exact=False) == found.worst_epsilon() == found.epsilon(3) > 8
