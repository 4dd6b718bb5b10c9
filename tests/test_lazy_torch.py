"""Options are read without torch, which comes when something of it is asked for."""

import subprocess
import sys

import torch

from lora_dp import lazy_torch


def test_what_is_asked_for_is_torchs_own() -> None:
    assert lazy_torch.torch.Tensor is torch.Tensor and lazy_torch.torch.nn is torch.nn


def test_options_are_read_before_torch_is_there() -> None:
    code = (
        "import sys\n"
        "from lora_dp import LoRAConfig\n"
        "from lora_dp.fed.config import RunConfig\n"
        "LoRAConfig(r=2), RunConfig.from_flat({'rounds': 3})\n"
        "before = 'torch' in sys.modules\n"
        "from lora_dp.lazy_torch import torch\n"
        "print(before, torch.float32, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "torch.float32", "True"], done.stderr
