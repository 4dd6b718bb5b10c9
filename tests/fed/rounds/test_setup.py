"""The job of a run, opened: the same examples again, and others under another seed."""

from typing import Any

import pytest

from lora_dp.fed.config import RunConfig
from lora_dp.fed.rounds.setup import open_job

TINY = {"clients": 2, "rounds": 4, "local_steps": 1, "batch_size": 16, "accountant": "rdp", "device": "cpu"}


@pytest.mark.slow
def test_an_opened_job_has_the_same_digest_again_and_another_under_another_seed():
    def of(**options: Any) -> str:
        config = RunConfig.from_flat({**TINY, **options})
        return open_job(config).origin(config).examples

    first = of()
    assert of() == first == of(rounds=9, lr=0.5, evaluate_every=3)
    for options in ({"seed": 1}, {"split_seed": 1}, {"partition": "dirichlet"}, {"validation_fraction": 0.25}):
        assert of(**options) != first
