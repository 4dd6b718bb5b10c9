"""The plan of a run's privacy: who adds noise, how much in a turn, at which rate, and which sizes there are."""

import bisect
import math
from dataclasses import asdict, replace
from statistics import NormalDist
from typing import Any

import pytest
import torch

from lora_dp.fed.methods import get_method
from lora_dp.fed.rounds.privacy_plan import LARGEST_SIZE, PrivacyPlan, check_size, client_mechanism, clipped, finite
from lora_dp.privacy.accounting import Ledger, PoissonGaussian, calibrate_noise_multiplier
from lora_dp.privacy.randomness import SecureSource
from tests.fed.small import TRAINING, plan_for


def plan(method: str = "dp-lora", **changes: Any) -> PrivacyPlan:
    return plan_for(get_method(method), TRAINING, **changes)


@pytest.mark.parametrize(
    ("changes", "by"),
    [
        ({"unit": "example", "noise_by": "client"}, "step"),
        ({"unit": "example", "noise_by": "server"}, "step"),
        ({"unit": "client", "noise_by": "client"}, "client"),
        ({"unit": "client", "noise_by": "server"}, "server"),
        *(
            ({"unit": unit, "noise_by": noise_by, **without}, "nobody")
            for unit in ("example", "client")
            for noise_by in ("client", "server")
            for without in ({"epsilon": None}, {"mechanism": "as-released"})
        ),
    ],
)
def test_exactly_one_adds_noise_in_a_private_run_and_nobody_else(changes, by):
    found = plan(**changes)
    adding = {
        "step": found.examples_are_protected,
        "client": found.client_adds_noise,
        "server": found.server_adds_noise,
    }
    assert [name for name, adds in adding.items() if adds] == [by] * (by != "nobody")
    assert found.private is (by != "nobody")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unit": "client", "noise_by": "Server"}, "noise_by must be client or server, not 'Server'"),
        ({"unit": "client", "noise_by": ""}, "noise_by must be client or server, not ''"),
        ({"unit": "client", "noise_by": None}, "noise_by must be client or server, not None"),
        ({"noise_by": "nobody"}, "noise_by must be"),
        ({"unit": "Client"}, "unit must be example or client, not 'Client'"),
        ({"unit": None}, "unit must be"),
        ({"mechanism": "Sound"}, "mechanism must be sound or as-released, not 'Sound'"),
        ({"mechanism": "as_released"}, "mechanism must be"),
        ({"clipping": "Flat"}, "clipping must be"),
        ({"accountant": "PLD"}, "accountant must be"),
        ({"epsilon": True}, "epsilon must be a number, not True"),
        ({"epsilon": "8"}, "epsilon must be a number"),
        ({"steps": 2.5}, "steps must be a whole number"),
    ],
)
def test_a_plan_that_says_something_else_is_refused(changes, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        plan(**changes)
    with pytest.raises(ValueError, match=f"^{words}"):
        replace(plan(unit="client"), **changes)


@pytest.mark.parametrize(
    ("who", "adds", "unit", "epsilon"),
    [
        ("client_adds_noise", True, "example", 8.0),
        ("server_adds_noise", False, "client", 8.0),
        ("server_adds_noise", True, "client", None),
    ],
)
def test_a_private_plan_is_noised_once_and_another_never(who, adds, unit, epsilon):
    """Whoever's rules of who adds noise leave nobody, or two: no ε stands on such a plan."""
    wrong = type("Wrong", (PrivacyPlan,), {who: property(lambda self: adds)})
    with pytest.raises(ValueError, match=r"has [012] parties that add noise, but a run with(out)? privacy has [01]: "):
        wrong(**asdict(plan(unit=unit, epsilon=epsilon)))


@pytest.mark.parametrize(
    ("method", "changes", "turn", "round_", "planned"),
    [
        ("dp-lora", {}, 3, 3, 12),
        ("deer", {}, 3, 6, 24),
        ("deer", {"epsilon": None}, 3, 6, 24),
        ("deer", {"unit": "client", "noise_by": "client", "participations": 3}, 1, 2, 6),
        ("deer", {"unit": "client", "noise_by": "server", "participations": 3}, 1, 1, 4),
        ("deer", {"unit": "client", "epsilon": None}, 3, 6, 24),
    ],
)
def test_how_often_a_client_releases(method, changes, turn, round_, planned):
    found = plan(method, **changes)
    assert (found.releases_per_turn, found.releases_per_round, found.planned_releases) == (turn, round_, planned)


UNITS_OF_PRIVACY = [
    {},
    {"unit": "client", "noise_by": "client"},
    {"unit": "client", "noise_by": "server", "client_rate": 0.5},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", UNITS_OF_PRIVACY)
def test_what_the_plan_releases_spends_the_budget_and_no_more(changes):
    found = plan("deer", delta=1e-3, **changes)
    ledger, event = Ledger(), found.event(20)
    ledger.append(event, found.planned_releases)
    assert 8 * 0.998 < ledger.epsilon(1e-3, "rdp") <= 8
    assert event.sample_rate == {"example": 0.4, "client": 1.0}[found.unit] * found.client_rate


@pytest.mark.parametrize(
    ("accountant", "share"), [("rdp", 0.1), ("rdp", 0.7), pytest.param("pld", 0.25, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("changes", UNITS_OF_PRIVACY)
def test_feature_sums_and_all_steps_together_spend_the_budget_and_no_more(changes, share, accountant):
    found = plan(delta=1e-3, batch_size=1000, sums_share=share, accountant=accountant, **changes)
    sums, event = found.sums_event, found.event(20)
    assert sums.sample_rate == 1 and event.sample_rate == found.client_rate
    ledger = Ledger()
    ledger.append(sums)
    assert ledger.epsilon(1e-3, accountant) < 8
    ledger.append(event, found.planned_releases)
    assert 8 * 0.998 < ledger.epsilon(1e-3, accountant) <= 8


def test_the_noise_of_feature_sums_is_that_of_their_share():
    """Alone at the whole budget it is σ, exactly what one Gaussian release needs; at a part p of it, σ/√p."""
    alone = plan(accountant="pld", sums_share=0.999999).sums_event.noise_multiplier
    # One Gaussian release is (ε, δ) by the exact condition (Balle and Wang 2018, arXiv 1805.06830, theorem 8).
    normal = NormalDist()

    def delta(noise: float) -> float:
        return normal.cdf(0.5 / noise - 8 * noise) - math.exp(8) * normal.cdf(-0.5 / noise - 8 * noise)

    assert 0.97e-5 < delta(alone) <= 1e-5
    for share in (0.1, 0.25, 0.5):
        found = plan(accountant="pld", sums_share=share)
        assert found.sums_event.noise_multiplier == pytest.approx(alone / math.sqrt(share), rel=1e-5)
    with_sums = plan(sums_share=0.25)
    assert with_sums.event(20).noise_multiplier > plan().event(20).noise_multiplier


def test_without_a_share_there_are_no_sums_and_all_is_as_before():
    assert plan().sums_event is None and plan(epsilon=None).sums_event is None
    assert plan(epsilon=None, sums_share=0.1).sums_event == PoissonGaussian(0.0, 1.0)
    found = plan()
    assert found.event(20).noise_multiplier == calibrate_noise_multiplier(8.0, 1e-5, 0.4, 12, "rdp")


def test_turns_of_one_draw_share_its_event_and_others_have_their_own():
    """Two releases with √2 times the noise are one."""
    assert plan("deer", unit="client", noise_by="server").turns == 2
    for changes, factor in (
        ({}, 1),
        ({"unit": "client", "noise_by": "client"}, 1),
        ({"unit": "client", "noise_by": "server"}, math.sqrt(2)),
    ):
        found = plan("deer", **changes)
        assert found.turn_noise_multiplier(20) == found.event(20).noise_multiplier * factor > 0


def test_sizes_are_rounded_down_to_a_ladder_of_two_percent():
    """The rate is that of a client that is at most 2 % smaller, never larger; below 51 each number is a step."""
    steps = sorted({math.floor(1.02**k) for k in range(1000)})
    assert steps[:50] == list(range(1, 51)) and steps[-1] > LARGEST_SIZE
    found = plan(batch_size=1)
    sizes = [*range(1, 3000), *(step + more for step in steps if 3000 < step < 10**8 for more in (-1, 0, 1))]
    for size in sizes:
        assert found.sample_rate(size) == 1 / steps[bisect.bisect(steps, size) - 1]


@pytest.mark.parametrize("size", [1, 2, 10**8 - 1, 10**8])
def test_numbers_of_examples_that_a_client_can_have(size):
    check_size(3, size)


@pytest.mark.parametrize(
    ("size", "told"),
    [
        (0, "0"),
        (-5, "-5"),
        (True, "True"),
        (1.5, "1.5"),
        (2.0, "2.0"),
        (10**8 + 1, str(10**8 + 1)),
        ("7", "another"),
        ([7], "another"),
        (None, "another"),
        (float("nan"), "another"),
        (10**400, "another"),
        (-(10**400), "another"),
        (10**20, "another"),
        (10**20 - 1, str(10**20 - 1)),
        (-(10**20), "another"),
    ],
)
def test_numbers_of_examples_that_no_client_has(size, told):
    with pytest.raises(ValueError, match=f"client 3 announces {told} as its number .* from 1 to 100000000: mend"):
        check_size(3, size)


@pytest.mark.parametrize(
    ("unit", "least", "refused", "what"),
    [("example", 0.0099, 0.01, "100 examples at a client"), ("client", 0.33, 1 / 3, "3 clients")],
)
def test_a_delta_that_promises_nothing_is_refused(unit, least, refused, what):
    plan(unit=unit, delta=least).check(100)
    with pytest.raises(ValueError, match=f"promises nothing to one of {what}"):
        plan(unit=unit, delta=refused).check(100)
    plan(unit=unit, delta=refused, epsilon=None).check(100)


def test_a_change_is_clipped_as_a_whole():
    change = {"a": torch.tensor([3.0]), "b": torch.tensor([[0.0, 4.0]], dtype=torch.float16)}
    for bound, norm in ((1.0, 1.0), (4.9, 4.9), (5.0, 5.0), (6.0, 5.0)):
        found = clipped(change, bound)
        assert found is not None and all(tensor.dtype == torch.float64 for tensor in found.values())
        size = math.sqrt(sum(float(tensor.square().sum()) for tensor in found.values()))
        assert norm * (1 - 2.0**-38) < size <= norm
        assert float(found["a"][0] / found["b"][0, 1]) == pytest.approx(0.75, rel=1e-15)
    trained = clipped({"a": torch.ones(2, requires_grad=True)}, 1.0)
    assert trained is not None and not trained["a"].requires_grad
    none = clipped({"a": torch.zeros(2)}, 1.0)
    assert none is not None and none["a"].tolist() == [0, 0]
    for value in (math.inf, math.nan, -math.inf):
        assert clipped({**change, "c": torch.tensor([value])}, 1.0) is None
    # Too large to square in float32, or in float16.
    wide = clipped({"a": torch.tensor([3e30, 4e30])}, 1.0)
    assert wide is not None and wide["a"].tolist() == pytest.approx([0.6, 0.8], rel=1e-6)


def test_the_mechanism_on_whole_updates_clips_at_their_bound():
    found = client_mechanism(0.25, 1.5, SecureSource())
    assert found.rule.sensitivity == 0.25 and found.noise_std(1) == pytest.approx(1.5 * 0.25, rel=1e-6)


def test_json_has_no_number_for_what_is_not_finite():
    assert [finite(value) for value in (1.5, 0.0, math.inf, -math.inf, math.nan)] == [1.5, 0.0, None, None, None]
