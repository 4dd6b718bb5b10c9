"""Each planted fault is caught by what its entry names, and nothing is caught where there is no fault."""

import pytest

from lora_dp import IsolationError
from lora_dp.auditing import GradientCanaries, audit
from lora_dp.privacy.mechanism import Mechanism
from tests.auditing.tiny import training
from tests.faults.planted import FAULTS
from tests.faults.planting import AUDIT, FULL, ISOLATION, PHASE_A, REFUSED, ROOT, SAMPLED, Fault, Planting, verdicts
from tests.fed.auditing.small_runs import audited

NODES = sorted({catcher for fault in FAULTS for catcher in fault.caught_by if "::" in catcher})
# What a test that has noticed something raises.
NOTICED = (AssertionError, pytest.fail.Exception)


def violated(options: dict, seed: int = 0) -> bool:
    """Whether the audit of one training run refutes its claim, at a confidence of 95 %."""
    if "sums_share" in options:
        return audited(options, seed).violated
    trained = training(**options, first_seed=seed)
    return audit(trained, GradientCanaries(900), delta=1e-5, assume="independent", seed=seed).violated


@pytest.mark.slow
@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.name) for fault in FAULTS])
def test_the_fault_is_caught(fault: Fault) -> None:
    tests = [catcher for catcher in fault.caught_by if "::" in catcher]
    with fault.planted() as planting:
        if AUDIT in fault.caught_by:
            assert fault.audited is not None and violated(fault.audited)
        if fault.run is not None:
            kind = IsolationError if ISOLATION in fault.caught_by else (ValueError, RuntimeError)
            with pytest.raises(kind, match=fault.refusal):
                fault.run()
        unnoticed = {
            node: raised
            for node, raised in (verdicts(*tests) if tests else {}).items()
            if raised is None or not issubclass(raised, NOTICED)
        }
    assert unnoticed == {}
    assert planting.calls > 0, "the fault was never reached"


# Controls: what catches faults finds none where there is none


@pytest.mark.slow
def test_harmless_plants_are_not_caught() -> None:
    """All places are wrapped, and do what they did: every test that catches a fault passes."""
    with pytest.MonkeyPatch.context() as patch:
        planting = Planting(patch, harmless=True)
        for fault in FAULTS:
            fault.plant(planting)
        found = verdicts(*NODES)
        for run in {fault.run for fault in FAULTS if fault.run is not None}:
            run()
    assert planting.calls > 1000
    assert {node: raised for node, raised in found.items() if raised is not None} == {}


@pytest.mark.slow
@pytest.mark.parametrize("options", [FULL, SAMPLED, PHASE_A])
def test_what_is_sound_violates_nothing(options: dict) -> None:
    """The engine as it is: at a confidence of 95 %, three false alarms of 8 seeds have a probability below 0.006."""
    assert sum(violated(options, seed) for seed in range(8)) <= 2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("options", [FULL, SAMPLED, PHASE_A])
def test_more_noise_than_claimed_violates_nothing(options: dict, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        planting = Planting(patch)
        planting.replace(Mechanism, "noise_std", lambda std: lambda self, size: 1.2 * std(self, size))
        assert not violated(options, seed)
    assert planting.calls > 0


@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("options", [FULL, SAMPLED, PHASE_A])
def test_half_of_the_noise_is_found_at_every_seed(options: dict, seed: int) -> None:
    with next(fault for fault in FAULTS if fault.name == "noise at half its deviation").planted():
        assert violated(options, seed)


def test_the_harness_tells_faults_from_mistakes_in_the_fault() -> None:
    """A plant that breaks what it touches makes a test fail, but does not count as caught."""
    node = "tests/privacy/test_mechanism.py::test_every_tensor_of_a_release_gets_noise_of_its_own"
    with pytest.MonkeyPatch.context() as patch:
        Planting(patch).replace(Mechanism, "noise_std", lambda std: lambda self: std)
        assert verdicts(node) == {node: TypeError}
    assert verdicts(node) == {node: None}
    with pytest.raises(ValueError, match="did not run"):
        verdicts("tests/privacy/test_noise.py::test_of_another_name")


def test_plants_are_taken_out_again() -> None:
    before = Mechanism.noise_std
    with next(fault for fault in FAULTS if fault.name == "noise at half its deviation").planted():
        assert Mechanism.noise_std is not before
    assert Mechanism.noise_std is before


# The page


def table() -> str:
    """The table of docs/reports/faults.md."""
    lines = ["| fault | why ε is void | caught by |", "| --- | --- | --- |"]
    for fault in FAULTS:
        catchers = [catcher if "::" not in catcher else f"`{catcher.partition('/')[2]}`" for catcher in fault.caught_by]
        lines.append(f"| {fault.name} | {fault.breaks} | {'<br>'.join(catchers)} |")
    return "\n".join(lines)


def test_the_page_has_this_table() -> None:
    assert table() in (ROOT / "docs" / "reports" / "faults.md").read_text(encoding="utf-8")


def test_every_fault_has_its_catcher() -> None:
    assert len(FAULTS) == len({fault.name for fault in FAULTS}) >= 20
    for fault in FAULTS:
        assert fault.caught_by and all("::" in c or c in (AUDIT, ISOLATION, REFUSED) for c in fault.caught_by)
        assert (fault.audited is not None) == (AUDIT in fault.caught_by)
        assert (fault.run is not None) == bool({ISOLATION, REFUSED} & set(fault.caught_by)) == bool(fault.refusal)
