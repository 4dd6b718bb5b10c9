"""A budget against the ledger's own ε: the last step that fits is taken, the next one is not."""

import pytest

import lora_dp.privacy.accounting.budget
from lora_dp.privacy.accounting import Ledger, PoissonGaussian, PrivacyBudgetExceeded, max_steps
from lora_dp.privacy.accounting.budget import Budget

EVENT, EPSILON, DELTA = PoissonGaussian(2.0, 0.1), 2.0, 1e-5


def spend(budget: Budget, ledger: Ledger) -> int:
    """Steps that are taken until the first one is refused."""
    for taken in range(1000):
        try:
            budget.check()
        except PrivacyBudgetExceeded as refusal:
            assert "ε = 2 at δ = 1e-05" in str(refusal) and f"in {ledger.steps} steps" in str(refusal)
            return taken
        ledger.append(EVENT)
    raise AssertionError("the budget never ends")


@pytest.mark.parametrize("before", [0, 1, 3])
def test_as_many_steps_are_taken_as_fit(before):
    """Whatever was spent before, and by whatever else."""
    ledger = Ledger()
    if before:
        ledger.append(PoissonGaussian(4.0, 0.2), before)
    expected = max_steps(ledger, EVENT, EPSILON, DELTA, "rdp")
    assert expected > 2
    assert spend(Budget(ledger, EVENT, EPSILON, DELTA, "rdp", planned=0), ledger) == expected
    assert ledger.epsilon(DELTA, "rdp") <= EPSILON
    ledger.append(EVENT)
    assert ledger.epsilon(DELTA, "rdp") > EPSILON


def test_what_others_append_between_two_steps_counts():
    ledger = Ledger()
    budget = Budget(ledger, EVENT, EPSILON, DELTA, "rdp", planned=max_steps(ledger, EVENT, EPSILON, DELTA, "rdp"))
    budget.check()
    ledger.append(EVENT)
    ledger.append(PoissonGaussian(3.0, 0.2), 2)
    expected = max_steps(ledger, EVENT, EPSILON, DELTA, "rdp")
    assert spend(budget, ledger) == expected


def test_a_step_that_was_allowed_and_failed_takes_no_room():
    ledger = Ledger()
    expected = max_steps(ledger, EVENT, EPSILON, DELTA, "rdp")
    budget = Budget(ledger, EVENT, EPSILON, DELTA, "rdp", planned=expected)
    budget.check()  # nothing is appended after it
    assert spend(budget, ledger) == expected


@pytest.mark.parametrize("planned", [0, 5])
def test_room_is_searched_for_once_and_counted_down(planned, monkeypatch):
    """A search takes longer than a step."""
    searches: list[int] = []

    def counted(*arguments):
        searches.append(max_steps(*arguments))
        return searches[-1]

    monkeypatch.setattr(lora_dp.privacy.accounting.budget, "max_steps", counted)
    ledger = Ledger()
    ledger.append(PoissonGaussian(4.0, 0.2), 0 if planned else 2)
    budget = Budget(ledger, EVENT, EPSILON, DELTA, "rdp", planned=planned)
    for _ in range(planned):
        budget.check()
        ledger.append(EVENT)
    assert searches == []
    taken = spend(budget, ledger)
    assert searches == [taken, 0]


def test_a_step_that_all_but_fits_does_not_fit():
    """At the stated δ, to six digits of ε."""
    ledger, whole = Ledger(), Ledger()
    whole.append(EVENT, 7)
    epsilon = whole.epsilon(DELTA, "rdp")
    for scale, expected in ((1 + 1e-6, 7), (1 - 1e-6, 6)):
        budget, taken = Budget(ledger, EVENT, scale * epsilon, DELTA, "rdp", planned=0), 0
        with pytest.raises(PrivacyBudgetExceeded):
            while True:
                budget.check()
                ledger.append(EVENT)
                taken += 1
        assert taken == expected
        ledger = Ledger()
