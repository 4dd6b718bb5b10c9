"""What a comparison measures runs by."""

from typing import get_args

import pytest

from lora_dp.fed.compare.grid import Grid
from lora_dp.fed.compare.measures import MEASURES
from lora_dp.fed.compare.options import CompareConfig, Metric


def test_every_metric_has_a_measure() -> None:
    assert set(MEASURES) == set(get_args(Metric))


def test_values_are_shown_in_their_units() -> None:
    assert MEASURES["accuracy"].shown(0.9123) == "91.2 %" == MEASURES["balanced-accuracy"].shown(0.9123)
    assert MEASURES["perplexity"].shown(9.876) == "9.88" and MEASURES["perplexity"].number(9.876) == "9.88"


def test_less_perplexity_is_better() -> None:
    assert [MEASURES[name].sign for name in ("accuracy", "balanced-accuracy", "perplexity")] == [1, 1, -1]


@pytest.mark.parametrize(
    ("metric", "task", "words"),
    [
        ("perplexity", {}, "perplexity is for task causal-lm"),
        ("perplexity", {"task": "classification"}, "perplexity is for task causal-lm"),
        ("balanced-accuracy", {"task": "causal-lm"}, "balanced-accuracy is for task classification"),
    ],
)
def test_a_metric_of_another_task_is_refused(metric: Metric, task: dict, words: str) -> None:
    config = CompareConfig(methods=["la-lora"], epsilons=[8], seeds=[0], metric=metric)
    with pytest.raises(ValueError, match=words):
        Grid(config, {"dataset": "elsewhere", **task})


@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
def test_a_language_model_has_both_accuracy_and_perplexity(metric: Metric) -> None:
    config = CompareConfig(methods=["la-lora"], epsilons=[8], seeds=[0], metric=metric)
    assert Grid(config, {"dataset": "elsewhere", "task": "causal-lm"}).metric == metric
