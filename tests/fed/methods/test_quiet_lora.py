"""QuietLoRA: what its recipe chooses, what it trains, and that a user's options come first."""

from typing import Any

import pytest

from lora_dp.fed.config import RunConfig, recipe
from lora_dp.fed.methods import get_method
from lora_dp.fed.methods.base import Layers
from lora_dp.fed.rounds.setup import open_job
from lora_dp.fed.run_options import PrivacyConfig
from lora_dp.nn.feature_head import FeatureHead

METHODS = ("quiet-lora", "head-only")


def given(**options: Any) -> RunConfig:
    return RunConfig.from_flat({"method": "quiet-lora", "clients": 2, "device": "cpu", **options})


@pytest.mark.parametrize("method", METHODS)
def test_the_recipe_fills_what_is_left_out_alone(method: str) -> None:
    config = given(method=method, rounds=7, max_grad_norm=0.5)
    assert config.federation.rounds == 7 and config.privacy.max_grad_norm == 0.5
    assert config.federation.local_steps == 1 and config.privacy.clipping == "flat"
    assert config.optimization.server_optimizer == "momentum" and config.optimization.averaging == "tail"
    assert config.privacy.sums_share == 0.15 and config.optimization.balanced


@pytest.mark.parametrize("method", METHODS)
def test_rates_are_those_of_the_recipe_and_of_the_method_without_it(method: str) -> None:
    rates, plain = get_method(method).recipe_rates, get_method(method).learning_rates
    assert rates and rates != plain
    assert given(method=method, epsilon=1.0).optimization.lr == rates[1]
    assert given(method=method, epsilon="none").optimization.lr == rates[float("inf")]
    assert given(method=method, epsilon=1.0, features="own").optimization.lr == plain[1]
    assert given(method=method, epsilon=1.0, lr=0.25).optimization.lr == 0.25
    whole = given(method=method, epsilon=1.0, unit="client", delta=0.01)
    assert whole.optimization.lr == rates[float("inf")]


def test_what_does_not_fit_the_other_options_is_not_chosen() -> None:
    assert recipe({"method": "quiet-lora", "features": "own"}) == {}
    assert recipe({"method": "la-lora"}) == {}
    whole = given(unit="client", delta=0.01)
    assert whole.privacy.clipping == PrivacyConfig.clipping
    assert not given(sums_share=0).optimization.balanced


@pytest.mark.slow
def test_with_a_head_for_these_classes_it_is_kept_and_no_sums_are_released() -> None:
    """The digits, which the embedded model knows. What was found out is in the configuration."""
    config = given(accountant="rdp")
    job = open_job(config)
    assert config.model.features == "unit" and config.model.adapt_last == 1 and not config.optimization.balanced
    assert config.privacy.sums_share == 0 and job.trainer.plan.sums_event is None
    head = job.trainer.workspace.whole.head
    assert isinstance(head, FeatureHead) and bool(head.linear.weight.any())


@pytest.mark.slow
def test_it_trains_the_cores_of_the_last_block_and_the_head() -> None:
    job = open_job(given(accountant="rdp"))
    layers: Layers = job.trainer.workspace.layers
    assert layers.shapes and all("blocks.3." in name for name in layers.shapes)
    trained = {name for name in job.trainer.workspace.names if job.trainer.method.trains(name, 0)}
    assert {name.rpartition(".")[2] for name in trained} == {"lora_R", "weight", "bias"}
    assert sum(name.endswith("lora_R") for name in trained) == len(layers.shapes)
