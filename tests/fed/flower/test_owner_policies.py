"""The owner's own words: what a policy admits, and a policy that is none."""

import pytest

pytest.importorskip("flwr")

from lora_dp.fed.config import RunConfig
from lora_dp.fed.flower.ledger import Refused
from lora_dp.fed.flower.policy import Policy
from lora_dp.fed.rounds.messages import Update
from tests.fed.flower.asking_servers import answer, policy, sent
from tests.fed.flower.node_data import GOOD


@pytest.mark.slow
def test_a_runs_config_is_a_policy_that_admits_that_run_alone(node, state, tmp_path):
    config = RunConfig.from_flat({**GOOD, "epsilon": 3.0})
    node["policy"] = policy(tmp_path / "policy.yaml", config.to_yaml())
    assert isinstance(answer(sent({"epsilon": 3.0}, state), node), Update)
    for name, value in {"epsilon": 2.0, "lr": 0.1, "batch_size": 15, "clipping": "flat", "optimizer": "adamw"}.items():
        said = answer(sent({"epsilon": 3.0, name: value}, state), node)
        assert isinstance(said, str) and said.startswith(f"takes part in no such run: {name} is {value}"), said
    # How the server goes about it is its own affair.
    assert isinstance(answer(sent({"epsilon": 3.0, "min_clients": 2, "evaluate_every": 2}, state), node), Update)


def test_allow_says_what_else_may_be(node, tmp_path):
    node["policy"] = policy(
        tmp_path / "policy.yaml",
        {
            "lr": 0.5,
            "precision": "bf16",
            "allow": {
                "rounds": {"max": 5},
                "model": ["default", "/srv/model"],
                "lr": {"min": 0.1, "max": 1},
                "seed": "any",
                "epsilon": [1, 3.0],
            },
        },
    )
    rules = Policy.of_node(node, budget=False)
    good = {"epsilon": 3.0, "lr": 0.2, "precision": "bf16", "rounds": 5, "seed": 10**12}
    rules.check(RunConfig.from_flat(good))
    for name, value in {"epsilon": 2.0, "lr": 2.0, "precision": "float32", "rounds": 6, "model": "/srv/other"}.items():
        with pytest.raises(Refused, match=f"no such run: {name} is"):
            rules.check(RunConfig.from_flat({**good, name: value}))


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "- 1",
        "wrong_name: 1",
        "allow: {wrong_name: any}",
        "allow: {rounds: some}",
        "allow: {rounds: []}",
        "allow: {rounds: {least: 1}}",
        "allow: [rounds]",
        "epsilon: -1",
        "a: &a 1\nb: *a",
        "private: 0",
    ],
)
def test_a_policy_that_is_none_stops_the_node(text, node, state, tmp_path):
    node["policy"] = policy(tmp_path / "policy.yaml", text)
    said = answer(sent({}, state), node)
    assert isinstance(said, str) and ("has a policy that" in said or "neither true nor false" in said)
    assert "has a policy that cannot be read" in answer(sent({}, state), {**node, "policy": str(tmp_path / "missing")})


def test_a_policy_can_declare_too_that_no_privacy_is_needed(node, state, tmp_path):
    node["policy"] = policy(tmp_path / "policy.yaml", {"private": False, "unit": "client", "noise_by": "server"})
    del node["ledger"]
    assert isinstance(answer(sent({"unit": "client"}, state), node), Update)
    assert "unit is example" in answer(sent({}, state), node)
