"""The rules of a node's policy: what each admits, to the edge of its bounds, and how an owner writes them."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest

from lora_dp.fed.config import RunConfig
from lora_dp.fed.flower.ledger import Refused
from lora_dp.fed.flower.policy import RULES, Anything, Between, OneOf, Policy, Rule, read_sent_config, read_yaml

WHOLE = {
    "split_seed": (0, 2**32 - 1),
    "max_length": (1, 512),
    "r": (1, 256),
    "clients": (1, 10**6),
    "clients_per_round": (1, 10**6),
    "rounds": (1, 10**6),
    "local_steps": (1, 10**4),
    "batch_size": (1, 4096),
    "views": (1, 64),
    "seed": (0, 2**63 - 1),
}
REAL = {
    "validation_fraction": (0.01, 0.99),
    "dirichlet_alpha": (1e-6, 1e6),
    "alpha": (1e-6, 1e6),
    "dropout": (0, 0.9),
    "epsilon": (1e-6, 8),
    "delta": (1e-15, 1e-5),
    "max_grad_norm": (1e-3, 1e3),
    "max_update_norm": (1e-3, 1e3),
    "clip_quantile": (0.01, 0.99),
    "lr": (1e-12, 1e6),
    "lr_ratio": (1e-12, 1e6),
    "low_pass_strength": (0, 1000),
    "sums_share": (0, 1),
}
NONE_TOO = {"alpha", "clients_per_round"}


def own(tmp_path: Path, text: str, **node: Any) -> Policy:
    """The policy of a node whose owner has written this."""
    path = tmp_path / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    return Policy.of_node({"policy": str(path), **node}, budget=False)


def check_edges(rule: Rule, low: float, high: float) -> None:
    admitted = [rule.admits(value) for value in (low, high, low - 1e-6 * (low or 1e-3), high * (1 + 1e-6))]
    assert admitted == [True, True, False, False]


@pytest.mark.parametrize("name", REAL)
def test_a_real_number_within_its_bounds_is_admitted(name):
    check_edges(RULES[name], *REAL[name])
    assert not any(RULES[name].admits(value) for value in (True, "1", [1], math.nan, math.inf, -math.inf))
    assert RULES[name].admits(None) == (name in NONE_TOO)


def test_a_head_is_given_few_blocks():
    """Their features stand side by side, and whitening takes the square of how many there are."""
    rule = RULES["feature_blocks"]
    assert rule.admits([-1]) and rule.admits([1] * 16) and not rule.admits([1] * 17) and not rule.admits("1")
    assert str(rule) == "a list of at most 16"


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_number_within_its_bounds_is_admitted(name):
    low, high = WHOLE[name]
    rule = RULES[name]
    assert [rule.admits(value) for value in (low, high, low - 1, high + 1)] == [True, True, False, False]
    assert not any(rule.admits(value) for value in (True, "1", 2.0, 2.5, math.inf))
    assert rule.admits(None) == (name in NONE_TOO)


def test_code_files_and_mechanism_are_those_of_the_default_run():
    only = {
        "model": "default",
        "pretrained": True,
        "target_modules": "all-linear",
        "precision": "float32",
        "class_texts": None,
        "dataset": "digits",
        "subset": None,
        "input_column": None,
        "pair_column": None,
        "label_column": None,
        "prompt_column": None,
        "prompt_template": None,
        "completion_column": None,
        "validation_split": None,
        "mechanism": "sound",
        "reproducible": False,
        "method_options": {},
    }
    for name, value in only.items():
        assert RULES[name].admits(value)
        assert not any(RULES[name].admits(other) for other in (not value, "else", 1, ["head"]))


@pytest.mark.parametrize("written", ["task: causal-lm", "chat: true", "completion_column: x", "label_column: y"])
def test_an_owner_may_pin_what_is_for_texts(written, tmp_path):
    (tmp_path / "policy.yaml").write_text(written)
    rules = Policy.of_node({"policy": str(tmp_path / "policy.yaml")}, budget=False).rules
    name, value = written.split(": ")
    assert rules[name].admits({"true": True}.get(value, value)) and not rules[name].admits("another")


def test_a_run_that_no_rule_refuses_is_taken_part_in_and_no_other():
    Policy(RULES).check(RunConfig())
    with pytest.raises(Refused, match="no such run: r is 257, and by its policy must be a whole number from 1 to 256"):
        Policy(RULES).check(RunConfig.from_flat({"r": 257}))


def test_every_rule_with_bounds_is_looked_at_here():
    assert {name for name, rule in RULES.items() if isinstance(rule, Between)} == WHOLE.keys() | REAL.keys()


@pytest.mark.parametrize(
    ("values", "admitted", "refused"),
    [
        ((1,), [1, 1.0], [True, "1", None, 2, [1]]),
        ((True,), [True], [1, 1.0, False, "yes", None]),
        ((False, True), [False, True], [0, 1, None]),
        ((0,), [0, 0.0], [False, None, ""]),
        (("a", None), ["a", None], ["b", "A", "", 0, "none"]),
        (({},), [{}], [[], None, {"a": 1}]),
        (
            ([1, "x"],),
            [[1, "x"], [1.0, "x"]],
            [[1], [1, "y"], [2, "x"], [True, "x"], ["x", 1], (1, "x"), 1, [1, "x", 2]],
        ),
    ],
)
def test_one_of_some_values_is_one_of_the_very_type(values, admitted, refused):
    rule = OneOf(values)
    assert all(rule.admits(value) for value in admitted)
    assert not any(rule.admits(value) for value in refused)


def test_a_rule_says_what_it_admits():
    assert str(OneOf((None, 1, "a"))) == "none or 1 or a"
    eight = " or ".join(map(str, range(8)))
    assert str(OneOf(tuple(range(8)))) == eight and str(OneOf(tuple(range(9)))) == f"{eight} or …"


def test_what_an_owner_declares_opens_or_keeps_the_rules_of_privacy(tmp_path):
    assert Policy(RULES).private
    for found in (Policy.of_node({}, budget=False), Policy.of_node({"private": True}, budget=False)):
        assert found.private and found.rules == RULES
    budgeted = Policy.of_node({}, budget=True)
    check_edges(budgeted.rules["epsilon"], 1e-6, 1e6)
    check_edges(budgeted.rules["delta"], 1e-300, 0.1)
    assert not budgeted.rules["epsilon"].admits(None) and not budgeted.rules["reproducible"].admits(True)
    for node, budget in (({"private": False}, False), ({"private": False}, True)):
        opened = Policy.of_node(node, budget=budget)
        assert not opened.private and opened.rules["epsilon"].admits(None)
        check_edges(opened.rules["epsilon"], 1e-6, 1e9)
        check_edges(opened.rules["delta"], 1e-300, 0.999)
        assert all(opened.rules["reproducible"].admits(value) for value in (False, True))
        assert all(opened.rules["mechanism"].admits(value) for value in ("sound", "as-released"))
    assert not own(tmp_path, "private: false", private=True).private
    for wrong in (0, "false"):
        with pytest.raises(Refused, match="private that is neither true nor false"):
            Policy.of_node({"private": wrong}, budget=False)


def test_where_a_node_has_data_of_its_own_it_reads_no_option_of_shared_ones():
    config, other = (RunConfig.from_flat({"split_seed": seed}) for seed in (1, 2))
    shared, own_data = Policy.of_node({}, budget=False), Policy.of_node({"data": "somewhere"}, budget=False)
    assert not shared.rules["dataset"].admits("elsewhere") and own_data.rules["dataset"].admits("elsewhere")
    assert shared.run_digest(config) != shared.run_digest(other)
    assert own_data.run_digest(config) == own_data.run_digest(other)
    for policy in (shared, own_data):
        assert policy.run_digest(config) == policy.run_digest(RunConfig.from_flat({"split_seed": 1, "min_clients": 2}))
        assert policy.run_digest(config) != policy.run_digest(RunConfig.from_flat({"split_seed": 1, "lr": 0.125}))
        assert len(policy.run_digest(config)) == 64


@pytest.mark.parametrize(
    ("said", "admitted", "refused"),
    [
        ("lr: {min: 1e-3}", {"lr": [0.001, 1e9]}, {"lr": [0.0009, math.inf, None]}),  # to YAML, 1e-3 is a word
        ("lr: {max: 5}", {"lr": [5, 0.5, -1e9]}, {"lr": [5.01, -math.inf]}),
        ("rounds: {min: 2, max: 5}", {"rounds": [2, 5]}, {"rounds": [1, 6, 2.5]}),
        ("alpha: [none, 4]", {"alpha": [None, 4]}, {"alpha": ["none", 5]}),
        ("max_grad_norm: [inf, 1]", {"max_grad_norm": [None, 1]}, {"max_grad_norm": ["inf", 2]}),
        ("low_pass: [none]", {"low_pass": ["none"]}, {"low_pass": [None, "gaussian"]}),
        ("seed: any", {"seed": [-1, "x"]}, {"lr": [0.0]}),
        ("", {"lr": [1.0]}, {"lr": [0.0]}),
    ],
)
def test_what_stands_under_allow(said, admitted, refused, tmp_path):
    rules = own(tmp_path, f"allow: {{{said}}}" if said else "allow:").rules
    assert all(rules[name].admits(value) for name, values in admitted.items() for value in values)
    assert not any(rules[name].admits(value) for name, values in refused.items() for value in values)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("b: 1\nallow: {a: any, lr: any}", "it has options that no run has: a, b"),
        ("lr: 1\nallow: {rounds: {min: 1, least: 2}}", "allow takes a list of values, min and max, or any"),
        ("allow: {rounds: {}}", "allow takes a list of values, min and max, or any"),
    ],
)
def test_what_is_wrong_with_a_policy_is_told_to_its_owner(text, words, tmp_path, caplog):
    with caplog.at_level(logging.ERROR), pytest.raises(Refused, match="policy that is none: its log says why"):
        own(tmp_path, text)
    assert "This node's policy is none:" in caplog.text and words in caplog.text


def test_a_policy_that_is_longer_than_what_is_read_is_refused_not_cut(tmp_path, caplog):
    """The rule that its owner needs may stand at its end."""
    said, end = "lr: 1.0\n", "\nepsilon: 1.0"
    fits = said + "#" * (2**16 - len(said) - len(end)) + end
    assert not own(tmp_path, fits).rules["epsilon"].admits(8.0)
    with caplog.at_level(logging.ERROR), pytest.raises(Refused, match="policy that cannot be read"):
        own(tmp_path, "#" + fits)
    assert "it is longer than 65536 characters" in caplog.text


@pytest.mark.parametrize(
    ("said", "budget"),
    [
        ("", (8, 1e-5)),
        ("epsilon: 2.5", (2.5, 1e-5)),
        ("allow: {epsilon: [1, 3.5, 2], delta: {max: 0.99}}", (3.5, 0.99)),
        ("allow: {epsilon: [none, true, 0.5]}", (0.5, 1e-5)),
        ("allow: {epsilon: [true]}", None),
        ("allow: {epsilon: any}", None),
        ("allow: {delta: {min: 1e-6}}", None),
        ('allow: {epsilon: ["8"]}', None),
    ],
)
def test_the_budget_of_a_policy_is_the_largest_number_that_it_admits(said, budget, tmp_path):
    policy = own(tmp_path, said or "{}")
    if budget is None:
        with pytest.raises(Refused, match="a policy without a bound on epsilon or delta"):
            policy.budget()
    else:
        assert policy.budget() == budget


def test_a_configuration_is_read_by_the_method_that_it_names_and_no_other():
    assert (
        read_sent_config("lr: 2.0")
        == read_sent_config("lr: 2.0", OneOf(("la-lora",)))
        == RunConfig.from_flat({"lr": 2.0})
    )
    assert read_sent_config("method: dp-lora", Anything()) == RunConfig.from_flat({"method": "dp-lora"})
    for text, methods in (("method: dp-lora", OneOf(("la-lora",))), ("lr: 2.0", OneOf(("dp-lora",)))):
        with pytest.raises(Refused, match="no such run: method is .*, and by its policy must be"):
            read_sent_config(text, methods)
    for text in ("- 1", "[", "1: 2", "a: &x 1\nb: *x", "lr: no", "unheard_of: 1"):
        with pytest.raises(Refused, match="was sent a configuration that is none"):
            read_sent_config(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &x 1\nb: *x", "aliases"),
        ("- 1", "no mapping"),
        ("1: 2", "no mapping"),
        ("a: 1\n2: 3", "no mapping"),
        ("", "no mapping"),
        ("word", "no mapping"),
    ],
)
def test_only_a_mapping_of_options_is_read(text, words):
    with pytest.raises(ValueError, match=words):
        read_yaml(text)
    assert read_yaml("a: 1\nb: [2]") == {"a": 1, "b": [2]}
