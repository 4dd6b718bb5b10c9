"""The result of a run on disk."""

import pytest

from lora_dp.fed.launch import run
from lora_dp.fed.rounds.federation import Federation
from tests.fed.tiny_runs import tiny


@pytest.mark.slow
@pytest.mark.parametrize("method", ["la-lora", "galore", "flexlora", "lora-xs", "prism"])
def test_the_result_on_disk_is_what_was_evaluated(tmp_path, method):
    from lora_dp.fed.rounds.evaluation import evaluate
    from lora_dp.fed.runs.results import load_result

    outcome = run(tiny(tmp_path / "run", lr=1.0, method=method))
    fresh = Federation.from_config(tiny())
    before = fresh.evaluate()
    load_result(fresh.model, tmp_path / "run")
    after = evaluate(fresh.model, fresh.validation, fresh.device)
    last = outcome.rounds[-1]
    assert after == pytest.approx((last.loss, last.accuracy, last.balanced_accuracy), rel=1e-5)
    assert after != pytest.approx(before, rel=1e-3)
