"""Faults of the feature sums before the first round, with what catches each."""

from tests.faults.fed_plants import (
    noise_on_class_sums_only,
    sums_barely_noised,
    sums_begun_again_beyond_the_budget,
    sums_counted_once,
    sums_noised_for_less,
    sums_not_clipped,
    sums_not_counted,
    sums_of_clients_noised_for_less,
    sums_of_examples_not_clipped,
    warm_start_from_plain_sums,
)
from tests.faults.planting import AUDIT, Fault
from tests.fed.auditing.small_runs import CLIENTS, SMALL
from tests.fed.auditing.small_runs import SUMS as SUMMED

_HEAD_START = "tests/fed/rounds/test_head_start.py::"
_NOISE = f"{_HEAD_START}test_each_number_has_the_noise_that_is_told_and_the_sensitivity_asks_for"
_LOG = "tests/fed/rounds/test_ahead_log.py::test_sums_are_counted_by_the_log_alone_and_again_after_a_crash"

SUMS = [
    Fault(
        "feature sums of whole clients are not clipped",
        "one client moves them by as much as it likes, and the noise is made for their sensitivity.",
        sums_not_clipped,
        (
            f"{_HEAD_START}test_a_clients_whole_contribution_is_clipped[client]",
            f"{_HEAD_START}test_what_the_server_takes_from_one_client_is_clipped_to_the_bound",
            AUDIT,
        ),
        {**CLIENTS, **SUMMED, "noise_by": "client", "epsilon": 1.5},
    ),
    Fault(
        "feature sums of examples are clipped by another rule",
        "what they add hangs on their length, and the released means are no means.",
        sums_of_examples_not_clipped,
        (f"{_HEAD_START}test_an_example_adds_what_it_should_and_no_more_than_the_bound",),
    ),
    Fault(
        "a fiftieth of the noise of feature sums",
        "the ledger claims what is not there.",
        sums_barely_noised,
        (f"{_NOISE}[example-equal]", f"{_NOISE}[server-equal]", AUDIT),
        {**SMALL, **SUMMED, "epsilon": 2.0},
    ),
    Fault(
        "noise of feature sums for a √2 smaller sensitivity",
        "the ledger claims √2 times the noise that there is.",
        sums_noised_for_less,
        (f"{_NOISE}[example-equal]",),
    ),
    Fault(
        "noise of whole clients' feature sums for a √2 smaller sensitivity",
        "as above.",
        sums_of_clients_noised_for_less,
        (f"{_NOISE}[client-equal]", f"{_NOISE}[server-equal]"),
    ),
    Fault(
        "noise on class sums only",
        "moments over all classes are released as they are.",
        noise_on_class_sums_only,
        (f"{_NOISE}[example-equal]", f"{_NOISE}[client-equal]"),
    ),
    Fault(
        "a start from feature sums without noise",
        "the head tells the sums as they are.",
        warm_start_from_plain_sums,
        (f"{_NOISE}[example-equal]", f"{_NOISE}[server-equal]"),
    ),
    Fault(
        "feature sums are in no ledger",
        "the run releases more than its ε counts.",
        sums_not_counted,
        (
            f"{_HEAD_START}test_what_fails_later_has_been_counted[apply]",
            "tests/fed/rounds/test_ledgers.py::test_sums_are_an_entry_of_their_own_in_every_ledger[example]",
            AUDIT,
        ),
        {**SMALL, **SUMMED},
    ),
    Fault(
        "feature sums are released twice and counted once",
        "what a crash lost has been released, and came again with other noise.",
        sums_counted_once,
        (f"{_LOG}[False-example]", f"{_LOG}[False-server]"),
    ),
    Fault(
        "feature sums are released again beyond the budget",
        "the run ends above the ε that it was planned for.",
        sums_begun_again_beyond_the_budget,
        (f"{_HEAD_START}test_sums_that_would_lead_above_the_budget_are_not_released_again[example]",),
    ),
]
