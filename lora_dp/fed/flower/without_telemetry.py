"""Imported before Flower: finds it, and switches off what Flower and Ray report to their makers, unless the
environment says otherwise."""

import importlib.util
import os

from lora_dp.extras import NotInstalled, missing

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

if importlib.util.find_spec("flwr") is None:
    raise NotInstalled(missing("engine flower", "Flower", "flower"))
