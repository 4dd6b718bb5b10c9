"""Whether examples meet in a loss: its gradient at the model's outputs, under weights of the examples.

Where example i's share depends on i's outputs alone, weighing the shares by w multiplies the gradient at i's outputs by
w_i and does nothing else. The weights are signed powers of two, so that this holds to the bit, and drawn in secret.
"""

import math
import os

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lora_dp.loss_graph import Outputs, meets, tolerance

# Two examples get one weight in one of 64 batches, in float16 one of 16.
_EXPONENTS = 32
_HALF_EXPONENTS = 8


def meeting(joined: GradientEdge, n: int, outputs: Outputs) -> int | None:
    """An example whose share of the joined numbers depends on the model's outputs for others; None if there is none.

    Two backwards from these numbers to the outputs, and one for each example where they do not agree.
    """
    if _in_proportion(joined, n, outputs):
        return None
    return next((i for i in range(n) if meets(joined, i, n, outputs)), None)


def _in_proportion(joined: GradientEdge, n: int, outputs: Outputs) -> bool:
    metadata = joined.node._input_metadata[joined.output_nr]
    shape = tuple(metadata.shape)
    rows = [t for t in outputs.tensors if t.dim() and t.numel() and t.shape[0] % n == 0]
    if not shape or math.prod(shape) % n or not rows:
        return True
    weights = _weights(n, metadata.dtype).to(metadata.device)
    plain, weighted = (
        torch.autograd.grad([joined], rows, [by.repeat_interleave(math.prod(shape) // n).view(shape)],
                            retain_graph=True, allow_unused=True)
        for by in (torch.ones_like(weights), weights))
    for gradient, other in zip(plain, weighted, strict=True):
        if gradient is None or other is None:
            continue
        info = torch.finfo(gradient.dtype)
        factors = weights.double().unsqueeze(1)
        expected = gradient.reshape(n, -1).double().nan_to_num() * factors
        off = (other.reshape(n, -1).double().nan_to_num() - expected).abs()
        # Below the least normal number each of the two is rounded to a multiple of the least one.
        least = info.smallest_normal * info.eps * (1 + factors.abs())
        if bool((off > tolerance(gradient.dtype) * expected.abs().amax(1, keepdim=True) + least).any()):
            return False
    return True


def _weights(n: int, dtype: torch.dtype) -> Tensor:
    drawn = torch.frombuffer(bytearray(os.urandom(n)), dtype=torch.uint8).to(torch.int32)
    exponents = _HALF_EXPONENTS if dtype == torch.float16 else _EXPONENTS
    signs = 1 - 2 * (drawn // 128)
    return torch.ldexp(signs.to(torch.float32), drawn % exponents - exponents // 2).to(dtype)
