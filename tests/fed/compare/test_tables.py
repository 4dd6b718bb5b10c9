"""The tables of a grid."""

import re
import statistics
from pathlib import Path

import pandas
import pytest

from lora_dp.fed.compare import tables
from tests.fed.compare.small_grids import ACCURACY, grid_config, quietly


@pytest.mark.slow
def test_the_table_has_means_and_their_intervals(tmp_path, fake):
    shown = quietly(grid_config(tmp_path / "grid"))
    text = (tmp_path / "grid" / "comparison.md").read_text(encoding="utf-8")
    rows = {
        line.split("|")[1].strip(" `"): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    }
    assert rows["method"] == ["ε = 1", "ε = 8"]
    for (method, epsilon), values in ACCURACY.items():
        half = 4.302653 * 100 * statistics.stdev(values) / 3**0.5  # t of two degrees of freedom
        entry = f"{100 * statistics.mean(values):.1f} ± {half:.1f}"
        assert rows[method][0 if epsilon == 1 else 1].strip("*†") == entry
    # At ε = 8 both are equal as printed.
    bold = {method: [cell.startswith("**") for cell in rows[method]] for method in rows}
    assert bold["la-lora"] == [True, True] and bold["dp-lora"] == [False, True]
    marked = {method: ["†" in cell for cell in rows[method]] for method in rows}
    assert marked["la-lora"] == [False, False] and marked["dp-lora"] == [True, True]
    for words in (
        "digits",
        "model default",
        "2 clients",
        "2 rounds",
        "δ = 1e-05",
        "one example of one client",
        "n = 3 seeds (0, 1, 2)",
        "half of the 95 % confidence interval",
        "cannot be told from it at 5 % (paired t-test on the n = 3 seeds",
        "Before training: 50.0",
    ):
        assert words in text, words
    assert "90.0 ± 3.1" in shown and len(fake.ran) == 12
    assert "la-lora, ε = 1, seed 1   accuracy 91.2 %" in shown.splitlines()


def test_csv_has_a_row_a_cell(tmp_path, fake):
    quietly(grid_config(tmp_path / "grid", epsilons=[8, "none"]))
    cells = pandas.read_csv(tmp_path / "grid" / "comparison.csv", keep_default_na=False)
    assert len(cells) == 12 and list(cells["epsilon"].unique()) == ["8.0", "none"]
    one = cells[(cells["method"] == "dp-lora") & (cells["epsilon"] == "8.0") & (cells["seed"] == 1)].iloc[0]
    assert float(one["accuracy_after"]) == 0.97 and float(one["worst_epsilon"]) == 8 * 0.99
    column = cells[(cells["method"] == "dp-lora") & (cells["epsilon"] == "8.0")]
    mean, half = (
        statistics.mean(ACCURACY["dp-lora", 8.0]),
        4.302653 * statistics.stdev(ACCURACY["dp-lora", 8.0]) / 3**0.5,
    )
    for name, value in {"mean": mean, "interval_low": mean - half, "interval_high": mean + half}.items():
        assert [float(found) for found in column[name]] == pytest.approx([value] * 3, rel=1e-6)
    assert one["folder"] == "cells/dp-lora/eps8/seed1" and one["status"] == "finished"


def test_latex_is_balanced_and_plain_ascii(tmp_path, fake):
    quietly(grid_config(tmp_path / "grid"), dataset="my_data & 100% {#}")
    text = (tmp_path / "grid" / "comparison.tex").read_text()
    assert text.isascii()
    assert r"my\_data \& 100\% \{\#\}" in text and r"\textbf{90.0 $\pm$ 3.1}" in text and r"$\dagger$" in text
    for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}{lcc}", r"\label{tab:comparison}"):
        assert text.count(rule) == 1
    assert re.findall(r"\\begin{(\w+)}", text) == re.findall(r"\\end{(\w+)}", text)[::-1]
    bare = re.sub(r"\\[{}$&%#_]", "", text)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
    rows = [line for line in text.splitlines() if line.endswith(r"\\") and "lora" in line]
    assert len(rows) == 2 and all(line.count("&") == 2 for line in rows)


def test_one_seed_has_no_spread(tmp_path, fake):
    quietly(grid_config(tmp_path / "grid", seeds=[1]))
    text = (tmp_path / "grid" / "comparison.md").read_text()
    assert "±" not in text and "n = 1, seed 1" in text and "91.2" in text


def rows(**results: list[float]) -> pandas.DataFrame:
    """Cells of one budget: accuracies of each method by seed."""
    return tables.frame(
        [
            tables.row(
                {"method": method, "epsilon": 8.0, "seed": seed, "status": "finished"},
                None,
                Path(method),
                {"accuracy_after": accuracy},
            )
            for method, accuracies in results.items()
            for seed, accuracy in enumerate(accuracies)
        ]
    )


def test_a_method_that_is_worse_seed_by_seed_has_no_mark():
    cells = rows(best=[0.9, 0.8, 0.7, 0.85], worse=[0.89, 0.791, 0.689, 0.8401], near=[0.91, 0.7, 0.75, 0.8])
    shown = tables.table(cells, "accuracy", lambda entry: f"<{entry}>")
    assert [entry[0] == "<" for entry in shown["ε = 8"]] == [True, False, False]
    assert ["†" in entry for entry in shown["ε = 8"]] == [False, False, True]
    p = tables.with_intervals(cells, "accuracy").drop_duplicates("method")["p_against_best"]
    assert pandas.isna(p.iloc[0]) and p.iloc[1] < 0.01 and p.iloc[2] > 0.3


def test_rows_keep_the_order_of_the_grid():
    found = tables.statistics(rows(z=[0.5], a=[0.6]), "accuracy")
    assert list(found["method"]) == ["z", "a"] and list(found["n"]) == [1, 1] and found["half_width"].isna().all()
    assert not found["tied"].any()
