"""What stands below the table: all that a reader must be told."""

import pytest
from rich.console import Console

from lora_dp.fed.compare.comparison import compare
from tests.fed.compare.small_grids import SMALL, grid_config, quietly


@pytest.mark.slow
def test_notes_of_runs_that_guarantee_nothing(tmp_path, fake):
    quietly(grid_config(tmp_path / "a", methods=["la-lora"], epsilons=[8]), mechanism="as-released")
    text = (tmp_path / "a" / "comparison.md").read_text()
    assert "No privacy guarantee (ε = ∞)" in text and "does not keep" in text and "δ" not in text
    assert "| ε = ∞ (set for 8) " in text
    with pytest.raises(ValueError, match="cell dp-lora, ε = 1, seed 0 cannot be run: mechanism as-released is there"):
        quietly(grid_config(tmp_path / "c", methods=["la-lora", "dp-lora"]), mechanism="as-released")
    quietly(grid_config(tmp_path / "b", epsilons=[8]), reproducible=True)
    assert "do not release" in (tmp_path / "b" / "comparison.md").read_text()


@pytest.mark.slow
def test_what_tuning_would_cost_is_said_where_there_is_privacy(tmp_path, fake):
    search = {"search": {"lr": [0.1, 1.0], "max_grad_norm": [0.5, 2.0]}, "search_trials": 5, "seeds": [5]}
    fake.verdict = lambda config: (
        0.5 if config.optimization.lr > 0.5 else 0.6 if config.optimization.lr > 0.2 else 0.4,
        1,
    )
    for name, epsilons in (("private", [1]), ("open", ["none"])):
        quietly(grid_config(tmp_path / name, epsilons=epsilons, tuning_seeds=[100, 101, 102], **search))
    private, plain = ((tmp_path / name / "comparison.md").read_text() for name in ("private", "open"))
    trials = len(list((tmp_path / "private" / "trials" / "la-lora" / "eps1").glob("*/*/summary.json")))
    assert trials >= 15 and trials % 3 == 0
    assert f"With it a run costs up to {trials + 1} times its ε, at {trials + 1} times δ (basic composition" in private
    assert "times its ε" not in plain and "over seeds 100, 101, 102" in plain


@pytest.mark.slow
def test_numbers_of_rounds_that_were_searched_are_not_told_as_if_all_had_them(tmp_path, fake):
    config = grid_config(tmp_path / "grid", epsilons=[1], seeds=[5], search={"rounds": [2, 6]}, search_trials=2)
    common = {name: value for name, value in SMALL.items() if name != "rounds"}
    compare(config, common, Console(quiet=True))
    text = (tmp_path / "grid" / "comparison.md").read_text()
    assert "2 clients, as many rounds of 1 local steps as were chosen" in text


@pytest.mark.slow
def test_a_variants_own_rate_is_not_told_as_that_of_all(tmp_path, fake):
    variants = {"fast": {"method": "la-lora", "lr": 50.0}}
    for name, common, words in (
        ("given", {"lr": 5.0}, "Learning rates: 5 for all but variants that name their own."),
        ("own", {}, "Learning rates: each method's default for its ε, but variants that name their own."),
    ):
        config = grid_config(tmp_path / name, methods=["dp-lora"], variants=variants, epsilons=[8])
        quietly(config, **common)
        assert words in (tmp_path / name / "comparison.md").read_text()
