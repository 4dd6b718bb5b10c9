"""Options of a run: a wrong type, or a word that is none of the choices, is refused in one sentence by every way."""

import math
from dataclasses import asdict

import pytest
import yaml

from lora_dp.fed.config import RunConfig
from lora_dp.fed.flower.ledger import Refused
from lora_dp.fed.flower.policy import read_sent_config
from lora_dp.fed.flower.server import options_of
from lora_dp.fed.methods import METHODS
from lora_dp.fed.models.options import ModelConfig
from lora_dp.fed.rounds.setup import plan_of
from lora_dp.fed.run_options import FederationConfig, PrivacyConfig
from tests.fed.option_ways import CHOSEN, GROUPS, HINTS, WAYS, by_flower, choices


def test_these_options_are_one_of_some_words():
    assert {
        "accountant",
        "averaging",
        "clipping",
        "contrast",
        "engine",
        "epsilon",
        "features",
        "init_a",
        "low_pass",
        "mechanism",
        "noise_by",
        "optimizer",
        "partition",
        "precision",
        "server_optimizer",
        "task",
        "unit",
        "weighting",
        "whitening",
    } == set(CHOSEN)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CHOSEN)
def test_a_word_that_is_none_of_the_choices_is_refused(name, way):
    words = choices(HINTS[name][1])
    for wrong in (words[0].title(), words[-1].upper(), f"{words[0]} ", "", [words[0]], True, {words[0]: 1}):
        if (name, way) == ("engine", by_flower):
            continue  # it is always deployed there
        with pytest.raises(ValueError, match=rf"^{name} must be .*{words[-1]}, not .*\.$") as refusal:
            way(name, wrong)
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 120


def test_who_adds_the_noise_is_no_matter_of_spelling():
    """Neither clients nor server would add any, and ε would be printed all the same."""
    for way in (RunConfig.from_flat, options_of):
        with pytest.raises(ValueError, match=r"^noise_by must be server or client, not 'Server'\.$"):
            way({"unit": "client", "noise_by": "Server"})
    with pytest.raises(Refused, match="none .*noise_by must be server or client"):
        read_sent_config("unit: client\nnoise_by: Server")
    config = RunConfig.from_flat({"unit": "client", "noise_by": "client"})
    config.privacy.noise_by = "Server"  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^noise_by must be client or server, not 'Server'\.$"):
        plan_of(config)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dropout": 2.0}, "dropout must lie in"),
        ({"dropout": math.nan}, "dropout must lie in"),
        ({"alpha": -1}, "alpha must be above 0"),
        ({"alpha": math.inf}, "alpha must be finite"),
        ({"r": 0}, "r must be a whole number of at least 1"),
        ({"lr": math.inf}, "lr must be finite, not inf"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"lr_ratio": math.inf}, "lr_ratio must be finite"),
        ({"low_pass": "gaussian", "low_pass_strength": math.inf}, "low_pass_strength must be finite"),
        ({"method": "flora", "ranks": {4: math.inf, 8: 1.0}}, "ranks must give each rank"),
    ],
)
def test_what_is_out_of_range_is_refused_before_anything_is_opened(options, words):
    for way in (RunConfig.from_flat, options_of):
        with pytest.raises(ValueError, match=f"^{words}"):
            way(options)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("value", [None, {}, "x"])
def test_groups_are_of_their_classes(group, value):
    with pytest.raises(ValueError, match=rf"^{group} must be a \w+, not a \w+: RunConfig\.from_flat takes"):
        RunConfig(**{group: value})
    given = RunConfig(FederationConfig(rounds=3), PrivacyConfig(epsilon=2.0), model=ModelConfig(r=2))
    assert (given.federation.rounds, given.privacy.target, given.model.r) == (3, 2.0, 2)


def test_configuration_round_trip():
    config = RunConfig.from_flat(
        {
            "method": "rolora",
            "epsilon": 3,
            "low_pass": "laplacian",
            "low_pass_strength": 1.5,
            "model": "some/model",
            "target_modules": ["qkv", "proj"],
            "clients_per_round": 2,
            "seed": 9,
        }
    )
    again = RunConfig.from_flat(yaml.safe_load(config.to_yaml()))
    assert asdict(again) == asdict(config)
    assert again.model.name == "some/model"
    assert again.optimization.lr == METHODS["rolora"].learning_rates[3]


@pytest.mark.parametrize("unlimited", ["none", "inf", math.inf, None])
def test_no_privacy_by_any_name(unlimited):
    assert RunConfig.from_flat({"epsilon": unlimited}).privacy.target is None


def test_default_learning_rates():
    sgd = RunConfig.from_flat({"method": "ffa-lora", "epsilon": 1})
    adamw = RunConfig.from_flat({"method": "ffa-lora", "epsilon": 1, "optimizer": "adamw"})
    assert (sgd.optimization.lr, adamw.optimization.lr) == (METHODS["ffa-lora"].learning_rates[1], 1e-3)


def test_every_option_has_one_name():
    names = list(yaml.safe_load(RunConfig().to_yaml()))
    groups = [group for name, group in asdict(RunConfig()).items()]
    assert len(names) == sum(len(group) for group in groups) - 1  # all but the output folder


@pytest.mark.parametrize(
    ("given", "opened"),
    [
        ({"method": "quiet-lora", "features": "own"}, {"adapt_last": 1}),
        ({"features": "auto"}, {"features": "mean"}),
        ({"features": "fitting", "feature_blocks": [-2, -1]}, {"features": "unit", "feature_blocks": [-1]}),
        ({"features": "fitting"}, {"features": "mean", "whitening": "made-up", "contrast": "model"}),
        ({"features": "fitting", "sums_share": 0.1, "balanced": True}, {"features": "unit", "sums_share": 0.0}),
    ],
)
def test_what_a_model_settles_of_open_options_is_no_other_run(given, opened):
    balanced = {"balanced": False} if "balanced" in given else {}
    stored = RunConfig.from_flat({**given, **opened, **balanced})
    assert RunConfig.from_flat(given).settled_as(stored).to_yaml() == stored.to_yaml()


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ({"adapt_last": 2}, {"adapt_last": 1}),
        ({"contrast": "model"}, {"features": "own"}),
        ({"features": "mean"}, {"features": "own"}),
        ({"features": "mean", "feature_blocks": [-2]}, {"features": "mean"}),
        ({"features": "fitting", "feature_blocks": [-2]}, {"features": "mean", "feature_blocks": [-3]}),
        ({"features": "fitting", "sums_share": 0.3}, {"features": "mean", "sums_share": 0.1}),
    ],
)
def test_what_was_given_is_not_taken_from_a_stored_run(given, stored):
    stored = RunConfig.from_flat(stored)
    assert RunConfig.from_flat(given).settled_as(stored).to_yaml() != stored.to_yaml()
