"""Advice: the noise that it goes by, what lies between measured points, and what it does not promise."""

import math
from pathlib import Path

import pytest

from lora_dp.fed import cli
from lora_dp.fed.advice import MEASURED, advise, command, in_words, relative_noise
from lora_dp.fed.advise_options import AdviseConfig
from lora_dp.fed.config import RunConfig
from lora_dp.privacy.accounting import Ledger, PoissonGaussian
from lora_dp.privacy.accounting.planning import calibrate_noise_multiplier


def test_the_noise_is_that_of_a_run_of_full_batches_as_a_whole() -> None:
    """T steps on all examples, summed: √T · σ_T of noise beside T times the signal of one."""
    steps = 60
    each = calibrate_noise_multiplier(2.0, 1e-5, 1.0, steps)
    ledger = Ledger()
    ledger.append(PoissonGaussian(each, 1.0), steps)
    assert ledger.epsilon(1e-5) == pytest.approx(2.0, rel=2e-3)
    whole = math.sqrt(385) * each / math.sqrt(steps) / (700 * math.sqrt(9))
    assert relative_noise(700, 9, 385, 2.0, 1e-5) == pytest.approx(whole, rel=5e-3)


def test_more_data_more_budget_and_fewer_numbers_are_never_worse() -> None:
    usual = dict(examples=400, clients=4, numbers=1000, epsilon=1.0)
    noise = advise(**usual).noise
    for better in ({"examples": 800}, {"clients": 8}, {"numbers": 500}, {"epsilon": 2.0}):
        assert advise(**{**usual, **better}).noise < noise


def test_a_measured_point_is_what_is_expected_there() -> None:
    for point in MEASURED:
        advice = advise(point.examples, point.clients, point.numbers, point.epsilon)
        assert advice.noise == pytest.approx(point.noise)
        assert advice.kept == pytest.approx(point.kept) and point in advice.nearest


def test_points_are_what_learning_may_have_measured() -> None:
    """Each gains something without privacy, and privacy gives nothing; the noise spans what a user may ask about."""
    assert all(point.start < point.without <= 100 and point.kept < 1.02 for point in MEASURED)
    noises = sorted(point.noise for point in MEASURED)
    assert len(MEASURED) >= 9 and noises[0] < 0.03 and noises[-1] > 1
    assert max(MEASURED, key=lambda point: point.noise).kept < 0.5


def table() -> str:
    rows = [
        f"| {p.data} | {p.examples} | {p.clients} | {p.numbers} | {p.epsilon:g} | {p.noise:.3f} | {p.accuracy:.1f} | "
        f"{p.without:.1f} | {100 * p.kept:.0f} % |"
        for p in sorted(MEASURED, key=lambda point: point.noise)
    ]
    head = "| data | n | K | p | ε | noise | accuracy, % | without privacy | kept |"
    return "\n".join([head, "| --- |" + " ---: |" * 8, *rows])


def test_the_page_has_what_was_measured() -> None:
    page = Path(__file__).parents[2] / "docs" / "how-to" / "choosing.md"
    assert table() in page.read_text(encoding="utf-8")


def test_beyond_what_was_measured_nothing_is_expected() -> None:
    advice = advise(examples=5, clients=1, numbers=10_000, epsilon=0.1)
    assert advice.kept is None and advice.examples_needed > 1000
    words = in_words(AdviseConfig(examples=5, clients=1, epsilon=0.1, classes=77))
    assert "expect nothing" in words and f"{advise(5, 1, 77 * 193, 0.1).examples_needed} examples a client" in words
    least = min(MEASURED, key=lambda point: point.noise)
    assert advise(10**6, 100, 10, 8.0).kept == least.kept


def test_the_command_is_one_that_runs() -> None:
    words = command(300, 4, 0.5, "default").split()
    assert words[0] == "lora-dp"
    options = dict(zip((w[2:].replace("-", "_") for w in words[1::2]), words[2::2], strict=True))
    config = RunConfig.from_flat(
        {**options, "clients": int(options["clients"]), "epsilon": float(options["epsilon"]),
         "batch_size": int(options["batch_size"])}
    )  # fmt: skip
    assert config.federation.method == "head-only" and config.privacy.target == 0.5


def test_it_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["advise", "--examples", "970", "--clients", "4", "--epsilon", "1"]) == 0
    out = capsys.readouterr().out
    assert "A head of 386 numbers on default, 970 examples at each of 4 clients" in out and "Begin with: lora-dp" in out


def test_texts_about_the_classes_are_named_where_little_can_be_learnt() -> None:
    scarce = {"examples": 20, "clients": 1, "epsilon": 0.5, "classes": 10}
    assert "--class-texts" in in_words(AdviseConfig(model="vit_tiny_patch16_224", **scarce))
    assert "--class-texts" not in in_words(AdviseConfig(**scarce))
    assert "--class-texts" not in in_words(AdviseConfig(examples=10**6, clients=4, model="vit_tiny_patch16_224"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--examples", "0"], "examples must be at least 1"),
        (["--epsilon", "0"], "epsilon"),
        (["--model", "nowhere/none"], "There is no model"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(options: list[str], message: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(["advise", *options]) == 2
    assert message in capsys.readouterr().err
