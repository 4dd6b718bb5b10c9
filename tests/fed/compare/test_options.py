"""Options of a comparison that make no grid are refused."""

import math

import pytest

from lora_dp.fed.compare.options import CompareConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1, 1]}, "seeds has 1 twice"),
        ({"epsilons": [8, 8.0]}, "epsilons has 8.0 twice"),
        ({"epsilons": ["none", math.inf]}, "epsilons has none twice"),
        ({"methods": []}, "methods is empty"),
        ({"methods": [], "variants": {"a b": {"method": "la-lora"}}}, "variants has 'a b': give a name of letters"),
        ({"variants": {"../up": {"method": "la-lora"}}}, "variants has '../up'"),
        ({"variants": {"la-lora": {"method": "dp-lora"}}}, "variants has 'la-lora': .* none of methods"),
        ({"variants": {"one": {"rounds": 3}}}, "variants gives one no method"),
        ({"variants": {1: {"method": "la-lora"}}}, "variants has 1: .* in quotes"),
        (
            {"variants": {"one": {"method": "la-lora", "delta": 0.01}}},
            "one has a delta of its own, but a table has one",
        ),
        ({"variants": {"one": {"method": "la-lora", "mechanism": "as-released"}}}, "has a mechanism of its own"),
        ({"variants": {"one": 3}}, "variants gives one no method"),
        ({"variants": {"one": {"method": "la-lora", "seed": 3}}}, "The grid sets seed of its cells: leave it out of"),
        (
            {"variants": {"one": {"method": "la-lora", "lr": 1.0}}, "search": {"lr_factor": [0.1, 1.0]}},
            "The grid sets lr of its cells: leave it out of the variant one",
        ),
        ({"processes": 0}, "processes must be at least 1"),
        ({"search_trials": 0}, "search_trials must be at least 1"),
        ({"search_seed": -1}, "search_seed must not be negative"),
        ({"minutes": -0.5}, "minutes must not be negative"),
        ({"minutes": math.nan}, "minutes must not be negative"),
        ({"tuning_seeds": []}, "tuning_seeds is empty"),
        ({"search": {"lr": [0.1]}}, r"search gives lr as \[0.1\]: give the two ends"),
        ({"search": {"lr": [0.1, 1, 10]}}, "give the two ends"),
        ({"search": {"lr": [0.0, 1.0]}}, "give the two ends"),
        ({"search": {"lr": [1.0, 1.0]}}, "give the two ends"),
        ({"search": {"lr": [1.0, math.inf]}}, "give the two ends"),
        ({"search": {"lr": [0.1, 1.0]}, "tuning_seeds": [1, 7]}, "tuning_seeds and seeds both have 1"),
    ],
)
def test_grids_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        CompareConfig(**options)


def test_variants_alone_make_a_grid():
    assert CompareConfig(methods=[], variants={"flat-1.5": {"method": "la-lora"}}).methods == []


def test_seeds_that_are_not_used_to_tune_may_be_those_of_the_table():
    assert CompareConfig(tuning_seeds=[0]).seeds == [0, 1, 2]
