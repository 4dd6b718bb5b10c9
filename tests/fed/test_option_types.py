"""The type of every option: another one is refused in one sentence, in every way of giving it."""

from pathlib import Path

import numpy as np
import pytest

from lora_dp.fed.config import RunConfig
from lora_dp.fed.option_types import check_types
from tests.fed.option_ways import CHOSEN, HINTS, WAYS, choices, written


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
                        **({"dataset": "texts"} if name == "task" else {}),
                        **({"low_pass_strength": 1.0} if name == "low_pass" and word != "none" else {}),
                    }
                )
            )
