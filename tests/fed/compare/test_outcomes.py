"""What a comparison searches before its cells, what it chooses by that, and how it goes on."""

import math
import re
from pathlib import Path
from typing import Any

import pandas
import pytest

from lora_dp.fed.compare.grid import Grid
from lora_dp.fed.compare.outcomes import NO_SETTING, OTHER_SETTING, Outcomes, read_failures
from lora_dp.fed.config import RunConfig, read_config
from lora_dp.fed.methods import METHODS
from lora_dp.fed.page import write_page
from tests.fed.compare.conftest import Runner
from tests.fed.compare.small_grids import grid_config, quietly

SEARCH = {"lr": [0.1, 10.0], "max_grad_norm": [0.5, 2.0]}


def searched(folder: Path, **options: Any) -> str:
    given = {"epsilons": [1], "seeds": [0, 1], "search": SEARCH, "search_trials": 4, **options}
    return quietly(grid_config(folder, **given))


def best_near(lr: float) -> Any:
    """Accuracy that falls off on both sides of a learning rate."""

    def verdict(config: RunConfig) -> tuple[float, float]:
        assert config.optimization.lr is not None
        return 0.9 - 0.1 * abs(math.log(config.optimization.lr / lr)), 0.7

    return verdict


def trials(fake: Runner, method: str = "la-lora", seed: int = 100) -> dict[str, RunConfig]:
    """Configurations of the trials that were run, by setting."""
    found = {name.split("/")[-2]: config for name, config in fake.configs.items() if name.count("/") == 3}
    return {
        setting: fake.configs[f"{method}/eps1/{setting}/seed{seed}"]
        for setting in found
        if f"{method}/eps1/{setting}/seed{seed}" in fake.configs
    }


def chosen(fake: Runner) -> set[float | None]:
    return {config.optimization.lr for name, config in fake.configs.items() if name.count("/") == 2}


def test_all_methods_draw_the_same_and_cells_take_the_best(tmp_path, fake):
    fake.verdict = best_near(0.9)
    searched(tmp_path / "grid")
    names = [name.split("/", 1)[1] for name in fake.ran if name.count("/") == 3]
    assert sorted(names[: len(names) // 2]) == sorted(names[len(names) // 2 :]) or len(set(names)) >= 8
    one, other = (trials(fake, method) for method in ("la-lora", "dp-lora"))
    for index in range(4):
        mine, theirs = one[f"s{index}"], other[f"s{index}"]
        assert mine.optimization.lr == theirs.optimization.lr
        assert mine.privacy.max_grad_norm == theirs.privacy.max_grad_norm
    assert {setting: c.optimization.lr for setting, c in one.items()} == {
        setting: c.optimization.lr for setting, c in trials(fake, seed=101).items()
    }
    nearest = min(one.values(), key=lambda c: abs(math.log(c.optimization.lr / 0.9)))
    for name, config in fake.configs.items():
        if name.count("/") == 2:
            assert config.optimization.lr == nearest.optimization.lr
            assert config.privacy.max_grad_norm == nearest.privacy.max_grad_norm
    cells = pandas.read_csv(tmp_path / "grid" / "comparison.csv")
    assert set(cells["lr"]) == chosen(fake) and "max_grad_norm" in cells


@pytest.mark.slow
def test_rates_in_multiples_of_each_method_s_own(tmp_path, fake):
    searched(tmp_path / "grid", methods=["la-lora", "rolora"], search={"lr_factor": [0.1, 10.0]}, seeds=[5])
    for setting, config in trials(fake).items():
        mine = config.optimization.lr / METHODS["la-lora"].learning_rates[1]
        theirs = trials(fake, "rolora")[setting].optimization.lr / METHODS["rolora"].learning_rates[1]
        assert mine == pytest.approx(theirs, rel=1e-3) and ("." in setting or 0.1 <= mine <= 10)


def test_whole_numbers_stay_whole_and_ranges_are_logarithmic():
    grid = Grid(grid_config(Path("none"), search={"rounds": [30, 120], "sums_share": [0.05, 0.5]}), {})
    assert grid.values("la-lora", 1.0, {"rounds": 0.5, "sums_share": 0.0}) == {"rounds": 60, "sums_share": 0.05}
    assert grid.values("la-lora", 1.0, {"rounds": 1.5, "sums_share": 1.5})["rounds"] == 240


@pytest.mark.slow
def test_a_share_is_never_widened_beyond_what_a_run_can_have(tmp_path, fake):
    fake.verdict = lambda config: (config.privacy.sums_share / 2, 0.7)
    searched(tmp_path / "grid", search={"sums_share": [0.3, 0.99]}, search_trials=6, seeds=[5], methods=["head-only"])
    shares = [config.privacy.sums_share for config in trials(fake, "head-only").values()]
    assert len(shares) > 6 and max(shares) < 1
    text = (tmp_path / "grid" / "comparison.md").read_text()
    assert re.search(
        r"2 more were drawn beyond it, at most 2 times: in 1 of 1 searches; [01] of 1 chose at an edge", text
    )


def test_the_mean_over_tuning_seeds_decides_then_the_loss(tmp_path, fake):
    def verdict(config: RunConfig) -> tuple[float, float]:
        rates = sorted(c for c in (0.0, config.optimization.lr))
        lucky = config.run.seed == 100 and rates[1] < 0.5
        return (0.9 if lucky else 0.2 if config.optimization.lr < 0.5 else 0.6), 1 / config.optimization.lr

    fake.verdict = verdict
    searched(tmp_path / "grid", search={"lr": [0.1, 10.0]}, seeds=[5])
    first = {s: c.optimization.lr for s, c in trials(fake).items()}
    assert any(rate < 0.5 for rate in first.values())
    assert chosen(fake) == {max(first.values())}  # of those equally good the one of the lowest loss


def test_what_diverged_is_not_chosen_nor_run_again(tmp_path, fake):
    fake.verdict = lambda config: None if config.optimization.lr > 1 else (0.5 + config.optimization.lr / 10, 0.7)
    shown = searched(tmp_path / "grid", seeds=[5])
    assert "diverged: TooFewClients: Round 1 has too few usable updates" in shown and "failed" not in shown
    assert all(rate <= 1 for rate in chosen(fake)) and len(chosen(fake)) == 1
    diverged = [s for s, c in trials(fake).items() if c.optimization.lr > 1]
    assert diverged and not set(diverged) & set(trials(fake, seed=101))
    assert re.search(r"\d+ of \d+ settings diverged", (tmp_path / "grid" / "comparison.md").read_text())
    statuses = set(pandas.read_csv(tmp_path / "grid" / "trials.csv")["status"])
    assert statuses == {"finished", "diverged", "left out"}
    fake.ran.clear()
    searched(tmp_path / "grid", seeds=[5])
    assert fake.ran == fake.resumed == [] and not (tmp_path / "grid" / "failures.json").exists()


@pytest.mark.slow
def test_where_all_diverged_its_cells_are_not_run(tmp_path, fake):
    fake.verdict = lambda config: None if config.federation.method == "la-lora" else (0.6, 0.7)
    searched(tmp_path / "grid", seeds=[5])
    assert not any(name == "la-lora/eps1/seed5" for name in fake.ran) and "dp-lora/eps1/seed5" in fake.ran
    assert read_failures(tmp_path / "grid") == {"cells/la-lora/eps1/seed5": NO_SETTING}


@pytest.mark.slow
def test_a_cell_that_diverged_is_counted_and_not_run_again(tmp_path, fake):
    fake.verdict = lambda config: None if config.run.seed == 6 else (0.6, 0.7)
    quietly(grid_config(tmp_path / "grid", epsilons=[1], seeds=[5, 6, 7]))
    text = (tmp_path / "grid" / "comparison.md").read_text()
    assert "2 of 6 runs diverged, and are in no mean" in text and "(n = 2)" in text and "missing" not in text
    fake.ran.clear()
    quietly(grid_config(tmp_path / "grid", epsilons=[1], seeds=[5, 6, 7]))
    assert fake.ran == fake.resumed == []


@pytest.mark.slow
def test_a_failed_trial_stops_its_own_cells_only(tmp_path, fake):
    fake.verdict = best_near(0.9)
    fake.broken = {"la-lora/eps1/s1/seed100": RuntimeError("no memory")}
    shown = searched(tmp_path / "grid")
    assert "failed: la-lora, ε = 1, trial s1, seed 100: RuntimeError: no memory" in shown
    assert "failed: la-lora, ε = 1, seed 0: its search is not complete" in shown
    assert {name for name in fake.ran if name.count("/") == 2} == {"dp-lora/eps1/seed0", "dp-lora/eps1/seed1"}
    assert "trial s1, seed 100</th>" in write_page(tmp_path / "grid").read_text()
    before = dict(fake.configs)
    fake.broken = {}
    searched(tmp_path / "grid")
    assert fake.resumed == ["la-lora/eps1/s1/seed100"]
    new = set(fake.configs) - set(before)
    assert {"la-lora/eps1/s1/seed101", "la-lora/eps1/seed0", "la-lora/eps1/seed1"} <= new
    assert not any(name.startswith("dp-lora") for name in new)


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 7, 13, 18, 22])
def test_a_killed_comparison_goes_on_with_the_same_choices(tmp_path, fake, place):
    fake.verdict = best_near(30.0)  # beyond the range, so that it is widened
    searched(tmp_path / "whole")
    order, whole = list(fake.ran), {name: config.optimization.lr for name, config in fake.configs.items()}
    assert any("." in name for name in whole) and len(order) > 22
    fake.ran, fake.configs, fake.broken = [], {}, {order[place]: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "cut")
    assert fake.ran == order[: place + 1]
    fake.broken = {}
    searched(tmp_path / "cut")
    assert {name: config.optimization.lr for name, config in fake.configs.items()} == whole
    assert sorted(fake.ran) == sorted(order) and fake.resumed == [order[place]]


@pytest.mark.slow
def test_more_trials_keep_the_earlier_ones(tmp_path, fake):
    fake.verdict = best_near(0.9)
    searched(tmp_path / "grid", search_trials=2)
    before, first = set(fake.ran), chosen(fake)
    fake.ran.clear()
    shown = searched(tmp_path / "grid", search_trials=9)
    assert fake.ran and not before & set(fake.ran)
    best = min(trials(fake).values(), key=lambda c: abs(math.log(c.optimization.lr / 0.9))).optimization.lr
    assert best not in first
    # The cells were run at what was best of two; they are not taken for what is best of nine.
    assert f"failed: la-lora, ε = 1, seed 0: {OTHER_SETTING}" in shown
    assert "| – " in (tmp_path / "grid" / "comparison.md").read_text()
    (tmp_path / "grid" / "cells").rename(tmp_path / "aside")
    searched(tmp_path / "grid", search_trials=9)
    assert {read_config(path.parent).optimization.lr for path in tmp_path.glob("grid/cells/*/*/*/config.yaml")} == {
        best
    }
    with pytest.raises(ValueError, match="search_trials differ"):
        searched(tmp_path / "grid", search_trials=4)


@pytest.mark.slow
def test_what_was_searched_is_told(tmp_path, fake):
    fake.verdict = best_near(0.9)
    searched(tmp_path / "grid", epsilons=[1, "none"], methods=["rolora"])
    words = (tmp_path / "grid" / "comparison.md").read_text()
    assert "Settings: lr from 0.1 to 10, max_grad_norm from 0.5 to 2; for each method at each ε the best of 4" in words
    assert "by mean accuracy on these validation data over seeds 100, 101." in words
    runs = pandas.read_csv(tmp_path / "grid" / "trials.csv", dtype={"epsilon": str})
    most = int((runs["epsilon"] == "1.0").sum())
    assert f"a run costs up to {most + 1} times its ε, at {most + 1} times δ" in words
    page = write_page(tmp_path / "grid").read_text()
    assert f"{len(runs)} trials of settings" in page and f"max_grad_norm {runs['max_grad_norm'][0]:g}" in page
    assert Outcomes(Grid.read(tmp_path / "grid"), tmp_path / "grid").left() == 0
    with pytest.raises(ValueError, match="search differ"):
        searched(tmp_path / "grid", epsilons=[1, "none"], methods=["rolora"], search={"lr": [0.1, 1.0]})


@pytest.mark.slow
def test_the_metric_chooses_and_is_shown(tmp_path, fake):
    """In these runs balanced accuracy is what accuracy lacks to one."""
    fake.verdict = lambda config: (0.1 + config.optimization.lr / 20, 0.7)
    lowest = {}
    for metric in ("accuracy", "balanced-accuracy"):
        fake.configs = {}
        searched(tmp_path / metric, metric=metric, search={"lr": [0.1, 10.0]}, seeds=[5, 6], methods=["rolora"])
        lowest[metric] = chosen(fake).pop()
    assert lowest["balanced-accuracy"] < 0.2 and lowest["accuracy"] > 10
    text = (tmp_path / "balanced-accuracy" / "comparison.md").read_text()
    assert "Balanced accuracy (mean recall of the classes) after the last round" in text
    assert "Before training: 25.0" in text and "by mean balanced accuracy on" in text
    cells = pandas.read_csv(tmp_path / "balanced-accuracy" / "comparison.csv")
    assert list(cells["balanced_accuracy_after"]) == pytest.approx(list(1 - cells["accuracy_after"]))
    assert list(cells["mean"]) == pytest.approx([cells["balanced_accuracy_after"].mean()] * 2)
