"""Small grids, and a run of theirs that ends at once."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_dp.fed.compare.comparison import compare
from lora_dp.fed.compare.options import CompareConfig
from lora_dp.fed.config import RunConfig

# Accuracy and loss that a run ends with; None where it diverges.
Verdict = Callable[[RunConfig], tuple[float, float] | None]
SMALL = {"clients": 2, "rounds": 2, "local_steps": 1, "batch_size": 16, "accountant": "rdp", "device": "cpu"}
ACCURACY = {
    ("la-lora", 1.0): (0.9011, 0.9123, 0.8876),
    ("la-lora", 8.0): (0.95, 0.96, 0.97),
    ("dp-lora", 1.0): (0.7, 0.8, 0.9),
    ("dp-lora", 8.0): (0.95, 0.97, 0.96),
}


def grid_config(folder: Path, **options: Any) -> CompareConfig:
    return CompareConfig(
        **{"methods": ["la-lora", "dp-lora"], "epsilons": [1, 8], "seeds": [0, 1, 2], "output": folder, **options}
    )


def quietly(config: CompareConfig, **common: Any) -> str:
    stream = io.StringIO()
    compare(config, {**SMALL, **common}, Console(file=stream, width=200))
    return stream.getvalue()
