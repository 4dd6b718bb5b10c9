"""An adapted linear layer, and its formula written out."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import DPLoRALinear

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def adapted(dtype: torch.dtype = torch.float32, **options: Any) -> DPLoRALinear:
    torch.manual_seed(0)
    layer = DPLoRALinear(7, 5, r=2, alpha=3, dtype=dtype, **options)
    nn.init.normal_(layer.lora_B)
    return layer


def by_hand(layer: DPLoRALinear, x: Tensor) -> Tensor:
    """The textbook formula from torch's own operations."""
    weight = layer.weight.t() if layer.fan_in_fan_out else layer.weight
    return F.linear(x, weight, layer.bias) + layer.scaling * ((x @ layer.lora_A.t()) @ layer.lora_B.t())


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    if actual.shape != expected.shape:
        return False
    scale = expected.abs().max() if expected.numel() else 1.0
    return bool((actual.double() - expected.double()).abs().le(TOLERANCE[dtype] * scale).all())
