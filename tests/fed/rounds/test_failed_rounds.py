"""What goes wrong in a round: updates above the bound, clients that fail, and too few of them."""

import json
import math

import pytest

from lora_dp.errors import TooFewClients
from tests.fed.rounds.told_clients import CLIENT, SERVER, begun, failing


def test_a_change_above_the_bound_is_left_out_unless_noise_explains_it():
    """Each number moves alike: by a ninth of the norm."""
    federation = begun(answers={0: 999.9 / 9, 1: 1001 / 9})
    [entry] = federation.run_round().failed
    assert entry["client"] == 1 and entry["reason"].startswith("sent a change of norm")
    noisy = begun(privacy={**CLIENT, "max_update_norm": 1e3}, fault_norm=10.0)
    noise = noisy.plan.event(10).noise_multiplier * 1e3 * 9
    noisy.engine.answers = {0: (10 + 1.99 * noise) / 9, 1: (10 + 2.01 * noise) / 9}
    assert [entry["client"] for entry in noisy.run_round().failed] == [1]


def test_failures_are_told_by_number_and_not_as_they_came():
    """Which would tell how long clients took."""
    federation = begun(sizes=[10] * 3, answers={0: failing(0), 2: failing(2)})
    plain = federation.engine.train
    federation.engine.train = lambda tasks, on_step: reversed(list(plain(tasks, on_step)))
    assert [entry["client"] for entry in federation.run_round().failed] == [0, 2]


def test_who_failed_in_a_turn_is_asked_no_more_in_the_round_and_all_failures_are_told():
    federation = begun(
        "deer", [10] * 3, {0: failing(0, "raised \x1b[2J"), 2: lambda task: 1.0 if task.turn == 0 else failing(2)}
    )
    result = federation.run_round()
    assert federation.engine.asked == [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 1), (0, 1, 2)]
    assert result.participants == [1]
    assert result.failed == [{"client": 0, "reason": r"raised \x1b[2J"}, {"client": 2, "reason": "raised OSError"}]
    assert federation.run_round().round == 2 and federation.engine.asked[5:8] == [(1, 0, client) for client in range(3)]


def test_a_round_of_too_few_says_who_failed_and_only_on_the_console_with_what_words():
    federation = begun(
        sizes=[10] * 4,
        min_clients=3,
        answers={1: failing(1, detail="disk full"), 2: failing(2, "raised KeyError", "raised KeyError"), 3: failing(3)},
    )
    with pytest.raises(TooFewClients) as caught:
        federation.run_round()
    begin = "Round 1 has too few usable updates: 1 of 4, min_clients is 3 (client 1 raised OSError"
    end = (
        "; client 2 raised KeyError; client 3 raised OSError). "
        "Mend these clients, or lower min_clients in config.yaml, and resume."
    )
    assert str(caught.value) == begin + end and caught.value.in_full == f"{begin}: disk full{end}"


@pytest.mark.parametrize(
    "answers, remedy",
    [
        ({0: math.nan, 1: math.inf}, "Begin again with a lower lr."),
        ({0: math.nan, 1: None}, "Mend these clients, and resume."),
        ({0: None, 1: None}, "Mend these clients, and resume."),
    ],
)
def test_where_no_update_is_usable_the_remedy_hangs_on_why(answers, remedy):
    with pytest.raises(TooFewClients) as caught:
        begun(answers=answers).run_round()
    assert str(caught.value).endswith(f"). {remedy}")


def test_how_few_updates_make_a_round():
    """One, unless more are asked for; all that were drawn where these are fewer; none under the server's noise."""
    assert begun(answers={0: None}).run_round().participants == [1]
    with pytest.raises(TooFewClients, match="1 of 2"):
        begun(answers={0: None}, min_clients=2).run_round()
    with pytest.raises(TooFewClients, match="0 of 2"):
        begun(answers={0: None, 1: None}, min_clients=0).run_round()
    assert begun(min_clients=2).run_round([1]).participants == [1]
    assert len(begun(answers={0: None, 1: None}, privacy=SERVER).run_round().failed) == 2


@pytest.mark.parametrize("what", [KeyboardInterrupt, TooFewClients])
def test_a_round_that_ends_early_leaves_the_state_of_the_one_before(what):
    def answer(task):
        if task.turn == 1 and what is KeyboardInterrupt:
            raise KeyboardInterrupt
        return 1.0 if task.turn == 0 else None

    federation = begun("deer", answers={0: answer, 1: answer})
    before, versions = dict(federation.server.state), json.dumps(federation.server.bookkeeping())
    with pytest.raises(what):
        federation.run_round()
    assert all(tensor is federation.server.state[name] for name, tensor in before.items())
    assert json.dumps(federation.server.bookkeeping()) == versions and federation.rounds_done == 0
