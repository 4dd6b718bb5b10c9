"""A server that asks again: no turn is repeated beyond what the node's ledger and policy admit."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from lora_dp.fed.config import RunConfig
from lora_dp.fed.rounds.messages import Update
from lora_dp.fed.rounds.setup import plan_of
from lora_dp.privacy.accounting import Ledger
from tests.fed.flower.asking_servers import WHOLE, answer, policy, sent
from tests.fed.flower.node_data import GOOD

SPENT = "has released all that this run's plan accounts for, and what is repeated counts again"


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"method": "deer"}, WHOLE], ids=["a-turn", "two-turns", "whole-clients"])
@pytest.mark.parametrize("same", [True, False])
def test_no_turn_is_repeated_beyond_what_the_runs_plan_accounts_for(options, same, node, state):
    options = {**options, "epsilon": 2.0}
    node["unit"] = options.get("unit", "example")
    plan = plan_of(RunConfig.from_flat({**GOOD, **options}))
    tasks = [(index, turn, 4) for index in range(plan.rounds) for turn in range(plan.turns)]
    for task in tasks:
        assert isinstance(answer(sent(options, state, tasks[0] if same else task), node), Update)
    ledger = Ledger.load(Path(node["ledger"]))
    assert ledger.steps == plan.planned_releases and 1.5 < ledger.epsilon(1e-5, "rdp") <= 2.0
    before = Path(node["ledger"]).read_text()
    for task in tasks:
        said = answer(sent(options, state, task), node)
        assert isinstance(said, str) and said.startswith(SPENT)
    assert Path(node["ledger"]).read_text() == before


# The same run for a node with data of its own, whatever else a server writes there.
REWORDED: list[dict[str, Any]] = [
    {"seed": 0},
    {"alpha": 8},
    {"alpha": 8.0},
    {"evaluate_every": 7},
    {"min_clients": 2, "client_timeout": math.inf},
    {"device": "cpu", "output": "elsewhere"},
    {"engine": "local"},
    {"fault_norm": 3.0, "weighting": "equal"},
    {"dataset": "/etc", "label_column": "other"},
    {"partition": "dirichlet", "dirichlet_alpha": math.inf},
    {"split_seed": 5},
    {"checkpoint_every": 4},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", REWORDED, ids=lambda options: "-".join(map(str, options.items())))
def test_a_run_in_other_words_is_the_same_run(options, node, state):
    run = {"epsilon": 2.0, "rounds": 1, "alpha": RunConfig().model.alpha}
    if "alpha" in options:
        run["alpha"] = 8
    assert isinstance(answer(sent(run, state), node), Update)
    said = answer(sent({**run, **options}, state), node)
    assert isinstance(said, str) and said.startswith(SPENT)


@pytest.mark.slow
def test_a_round_that_is_run_again_after_a_crash_counts_again(node, state):
    run = {"epsilon": 2.0}
    for index in (0, 1, 1):
        assert isinstance(answer(sent(run, state, (index, 0, 4)), node), Update)
    said = answer(sent(run, state, (2, 0, 4)), node)
    assert isinstance(said, str) and said.startswith(SPENT)
    assert Ledger.load(Path(node["ledger"])).epsilon(1e-5, "rdp") <= 2.0


@pytest.mark.slow
def test_runs_are_counted_one_by_one(node, state):
    for index in range(3):
        for seed in (1, 2):
            assert isinstance(answer(sent({"epsilon": 1.0, "seed": seed}, state, (index, 0, 4)), node), Update)
    for seed in (1, 2):
        said = answer(sent({"epsilon": 1.0, "seed": seed}, state), node)
        assert isinstance(said, str) and said.startswith(SPENT)
    assert isinstance(answer(sent({"epsilon": 1.0, "seed": 3}, state), node), Update)


def seeds_answered(node: dict[str, Any], state: dict[str, torch.Tensor], options: dict[str, Any]) -> str:
    """What a node says in the end to one new run after another."""
    for seed in range(100):
        said = answer(sent({"rounds": 1, **options, "seed": seed}, state), node)
        if isinstance(said, str):
            return said
    raise AssertionError("a hundred runs were answered")


@pytest.mark.slow
@pytest.mark.parametrize(("own", "limit"), [({}, 8.0), ({"epsilon": 3.0, "delta": 1e-6}, 3.0)])
def test_new_seeds_lead_no_further_than_the_policy_admits(own, limit, node, state, tmp_path, caplog):
    if own:
        node["policy"] = policy(tmp_path / "policy.yaml", own)
    delta = own.get("delta", 1e-5)
    said = seeds_answered(node, state, {"epsilon": 3.0, "delta": delta})
    assert said == (
        f"has no budget left: this turn would lead above ε = {limit:g} at δ = {delta:g}, which its policy admits for "
        "all runs together: for another budget, write epsilon and delta into its node-config"
    )
    path = Path(node["ledger"])
    reached = Ledger.load(path).epsilon(delta, "rdp")
    assert limit / 2 < reached <= limit
    assert f"ledger is at ε = {reached:.4g} of {limit:g} over all runs, at δ = {delta:g}." in caplog.text
    # The remedy.
    assert isinstance(
        answer(sent({**own, "seed": 99, "rounds": 1}, state), {**node, "epsilon": 30.0, "delta": 1e-5}), Update
    )


@pytest.mark.slow
@pytest.mark.parametrize("allowed", ["any", {"min": 0.1}, ["none"]])
@pytest.mark.parametrize("name", ["epsilon", "delta"])
def test_a_policy_without_a_bound_needs_a_budget(name, allowed, node, state, tmp_path):
    node["policy"] = policy(tmp_path / "policy.yaml", {"allow": {name: allowed}})
    ledger = {"epsilon": 2.0, "delta": 1e-5}
    if allowed != ["none"]:  # which admits no run that a ledger would
        said = answer(sent({"epsilon": 2.0, "delta": 0.1 if name == "delta" else 1e-5}, state), node)
        assert said == (
            "has a ledger without a budget, and a policy without a bound on epsilon or delta: write epsilon and delta "
            "into its node-config"
        )
    else:
        assert isinstance(answer(sent(ledger, state), node), str)
    assert not Path(node["ledger"]).exists()
    if allowed == "any":
        assert isinstance(answer(sent(ledger, state), {**node, **ledger}), Update)
