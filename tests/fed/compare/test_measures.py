"""What a comparison measures runs by."""

from pathlib import Path
from typing import get_args

import pytest
from pandas import DataFrame

from lora_dp.fed.compare import plot, tables
from lora_dp.fed.compare.grid import Grid
from lora_dp.fed.compare.measures import MEASURES
from lora_dp.fed.compare.options import CompareConfig, Metric
from lora_dp.fed.page import write_page
from tests.fed.compare.small_grids import grid_config, quietly
from tests.fed.tiny_language import language_model, pairs_folder


def test_every_metric_has_a_measure() -> None:
    assert set(MEASURES) == set(get_args(Metric))


def test_values_are_shown_in_their_units() -> None:
    assert MEASURES["accuracy"].shown(0.9123) == "91.2 %" == MEASURES["balanced-accuracy"].shown(0.9123)
    assert MEASURES["perplexity"].shown(9.876) == "9.88" and MEASURES["perplexity"].number(9.876) == "9.88"


def test_less_perplexity_is_better() -> None:
    assert [MEASURES[name].sign for name in ("accuracy", "balanced-accuracy", "perplexity")] == [1, 1, -1]


@pytest.mark.parametrize(
    ("metric", "task", "words"),
    [
        ("perplexity", {}, "perplexity is for task causal-lm"),
        ("perplexity", {"task": "classification"}, "perplexity is for task causal-lm"),
        ("balanced-accuracy", {"task": "causal-lm"}, "balanced-accuracy is for task classification"),
    ],
)
def test_a_metric_of_another_task_is_refused(metric: Metric, task: dict, words: str) -> None:
    config = CompareConfig(methods=["la-lora"], epsilons=[8], seeds=[0], metric=metric)
    with pytest.raises(ValueError, match=words):
        Grid(config, {"dataset": "elsewhere", **task})


@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
def test_a_language_model_has_both_accuracy_and_perplexity(metric: Metric) -> None:
    config = CompareConfig(methods=["la-lora"], epsilons=[8], seeds=[0], metric=metric)
    assert Grid(config, {"dataset": "elsewhere", "task": "causal-lm"}).metric == metric


def test_language_models_are_chosen_by_perplexity_unless_told_otherwise() -> None:
    config = CompareConfig(methods=["la-lora"], epsilons=[8], seeds=[0])
    assert Grid(config, {"dataset": "elsewhere", "task": "causal-lm"}).metric == "perplexity"
    assert Grid(config, {"dataset": "elsewhere"}).metric == "accuracy"


def cells(results: dict[str, list[float]], before: float) -> DataFrame:
    """Runs of one budget with these perplexities, seed by seed."""
    return tables.frame(
        [
            tables.row(
                {"method": method, "epsilon": 8.0, "seed": seed, "status": "finished"},
                None,
                Path(method),
                {"perplexity_before": before, "perplexity_after": value},
            )
            for method, values in results.items()
            for seed, value in enumerate(values)
        ]
    )


RESULTS = {"worse": [14.0, 14.4, 14.2], "best": [9.0, 9.4, 9.2], "near": [9.1, 9.3, 9.35]}


def test_the_lowest_perplexity_is_the_best_of_a_table() -> None:
    numbers = tables.statistics(cells(RESULTS, 17.0), "perplexity").set_index("method")
    assert numbers.loc["best", "mean"] == pytest.approx(9.2)  # not in percent
    assert numbers["p"].isna().to_dict() == {"worse": False, "best": True, "near": False}
    assert numbers["tied"].to_dict() == {"worse": False, "best": False, "near": True}
    text = tables.markdown(cells(RESULTS, 17.0), "perplexity")
    assert "**9.20 ± 0.50**" in text and "9.25 ± 0.33†" in text and "| 14.20 ± 0.50 " in text
    saved = tables.with_intervals(cells(RESULTS, 17.0), "perplexity")
    assert saved.loc[saved["method"] == "best", "mean"].iloc[0] == pytest.approx(9.2)


def test_the_picture_has_the_best_to_the_right_and_its_numbers_are_as_they_are() -> None:
    figure = plot.draw(cells(RESULTS, 17.0), "perplexity")
    [axes] = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["worse", "near", "best"]
    figure.canvas.draw()
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert shown == sorted(shown, key=float, reverse=True) and not any("−" in text or "-" in text for text in shown)
    lines = {line.get_label(): abs(line.get_xdata()[0]) for line in axes.get_lines()}
    assert lines["best mean"] == pytest.approx(9.2) and lines["before training"] == pytest.approx(17.0)
    far = plot.draw(cells(RESULTS, 400.0), "perplexity").axes[0]
    assert any("◂ 400.00 before training" in text.get_text() for text in far.texts)


@pytest.mark.slow
def test_a_grid_of_language_models_is_compared_by_perplexity(tmp_path: Path) -> None:
    said = quietly(
        grid_config(tmp_path / "grid", methods=["ffa-lora", "rolora"], epsilons=[8], seeds=[0, 1], metric="perplexity"),
        task="causal-lm",
        model=language_model(tmp_path / "model"),
        dataset=pairs_folder(tmp_path / "data"),
        r=2,
        generate=2,
    )
    assert "ffa-lora, ε = 8, seed 0   perplexity " in said and "failed" not in said
    text = (tmp_path / "grid" / "comparison.md").read_text()
    assert "Perplexity (lower is better) after the last round, over the completions' tokens" in text
    page = write_page(tmp_path / "grid").read_text()
    assert "Perplexity by round" in page and "Accuracy by round" not in page
    assert (tmp_path / "grid" / "comparison.png").exists()
