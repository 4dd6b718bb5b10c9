"""The log written ahead, by itself: which run it is of, what it counts without data or model, what it refuses."""

import json

import pytest

from lora_dp.fed.methods import get_method
from lora_dp.fed.rounds.ledgers import LOG, AheadLog, LogError
from tests.fed.chained import forge, forget
from tests.fed.rounds.accounts import SIZES, account, counts, log, replayed
from tests.fed.small import TRAINING, plan_for

ROUNDS = ((1, [0, 1]), (2, [0, 2]), (2, [0, 2]), (3, []), (4, [2]))
SERVER = {"unit": "client", "noise_by": "server", "delta": 0.01}
CLIENT = {**SERVER, "noise_by": "client"}


def plan(**changes):
    return plan_for(get_method("dp-lora"), TRAINING, clients=len(SIZES), **changes)


def entries_of(folder):
    entries = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    for entry in entries:
        del entry["digest"]
    return entries


@pytest.mark.slow
def test_a_run_is_told_from_all_others_by_its_log(tmp_path):
    """Where it is reproducible, from those that release other bits."""
    runs = []
    for number, reproducible in enumerate((False, False, True, True)):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert AheadLog(folder / LOG).run is None
        found = log(folder, reproducible=reproducible)
        runs.append(found.run)
        again = AheadLog(folder / LOG)
        again.begin(account(), reproducible=reproducible)
        assert again.run == found.run is not None
        assert ("run" in entries_of(folder)[0]) != reproducible
    assert len(set(runs)) == 3 and runs[2] == runs[3]


@pytest.mark.parametrize("change", [{"format": "lora-dp diary"}, {"version": 2}, {"version": 4}])
def test_a_log_of_another_version_is_gone_on_with_by_that_one(tmp_path, change):
    found = log(tmp_path, (1, [0]))
    head, *rounds = entries_of(tmp_path)
    head |= change
    forget(tmp_path / LOG)
    forge(tmp_path / LOG, [head, *rounds])
    for read in (lambda: replayed(found), lambda: found.counted(plan())):
        with pytest.raises(LogError, match=f"is of format '{head['format']}', version {head['version']}: go on with"):
            read()


@pytest.mark.parametrize("reproducible", [False, True])
def test_what_was_begun_is_counted_by_the_log_alone(tmp_path, reproducible):
    """A round that was begun again counts again, unless it released the same bits."""
    found = log(tmp_path, *ROUNDS, reproducible=reproducible)
    counted = AheadLog(tmp_path / LOG).counted(plan())
    assert counts(counted) == ([6, 3, 6] if reproducible else [9, 3, 9]) and counted.sizes.tolist() == list(SIZES)
    assert found.rounds_begun() == 5 and log(tmp_path, reproducible=reproducible).rounds_begun() == 5
    whole = account()
    for client, count in enumerate(counts(counted)):
        assert counted.event(client) == whole.event(client) and counted.epsilon(client) > 0
        assert counted.ledger(client).steps == count


@pytest.mark.parametrize("privacy, expected", [(CLIENT, [3, 1, 3]), (SERVER, [5, 5, 5])])
def test_where_sizes_are_no_public_matter_one_kind_of_release_is_all_clients(tmp_path, privacy, expected):
    log(tmp_path, *ROUNDS, **privacy)
    assert entries_of(tmp_path)[0]["terms"]["sizes"] is None
    counted = AheadLog(tmp_path / LOG).counted(plan(**privacy))
    assert counts(counted) == expected
    assert counted.worst_epsilon() == pytest.approx(_replayed_account(tmp_path, **privacy).worst_epsilon(), rel=1e-12)
    assert all(entry["examples"] is None for entry in counted.report()["clients"])


def _replayed_account(folder, **privacy):
    fresh = account(**privacy)
    AheadLog(folder / LOG).replay(fresh, rounds_done=0, reproducible=False)
    return fresh


def test_where_there_is_no_log_nothing_was_released(tmp_path):
    assert AheadLog(tmp_path / LOG).counted(plan()) is None
    assert AheadLog(tmp_path / LOG).rounds_begun() == 0 and not (tmp_path / LOG).exists()


@pytest.mark.parametrize(
    "changes, name",
    [({"epsilon": 3.0}, "epsilon"), ({"delta": 1e-6}, "delta"), ({"rounds": 5}, "rounds"), (CLIENT, "unit")],
)
def test_a_log_of_other_terms_is_not_counted_on_these(tmp_path, changes, name):
    found = log(tmp_path, (1, [0]))
    with pytest.raises(LogError, match=rf"begun on other terms \(.*{name}.* differ\)"):
        found.counted(plan(**changes))


@pytest.mark.parametrize("lost", ["clients", "sizes", "events", "options", "reproducible", "rounds"])
def test_terms_of_which_one_is_missing_are_not_counted_on(tmp_path, lost):
    found = log(tmp_path, (1, [0]))
    head, *rounds = entries_of(tmp_path)
    del head["terms"][lost]
    forget(tmp_path / LOG)
    forge(tmp_path / LOG, [head, *rounds])
    with pytest.raises(LogError, match=r"line 1 is damaged|other terms \((clients|rounds) differ"):
        found.counted(plan())


@pytest.mark.parametrize(
    "clients, fits",
    [([0], True), ([2, 0], True), ([], True), ([-1], False), ([0, 3], False), ([3], False), ([-1, 1], False)],
)
def test_rounds_are_of_clients_that_there_are(tmp_path, clients, fits):
    found = log(tmp_path, (1, clients))
    for read in (lambda: replayed(found), lambda: counts(found.counted(plan()))):
        if fits:
            assert read() == [3 * (client in clients) for client in range(3)]
        else:
            with pytest.raises(LogError, match="names clients that this run does not have"):
                read()


@pytest.mark.parametrize(
    "numbers, line",
    [([1, 2, 3], None), ([1, 1, 2, 2, 1, 3], None), ([2], 2), ([0], 2), ([1, 3], 3), ([1, 2, 0], 4), ([1, 2, 1, 4], 5)],
)
def test_a_round_comes_after_the_ones_before_it_or_again(tmp_path, numbers, line):
    found = log(tmp_path, *((number, [0]) for number in numbers))
    for read in (lambda: replayed(found), lambda: counts(found.counted(plan()))):
        if line is None:
            assert read() == [3 * len(numbers), 0, 0]
        else:
            with pytest.raises(LogError, match=f"line {line} is damaged"):
                read()


@pytest.mark.parametrize(
    "entry",
    [
        {"round": 1, "clients": ["x"]},
        {"round": 1, "clients": [[0]]},
        {"round": 1},
        {"clients": [0]},
        {"round": None, "clients": [0]},
    ],
)
def test_what_is_no_round_is_refused(tmp_path, entry):
    found = log(tmp_path)
    head = entries_of(tmp_path)[0]
    forget(tmp_path / LOG)
    forge(tmp_path / LOG, [head, entry])
    for read in (lambda: replayed(found), lambda: found.counted(plan())):
        with pytest.raises(LogError, match="line 2 is damaged"):
            read()


@pytest.mark.parametrize(
    "reproducible, done, expected",
    [
        (False, 0, [9, 3, 9]),
        (False, 4, [9, 3, 9]),
        (True, 0, [0, 0, 0]),
        (True, 1, [3, 3, 0]),
        (True, 2, [6, 3, 3]),
        (True, 4, [6, 3, 6]),
    ],
)
def test_what_a_run_has_released_when_it_goes_on_from_a_checkpoint(tmp_path, reproducible, done, expected):
    """All that was begun; of a reproducible run, what it will not release again."""
    found = log(tmp_path, *ROUNDS, reproducible=reproducible)
    assert replayed(found, done, reproducible=reproducible) == expected
    with pytest.raises(LogError, match="ends before round 5"):
        replayed(found, 5, reproducible=reproducible)


def test_a_log_of_no_round_is_not_that_of_a_run_that_has_done_one(tmp_path):
    found = log(tmp_path)
    assert replayed(found) == [0, 0, 0]
    with pytest.raises(LogError, match="ends before round 1"):
        replayed(found, 1)


# Feature sums, round 0

SUMS = {"sums_share": 0.1, "batch_size": 1000}
ALL = [0, 1, 2]
SUMMED = {"example": {}, "client": {"unit": "client", "noise_by": "client"}, "server": {"unit": "client"}}


def sums_of(found):
    return [dict(found.ledger(client).entries).get(found.plan.sums_event, 0) for client in range(3)]


@pytest.mark.parametrize("way", SUMMED)
@pytest.mark.parametrize("reproducible", [False, True])
def test_sums_are_counted_by_the_log_alone_and_again_after_a_crash(tmp_path, way, reproducible):
    """They were released again with other noise; a reproducible run's are the same bits."""
    changes = {**SUMS, **SUMMED[way]}
    clients = [] if way == "server" else ALL
    found = log(tmp_path, (0, clients), (0, clients), (1, clients), reproducible=reproducible, **changes)
    counted = AheadLog(tmp_path / LOG).counted(plan(**changes))
    assert sums_of(counted) == [1 if reproducible else 2] * 3
    assert counts(counted) == [counted.plan.releases_per_round] * 3
    whole = account(**changes)
    for _ in range(1 if reproducible else 2):
        whole.add_sums(ALL)
    whole.add_round(ALL)
    assert counted.worst_epsilon() == whole.worst_epsilon()
    fresh = account(**changes)
    found.replay(fresh, rounds_done=1, reproducible=reproducible)
    assert fresh.worst_epsilon() == whole.worst_epsilon() and fresh.eligible() == whole.eligible()


@pytest.mark.parametrize(
    "reproducible, done, sums, steps",
    [(False, -1, 2, 3), (False, 0, 2, 3), (True, -1, 0, 0), (True, 0, 1, 0), (True, 1, 1, 3)],
)
def test_sums_of_a_run_that_goes_on(tmp_path, reproducible, done, sums, steps):
    """What a reproducible run will release again is not counted yet: without a checkpoint, the sums too."""
    found = log(tmp_path, (0, ALL), (0, ALL), (1, ALL), reproducible=reproducible, **SUMS)
    fresh = account(**SUMS)
    found.replay(fresh, rounds_done=done, reproducible=reproducible)
    assert sums_of(fresh) == [sums] * 3 and counts(fresh) == [steps] * 3


@pytest.mark.parametrize(
    "numbers, line", [([0, 0, 1, 2], None), ([1, 2], None), ([0, 1, 0], 4), ([1, 0], 3), ([0, 2], 3), ([-1], 2)]
)
def test_sums_come_before_the_first_round(tmp_path, numbers, line):
    found = log(tmp_path, *((number, ALL) for number in numbers), **SUMS)
    for read in (lambda: replayed(found, **SUMS), lambda: counts(found.counted(plan(**SUMS)))):
        if line is None:
            assert read() == [6 if 2 in numbers else 3] * 3
        else:
            with pytest.raises(LogError, match=f"line {line} is damaged"):
                read()


@pytest.mark.parametrize("before, now", [(0.0, 0.1), (0.1, 0.0), (0.1, 0.2)])
def test_a_log_of_another_share_is_refused(tmp_path, before, now):
    """Its sums had other noise."""
    found = log(tmp_path, sums_share=before, batch_size=1000)
    for read in (
        lambda: replayed(found, sums_share=now, batch_size=1000),
        lambda: found.counted(plan(sums_share=now, batch_size=1000)),
    ):
        with pytest.raises(LogError, match=r"other terms \(.*sums.* differ\)"):
            read()
