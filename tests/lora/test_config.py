"""The settings of adapters: out of range, or no names, they are refused."""

from dataclasses import replace

import pytest

from lora_dp import LoRAConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be a whole number of at least 1, got 0"),
        ({"r": -2}, "at least 1, got -2"),
        ({"r": 1.5}, "whole number"),
        ({"alpha": 0}, "alpha must be above 0, got 0"),
        ({"alpha": -1.0}, "alpha must be"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"dropout": 1}, r"dropout must lie in \[0, 1\), got 1"),
        ({"dropout": -0.1}, "dropout must"),
        ({"bias": "some"}, "'none', 'all' or 'lora_only', got 'some'"),
        ({"init_a": "orthogonal"}, "init_a must be 'kaiming' or 'orthonormal', got 'orthogonal'"),
        ({"adapter": "dora"}, "adapter must be 'lora', 'xs' or 'tangent', got 'dora'"),
        ({"adapter": "xs", "init_a": "orthonormal"}, "has no effect with adapter 'xs'"),
        ({"adapter": "tangent", "init_a": "orthonormal"}, "has no effect with adapter 'tangent', whose A is orthonorm"),
        ({"init_a": None}, "init_a must be 'kaiming' or 'orthonormal', got None"),
        ({"target_modules": []}, "anything to train"),
        ({"target_modules": ""}, "is empty"),
        ({"target_modules": [""]}, "is empty"),
        ({"trainable_modules": [""]}, "is empty"),
        ({"target_modules": "("}, "no regular expression"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**settings)


@pytest.mark.parametrize("setting", ["target_modules", "trainable_modules"])
@pytest.mark.parametrize("given", [0, 5, [None], ["query", 3], True, iter(["query"]), b"query"])
def test_names_are_a_list_of_names(setting, given):
    with pytest.raises(TypeError, match=f"^{setting} must be a list of names, got .*: .*\\.$") as refusal:
        LoRAConfig(**{setting: given})
    assert str(refusal.value).count(". ") == 0


@pytest.mark.parametrize("given", [("query", "value"), {"query": 1, "value": 2}.keys(), frozenset(["query", "value"])])
def test_any_collection_of_names_will_do(given):
    assert sorted(LoRAConfig(target_modules=given).target_modules) == ["query", "value"]


def test_trainable_modules_is_a_list():
    with pytest.raises(TypeError, match=r"write \['classifier'\]"):
        LoRAConfig(trainable_modules="classifier")


def test_pefts_names_are_taken_and_read():
    ours = LoRAConfig(r=4, alpha=8, dropout=0.1, trainable_modules=["score"], rslora=True)
    theirs = LoRAConfig(r=4, lora_alpha=8, lora_dropout=0.1, modules_to_save=["score"], use_rslora=True)
    assert ours == theirs
    assert (theirs.lora_alpha, theirs.lora_dropout) == (8, 0.1)
    assert (theirs.modules_to_save, theirs.use_rslora) == (["score"], True)
    assert LoRAConfig(modules_to_save=None, lora_alpha=None) == LoRAConfig()


def test_a_setting_by_both_its_names_is_refused():
    with pytest.raises(ValueError, match="lora_alpha is PEFT's name of alpha: give one"):
        LoRAConfig(alpha=4, lora_alpha=8)


def test_a_config_is_changed_by_replace():
    assert replace(LoRAConfig(lora_alpha=8, layers_to_transform=3), alpha=16).alpha == 16


@pytest.mark.parametrize("given", [[], [-1], [1.5], [True], "3", [None]])
def test_blocks_are_numbers_from_0_on(given):
    with pytest.raises(ValueError, match=r"layers_to_transform must be numbers of blocks"):
        LoRAConfig(layers_to_transform=given)
    assert LoRAConfig(layers_to_transform=2).layers_to_transform == [2]


def test_a_pattern_to_leave_out_is_a_regular_expression():
    with pytest.raises(ValueError, match="exclude_modules '\\(' is no regular expression"):
        LoRAConfig(exclude_modules="(")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("task_type", "leave it out, for all tasks are alike here"),
        ("init_lora_weights", r"give inject_lora, or get_peft_model and make_private, a peft\.LoraConfig"),
        ("rank_pattern", r"give inject_lora, or get_peft_model and make_private, a peft\.LoraConfig"),
        ("use_dora", "it is not offered in private training"),
    ],
)
def test_what_only_pefts_has_is_told(name: str, words: str) -> None:
    with pytest.raises(TypeError, match=rf"^'{name}' is an argument of PEFT': .*{words}"):
        LoRAConfig(r=8, **{name: None})  # type: ignore[arg-type]


def test_pefts_configuration_is_taken() -> None:
    peft = pytest.importorskip("peft")
    given = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query"], task_type="SEQ_CLS")
    assert LoRAConfig(given) == LoRAConfig(r=4, alpha=8, target_modules=["query"])
