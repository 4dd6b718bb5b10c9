"""The plugin by which PEFT's own tests run on private layers."""

from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest_plugins = ["pytester"]

TESTS = """
import peft, pytest, torch
from lora_dp.lora.peft_layers import DPPeftLinear

@pytest.mark.parametrize("kind, options", [
    pytest.param(peft.LoraConfig, {}, id="plain-LoraConfig"),
    pytest.param(peft.LoraConfig, {"use_dora": True}, id="dora-LoraConfig"),
    pytest.param(peft.LoHaConfig, {}, id="LoHaConfig"),
])
def test_a_model(kind, options):
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 4)), kind(r=2, target_modules=["0"], **options))
    assert isinstance(model.base_model.model[0], DPPeftLinear)
"""


def test_lora_is_made_private_or_its_test_is_skipped_and_other_tests_are_left_out(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pytester.path / "test_theirs.py").write_text(TESTS)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    done = pytester.runpytest_subprocess("-p", "peft_suite", "-rs", "-p", "no:cacheprovider")
    done.assert_outcomes(passed=1, skipped=1, deselected=1)
    done.stdout.fnmatch_lines(["models with private layers: 1", "*has PEFT's DoRA*"])
