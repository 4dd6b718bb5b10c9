"""Nothing is reported to anyone unless the user says so."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("flwr")


@pytest.mark.slow
def test_nothing_is_reported_to_anyone_unless_the_user_says_so():
    code = (
        "import lora_dp.fed.flower.messages, os\n"
        "from flwr.supercore import telemetry, update_check\n"
        "print(telemetry.FLWR_TELEMETRY_ENABLED, os.environ['RAY_USAGE_STATS_ENABLED'],"
        " os.environ['FLWR_DISABLE_UPDATE_CHECK'])"
    )
    switches = ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED", "FLWR_DISABLE_UPDATE_CHECK")
    environment = {name: value for name, value in os.environ.items() if name not in switches}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["0", "0", "1"]


def test_who_wants_to_report_may(monkeypatch):
    import importlib

    from lora_dp.fed.flower import without_telemetry

    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    importlib.reload(without_telemetry)
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "1"
