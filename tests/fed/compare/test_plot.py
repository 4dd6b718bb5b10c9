"""The picture of a grid: a panel for each budget, a row for each method."""

from pathlib import Path
from typing import Any

import pandas
import pytest
from PIL import Image

from lora_dp.fed.compare import plot, tables
from tests.fed.compare.small_grids import grid_config, quietly


def cells(results: dict[Any, dict[str, list[float]]], before: float = 0.6) -> pandas.DataFrame:
    return tables.frame(
        [
            tables.row(
                {"method": method, "epsilon": epsilon, "seed": seed, "status": "finished"},
                None,
                Path(method),
                {"accuracy_before": before, "accuracy_after": accuracy},
            )
            for epsilon, methods in results.items()
            for method, accuracies in methods.items()
            for seed, accuracy in enumerate(accuracies)
        ]
    )


def means(axes: Any) -> dict[int, float]:
    """Of a panel, by row."""
    found = [line for line in axes.get_lines() if "mean" in line.get_label() or "worse" in line.get_label()]
    return {int(line.get_ydata()[0]): float(line.get_xdata()[0]) for line in found}


def test_methods_are_sorted_by_the_smallest_budget_and_seeds_are_dots():
    given = {
        1.0: {"middle": [0.7, 0.72], "best": [0.8, 0.81], "head-only": [0.6, 0.62]},
        "none": {"middle": [0.9, 0.92], "best": [0.8, 0.81], "head-only": [0.7, 0.71]},
    }
    figure = plot.draw(cells(given), "accuracy")
    first, second = figure.axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["head-only", "middle", "best"]
    assert [axes.get_title(loc="left") or axes.get_title() for axes in (first, second)] == ["ε = 1", "no privacy"]
    assert means(first) == pytest.approx({2: 80.5, 1: 71.0, 0: 61.0})
    assert means(second) == pytest.approx({2: 80.5, 1: 91.0, 0: 70.5})
    [dots] = [line for line in first.get_lines() if line.get_label() == "one seed"]
    assert sorted(dots.get_xdata()) == pytest.approx([60, 62, 70, 72, 80, 81])
    labels = {line.get_label(): line.get_xdata()[0] for line in first.get_lines()}
    assert labels["head-only"] == pytest.approx(61.0) and labels["before training"] == pytest.approx(60.0)


def test_what_is_worse_at_5_percent_is_open_and_the_best_has_its_colour():
    given = {8.0: {"best": [0.9, 0.8, 0.7], "worse": [0.88, 0.781, 0.68], "near": [0.8, 0.85, 0.7]}}
    lines = {line.get_label(): line for line in plot.draw(cells(given), "accuracy").axes[0].get_lines()}
    assert lines["worse than the best at 5 %"].get_markerfacecolor() == "white"
    assert lines["best mean"].get_color() != lines["mean"].get_color() == lines["mean"].get_markerfacecolor()


def test_a_mean_far_below_all_others_does_not_squeeze_them():
    good = {f"m{index}": [0.96 + index / 1000, 0.97] for index in range(6)}
    axes = plot.draw(cells({8.0: {**good, "lost": [0.1, 0.3]}}), "accuracy").axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert axes.get_xlim()[0] > 90 and "◂ 20.0" in texts and "◂ 60.0 before training" in texts
    assert axes.get_xlim()[1] <= 101


def test_starts_that_differ_from_row_to_row_have_no_line():
    for other, drawn in ((0.62, True), (0.1, False)):
        given = cells({8.0: {"a": [0.7, 0.72], "b": [0.6, 0.62]}})
        given.loc[given["method"] == "b", "accuracy_before"] = other
        axes = plot.draw(given, "accuracy").axes[0]
        told = [*(line.get_label() for line in axes.get_lines()), *(text.get_text() for text in axes.texts)]
        assert any("before training" in words for words in told) == drawn


def test_a_budget_without_results_and_a_method_without_any():
    given = cells({1.0: {"a": [0.7], "b": [0.6]}, 8.0: {"a": [0.9], "b": [0.8]}})
    given.loc[(given["epsilon"] == 1.0) | (given["method"] == "b"), "status"] = "failed"
    first, second = plot.draw(given, "accuracy").axes
    assert means(first) == {} and len(means(second)) == 1


@pytest.mark.slow
def test_the_picture_of_a_grid_is_written(tmp_path, fake):
    quietly(grid_config(tmp_path / "grid", epsilons=[1, 8, "none"]))
    with Image.open(tmp_path / "grid" / "comparison.png") as image:
        assert image.size[0] > 1000
