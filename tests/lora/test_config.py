"""The settings of adapters: out of range, or no names, they are refused."""

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
@pytest.mark.parametrize("given", [None, 5, [None], ["query", 3], True, iter(["query"]), b"query"])
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
