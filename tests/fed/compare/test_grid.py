"""The definition of a grid of runs: its cells, and what makes no sense."""

import pytest
import yaml
from rich.console import Console

from lora_dp.fed.compare.comparison import Cell, Grid, compare
from lora_dp.fed.compare.options import CompareConfig
from tests.fed.compare.small_grids import SMALL, grid_config, quietly


@pytest.mark.slow
def test_another_definition_is_refused(tmp_path, fake):
    quietly(grid_config(tmp_path / "grid", epsilons=[8]))
    fake.ran.clear()
    with pytest.raises(ValueError, match=r"another comparison \(seeds, rounds differ\)"):
        quietly(grid_config(tmp_path / "grid", epsilons=[8], seeds=[0]), rounds=3)
    assert fake.ran == []
    quietly(grid_config(tmp_path / "grid", epsilons=[8.0], processes=1), max_grad_norm=1.0)  # a default, written out
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(ValueError, match="holds a run"):
        quietly(grid_config(tmp_path / "run"))


def test_compare_yaml_defines_the_same_grid(tmp_path, fake):
    config = grid_config(tmp_path / "grid", epsilons=[8, "none"], methods=["flora"])
    compare(config, {**SMALL, "ranks": {4: 0.5, 8: 0.5}}, Console(quiet=True))
    grid = Grid.read(tmp_path / "grid")
    same = Grid(config, {**SMALL, "ranks": {"4": 0.5, "8": 0.5}})
    assert grid.cells == same.cells
    assert [grid.config(c, None).to_yaml() for c in grid.cells] == [same.config(c, None).to_yaml() for c in same.cells]
    plain = yaml.safe_load((tmp_path / "grid" / "compare.yaml").read_text())
    assert plain["epsilons"] == [8.0, "none"] and plain["rounds"] == SMALL["rounds"]
    assert "lr" not in plain and "model" not in plain  # which a method may choose
    assert not {"method", "epsilon", "seed", "output", "processes"} & set(plain)


def test_all_cells_are_checked_before_the_first_runs(tmp_path, fake):
    with pytest.raises(ValueError, match=r"cell la-lora, no privacy, seed 0 cannot be run: mechanism as-released"):
        quietly(grid_config(tmp_path / "grid", methods=["la-lora"], epsilons=[8, "none"]), mechanism="as-released")
    methods = ["la-lora", "dp-lora", "rolora", "deer", "flora"]
    with pytest.raises(ValueError, match="Nor can dp-lora, ε = 8; dp-lora, no privacy; rolora, ε = 8 and 4 more"):
        quietly(grid_config(tmp_path / "grid", methods=methods, epsilons=[8, "none"]), mechanism="as-released")
    with pytest.raises(ValueError, match="no method 'lalora'"):
        quietly(grid_config(tmp_path / "grid", methods=["la-lora", "lalora"]))
    with pytest.raises(ValueError, match="The grid sets epsilon"):
        quietly(grid_config(tmp_path / "grid"), epsilon=3)
    assert fake.ran == [] and not (tmp_path / "grid").exists()


@pytest.mark.parametrize(
    ("search", "common", "message"),
    [
        ({"lrr": [0.1, 1]}, {}, r"search cannot have lrr \(did you mean lr\?\)"),
        ({"epsilon": [1, 8]}, {}, "search cannot have epsilon"),
        ({"clients": [2, 8]}, {}, "search cannot have clients"),
        ({"feature_blocks": [1, 2]}, {}, "search cannot have feature_blocks"),
        ({"lr": [0.1, 1], "lr_factor": [0.1, 1]}, {}, "both lr and lr_factor: leave one out"),
        ({"lr_factor": [0.1, 1]}, {"lr": 0.3}, "lr and search's lr_factor were both given"),
        ({"rounds": [3, 9]}, {"rounds": 5}, "rounds and search's rounds were both given"),
        ({"sums_share": [0.1, 2]}, {}, r"cell la-lora, ε = 1, trial s\d, seed 100 cannot be run: sums_share must be"),
    ],
)
def test_what_cannot_be_searched(search, common, message):
    with pytest.raises(ValueError, match=message):
        Grid(CompareConfig(search=search), common)


def test_variants_are_rows_with_options_of_their_own(tmp_path, fake):
    """Searched as methods are; with a recipe where their method has one; and the same when read again."""
    variants = {"bare": {"method": "head-only", "averaging": "none"}, "slow": {"method": "la-lora", "rounds": 7}}
    config = grid_config(
        tmp_path / "grid", methods=["la-lora"], variants=variants, epsilons=[1], seeds=[5], search={"lr": [0.1, 1.0]}
    )
    common = {name: value for name, value in SMALL.items() if name != "rounds"}
    compare(config, common, Console(quiet=True))
    grid = Grid.read(tmp_path / "grid")
    assert [cell.method for cell in grid.cells] == ["la-lora", "bare", "slow"]
    assert {row for row, _ in grid.searches} == {"la-lora", "bare", "slow"}
    runs = {name: fake.configs[f"{name}/eps1/seed5"] for name in ("la-lora", "bare", "slow")}
    assert [run.federation.method for run in runs.values()] == ["la-lora", "head-only", "la-lora"]
    assert runs["bare"].optimization.averaging == "none" and runs["bare"].optimization.server_optimizer == "momentum"
    assert [run.federation.rounds for run in runs.values()] == [20, 60, 7]
    assert len({run.optimization.lr for run in runs.values()}) == 1  # the same draws, with equal results
    text = (tmp_path / "grid" / "comparison.md").read_text()
    assert "Variants: bare is head-only with averaging none; slow is la-lora with rounds 7." in text
    assert "| `bare`" in text
    config.variants = {}
    with pytest.raises(ValueError, match=r"another comparison \(variants differ\)"):
        compare(config, common, Console(quiet=True))


def test_rows_that_would_share_a_folder_are_refused():
    for name in ("LA-lora", "flat-lora-deer"):
        grid = CompareConfig(methods=["la-lora", "flat-lora:deer"], variants={name: {"method": "deer"}})
        with pytest.raises(ValueError, match="would share a folder: rename a variant"):
            Grid(grid, {})


def test_an_option_that_a_variant_cannot_have_is_named():
    grid = CompareConfig(methods=[], variants={"bare": {"method": "la-lora", "roundz": 3}}, epsilons=[1.0], seeds=[0])
    with pytest.raises(ValueError, match=r"The cell bare, ε = 1, seed 0 cannot be run: .*roundz"):
        Grid(grid, {})


def test_cells_folders():
    assert Cell("flat-lora:deer", 0.5, 3).path.as_posix() == "cells/flat-lora-deer/eps0.5/seed3"
    assert Cell("deer", 8.0, 100, "s3.1").path.as_posix() == "trials/deer/eps8/s3.1/seed100"
    assert Cell("deer", "none", 0).path.as_posix() == "cells/deer/epsnone/seed0"
