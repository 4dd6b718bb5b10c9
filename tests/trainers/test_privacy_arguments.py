"""What a private Trainer is told: from code and from a command line, and what is refused."""

from typing import Any

import pytest
from transformers import HfArgumentParser, TrainingArguments

from lora_dp import PrivacyArguments


def test_it_is_read_from_a_command_line_beside_the_trainers() -> None:
    parser = HfArgumentParser((TrainingArguments, PrivacyArguments))
    words = "--output_dir out --use_cpu --target_epsilon 3 --target_delta 1e-5 --phases BA --log_private_loss"
    _, privacy = parser.parse_args_into_dataclasses(words.split())
    assert privacy == PrivacyArguments(target_epsilon=3.0, target_delta=1e-5, phases="BA", log_private_loss=True)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"target_delta": 1e-5}, ValueError, "Give either target_epsilon or noise_multiplier"),
        ({"target_epsilon": 1.0, "noise_multiplier": 1.0, "target_delta": 1e-5}, ValueError, "one follows from the"),
        ({"target_epsilon": 1.0}, ValueError, "Give target_delta, well below one over"),
        ({"target_epsilon": -1.0, "target_delta": 1e-5}, ValueError, "psilon"),
        ({"target_epsilon": 1.0, "target_delta": 1.5}, ValueError, "delta"),
        ({"target_epsilon": "1", "target_delta": 1e-5}, TypeError, "target_epsilon"),
        ({"noise_multiplier": 1.0, "target_delta": 1e-5, "clipping": "norm"}, ValueError, "clipping must be one of"),
        ({"noise_multiplier": 1.0, "target_delta": 1e-5, "phases": "C"}, ValueError, "phases must be one of 'A'|'B'"),
        ({"noise_multiplier": 1.0, "target_delta": 1e-5, "accountant": "gdp"}, ValueError, "accountant must be one of"),
        ({"noise_multiplier": 1.0, "target_delta": 1e-5, "unit": "user"}, ValueError, "all data of a user in one row"),
        ({"noise_multiplier": 1.0, "target_delta": 1e-5, "log_private_loss": 1}, TypeError, "log_private_loss"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_is_out_of_range_is_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        PrivacyArguments(**options)


def test_all_settings_are_told() -> None:
    told = PrivacyArguments(noise_multiplier=1.0, target_delta=1e-5).as_dict()
    assert PrivacyArguments(**told) == PrivacyArguments(noise_multiplier=1.0, target_delta=1e-5)
