"""The tables and the plot of a grid."""

import re
import statistics

import pandas
import pytest
from PIL import Image

from lora_dp.fed.compare import grid as module
from lora_dp.fed.compare import tables
from lora_dp.fed.compare.comparison import Grid
from tests.fed.compare.small_grids import ACCURACY, grid_config, quietly


@pytest.mark.slow
def test_the_table_has_mean_and_sample_deviation(tmp_path, fake):
    shown = quietly(grid_config(tmp_path / "grid"))
    text = (tmp_path / "grid" / "comparison.md").read_text(encoding="utf-8")
    rows = {
        line.split("|")[1].strip(" `"): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    }
    assert rows["method"] == ["ε = 1", "ε = 8"]
    for (method, epsilon), values in ACCURACY.items():
        entry = f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"
        assert rows[method][0 if epsilon == 1 else 1].strip("*") == entry
    # At ε = 8 both are equal as printed.
    bold = {method: [cell.startswith("**") for cell in rows[method]] for method in rows}
    assert bold["la-lora"] == [True, True] and bold["dp-lora"] == [False, True]
    for words in (
        "digits",
        "model default",
        "2 clients",
        "2 rounds",
        "δ = 1e-05",
        "one example of one client",
        "n = 3 seeds (0, 1, 2)",
        "sample standard deviation",
        "Before training: 50.0",
    ):
        assert words in text, words
    assert "90.0 ± 1.2" in shown and len(fake.ran) == 12
    assert "la-lora, ε = 1, seed 1   accuracy 91.2 %" in shown.splitlines()


def test_csv_has_a_row_a_cell(tmp_path, fake):
    quietly(grid_config(tmp_path / "grid", epsilons=[8, "none"]))
    cells = pandas.read_csv(tmp_path / "grid" / "comparison.csv", keep_default_na=False)
    assert len(cells) == 12 and list(cells["epsilon"].unique()) == ["8.0", "none"]
    one = cells[(cells["method"] == "dp-lora") & (cells["epsilon"] == "8.0") & (cells["seed"] == 1)].iloc[0]
    assert float(one["accuracy_after"]) == 0.97 and float(one["worst_epsilon"]) == 8 * 0.99
    assert one["folder"] == "cells/dp-lora/eps8/seed1" and one["status"] == "finished"


def test_latex_is_balanced_and_plain_ascii(tmp_path, fake):
    quietly(grid_config(tmp_path / "grid"), dataset="my_data & 100% {#}")
    text = (tmp_path / "grid" / "comparison.tex").read_text()
    assert text.isascii()
    assert r"my\_data \& 100\% \{\#\}" in text and r"\textbf{90.0 $\pm$ 1.2}" in text
    for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}{lcc}", r"\label{tab:comparison}"):
        assert text.count(rule) == 1
    assert re.findall(r"\\begin{(\w+)}", text) == re.findall(r"\\end{(\w+)}", text)[::-1]
    bare = re.sub(r"\\[{}$&%#_]", "", text)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
    rows = [line for line in text.splitlines() if line.endswith(r"\\") and "lora" in line]
    assert len(rows) == 2 and all(line.count("&") == 2 for line in rows)


@pytest.mark.slow
def test_the_plot_has_every_method(tmp_path, fake):
    quietly(grid_config(tmp_path / "grid", epsilons=[1, 8, "none"]))
    with Image.open(tmp_path / "grid" / "comparison.png") as image:
        assert image.size[0] > 1000
    grid = Grid.read(tmp_path / "grid")
    axes = tables.draw(module.read_cells(grid, tmp_path / "grid")).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["ε = 1", "ε = 8", "no privacy"]
    bars = {container.get_label(): container.lines[0].get_ydata() for container in axes.containers}
    assert bars["la-lora"][0] == pytest.approx(100 * statistics.mean(ACCURACY["la-lora", 1.0]))
    assert bars["dp-lora"][1] == pytest.approx(96.0)


@pytest.mark.slow
def test_a_mean_far_below_all_others_does_not_squeeze_them(tmp_path, fake, monkeypatch):
    monkeypatch.setitem(ACCURACY, ("rolora", 1.0), (0.1, 0.97, 0.96))
    for method in ("la-lora", "dp-lora", "ffa-lora", "deer", "galore", "rolora"):
        for epsilon in (1.0, 8.0):
            if (method, epsilon) != ("rolora", 1.0):
                monkeypatch.setitem(ACCURACY, (method, epsilon), (0.96, 0.97, 0.98))
    methods = ["la-lora", "dp-lora", "ffa-lora", "deer", "galore", "rolora"]
    quietly(grid_config(tmp_path / "grid", methods=methods))
    grid = Grid.read(tmp_path / "grid")
    axes = tables.draw(module.read_cells(grid, tmp_path / "grid")).axes[0]
    assert axes.get_ylim()[0] > 90 and "68 ± 50" in [text.get_text() for text in axes.texts]


def test_one_seed_has_no_spread(tmp_path, fake):
    quietly(grid_config(tmp_path / "grid", seeds=[1]))
    text = (tmp_path / "grid" / "comparison.md").read_text()
    assert "±" not in text and "n = 1, seed 1" in text and "91.2" in text


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
