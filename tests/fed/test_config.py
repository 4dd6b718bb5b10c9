"""Options of a run: a wrong type, or a word that is none of the choices, is refused in one sentence by every way."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import yaml

from lora_dp.fed.auditing.options import AuditConfig
from lora_dp.fed.config import FederationConfig, PrivacyConfig, RunConfig
from lora_dp.fed.flower.ledger import Refused
from lora_dp.fed.flower.policy import read_config
from lora_dp.fed.flower.server import options_of
from lora_dp.fed.models.options import ModelConfig
from lora_dp.fed.option_types import check_types
from lora_dp.fed.rounds.setup import plan_of

GROUPS: dict[str, Any] = {group.name: group.default_factory for group in dataclasses.fields(RunConfig)}
HINTS = {name: (group, hint) for group in GROUPS.values() for name, hint in get_type_hints(group).items()}


def choices(hint: Any) -> tuple[str, ...]:
    """The words among which an option is one, if it is."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(word for part in get_args(hint) for word in choices(part))


def written(name: str) -> str:
    return "model" if name == "name" else name


def by_constructor(name: str, value: Any) -> Any:
    return HINTS[name][0](**{name: value})


def by_flat(name: str, value: Any) -> Any:
    return RunConfig.from_flat({written(name): value})


def by_yaml(name: str, value: Any) -> Any:
    return RunConfig.from_flat(yaml.safe_load(yaml.safe_dump({written(name): value})))


def by_flower(name: str, value: Any) -> Any:
    return options_of({written(name).replace("_", "-"): value})


WAYS: list[Callable[[str, Any], Any]] = [by_constructor, by_flat, by_yaml, by_flower]
CHOSEN = sorted(name for name, (_, hint) in HINTS.items() if choices(hint))


def test_these_options_are_one_of_some_words():
    assert {
        "accountant",
        "clipping",
        "engine",
        "epsilon",
        "low_pass",
        "mechanism",
        "noise_by",
        "optimizer",
        "partition",
        "precision",
        "unit",
        "weighting",
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
        read_config("unit: client\nnoise_by: Server")
    config = RunConfig.from_flat({"unit": "client", "noise_by": "client"})
    config.privacy.noise_by = "Server"  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^noise_by must be client or server, not 'Server'\.$"):
        plan_of(config)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "values", "kind"),
    [
        ("method", [8, True, ["la-lora"], None], "text"),
        ("method_options", [3, "8", [1], None], "a mapping of names to"),
        ("epsilon", [True, [1], "8", {"a": 1}], "a number, none or inf"),
        ("delta", [True, "1e-5", None], "a number"),
        ("rounds", [True, 2.0, "3", None], "a whole number"),
        ("clients_per_round", [True, 2.0, "3"], "a whole number"),
        (
            "ranks",
            [8, "4", [4, "4", 4, 4, 4], [4, True, 4, 4, 4], {4: "1"}, {4: True}],
            "a list of whole numbers or a ",
        ),
        ("lr", [True, "0.1", 10**400], "a number"),
        ("reproducible", ["no", 0, None], "true or false"),
        ("dataset", [3, None], "text"),
        ("subset", [3, True], "text"),
        ("name", [3, None], "text"),
        ("target_modules", [3, None, [3], {"a": 1}], "a list of texts or text"),
        ("alpha", ["8", True], "a number"),
        ("dropout", [None, "0"], "a number"),
        ("max_length", [1.5], "a whole number"),
        ("device", [0, None], "text"),
    ],
)
def test_a_wrong_type_is_refused(name, values, kind, way):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{written(name)} must be {kind}.*, not .*\.$") as refusal:
            way(name, value)
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 130


def test_a_folder_is_a_path():
    for value in (3, True, [], {}):
        with pytest.raises(ValueError, match=r"^output must be a path, not ") as refusal:
            RunConfig.from_flat({"output": value})
        assert str(refusal.value).endswith(f"not {value!r}.")
    for value in ("out", Path("out")):
        assert RunConfig.from_flat({"output": value}).run.output == Path("out")


def test_what_is_right_is_taken():
    config = RunConfig.from_flat(
        {
            "epsilon": np.float64(3),
            "delta": np.float32(1e-5),
            "rounds": np.int64(3),
            "lr": 1,
            "weighting": None,
            "method": "flora",
            "ranks": {4: 0.75, "8": 1},
            "target_modules": ["qkv"],
            "unit": "client",
            "noise_by": "client",
        }
    )
    assert (config.privacy.target, config.federation.rounds, config.federation.weighting) == (3, 3, "equal")
    assert (
        RunConfig.from_flat({"rounds": np.int64(3), "epsilon": np.float32(2)}).to_yaml()
        == RunConfig.from_flat({"rounds": 3, "epsilon": 2.0}).to_yaml()
    )
    for name in CHOSEN:
        for word in choices(HINTS[name][1]):
            check_types(
                HINTS[name][0](
                    **{
                        name: word,
                        **({"unit": "client"} if name == "noise_by" else {}),
                        **({"low_pass_strength": 1.0} if name == "low_pass" and word != "none" else {}),
                    }
                )
            )


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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"canaries": "Examples"}, "canaries must be planted or examples, not 'Examples'"),
        ({"test": "two-World"}, "test must be one-run or two-world, not 'two-World'"),
        ({"assume": "Nothing"}, "assume must be nothing, gaussian, independent or independent gaussian, not 'Nothing'"),
        ({"confidence": True}, "confidence must be a number, not True"),
        ({"runs": 8.0}, "runs must be a whole number"),
        ({"target": None}, "target must be a path, not None"),
    ],
)
def test_options_of_an_audit_too(options, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        AuditConfig(**{"target": "config.yaml", **options})
    assert AuditConfig("config.yaml", confidence=np.float64(0.9)).target == Path("config.yaml")
