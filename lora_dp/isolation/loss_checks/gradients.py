"""Whether examples meet in a loss: its gradient at the model's outputs, under weights of the examples.

Where example i's share depends on i's outputs alone, weighing the shares by w multiplies the gradient at i's outputs by
w_i and does nothing else. The weights are signed powers of two, so that this holds to the bit, and drawn in secret.
"""

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lora_dp.isolation.loss_checks.graph import Outputs
from lora_dp.isolation.trial_values import tolerance

# Two examples get one weight in one of 64 batches, in float16 one of 16.
_EXPONENTS = 32
_HALF_EXPONENTS = 8


def meets(joined: GradientEdge, i: int, n: int, outputs: Outputs) -> bool:
    """Whether example i's share of the joined numbers depends on the model's outputs for other examples.

    A backward from these numbers to the outputs, no further; it frees nothing.
    """
    direction = torch.zeros(n, device=joined.node._input_metadata[joined.output_nr].device)
    direction[i] = 1
    for gradient in _gradients(joined, n, outputs, direction):
        if gradient is not None:
            shares = gradient.reshape(n, -1).abs()
            # What is infinite or NaN by itself hides nothing; NaN elsewhere may be zero times it.
            own = shares[i].nan_to_num(nan=0.0, posinf=0.0).max()
            if bool((torch.cat([shares[:i], shares[i + 1 :]]) > tolerance(shares.dtype) * own).any()):
                return True
    return False


def meeting(joined: GradientEdge, n: int, outputs: Outputs) -> int | None:
    """An example whose share of the joined numbers depends on the model's outputs for others; None if there is none.

    Two backwards from these numbers to the outputs, and one for each example where they do not agree.
    """
    if _in_proportion(joined, n, outputs):
        return None
    return next((i for i in range(n) if meets(joined, i, n, outputs)), None)


def reaches_padding(joined: GradientEdge, used: Tensor, outputs: Outputs) -> bool:
    """Whether the joined numbers depend on outputs (N, T, …) where ``used``, (N, T) bool, is False."""
    metadata = joined.node._input_metadata[joined.output_nr]
    by_token = [t for t in outputs.tensors if t.shape[:2] == used.shape]
    if not by_token:
        return False
    ones = torch.ones(tuple(metadata.shape), device=metadata.device)
    for gradient in torch.autograd.grad([joined], by_token, [ones], retain_graph=True, allow_unused=True):
        if gradient is not None:
            sizes = gradient.nan_to_num(posinf=0.0, neginf=0.0).reshape(*used.shape, -1).abs().amax(2)
            unused = ~used.to(sizes.device)
            if bool((sizes[unused] > tolerance(gradient.dtype) * sizes.max()).any()):
                return True
    return False


def _in_proportion(joined: GradientEdge, n: int, outputs: Outputs) -> bool:
    metadata = joined.node._input_metadata[joined.output_nr]
    weights = _weights(n, metadata.dtype).to(metadata.device)
    plain, weighted = (_gradients(joined, n, outputs, by) for by in (torch.ones_like(weights), weights))
    for gradient, other in zip(plain, weighted, strict=True):
        if gradient is None or other is None:
            continue
        info = torch.finfo(gradient.dtype)
        factors = weights.double().unsqueeze(1)
        expected, other = gradient.reshape(n, -1).double() * factors, other.reshape(n, -1).double()
        finite = expected.isfinite()
        if not torch.equal(finite, other.isfinite()):
            return False
        # What is infinite or NaN by itself hides nothing beside it.
        expected, other = expected.where(finite, 0.0), other.where(finite, 0.0)
        off = (other - expected).abs()
        # Below the least normal number each of the two is rounded to a multiple of the least one.
        least = info.smallest_normal * info.eps * (1 + factors.abs())
        if bool((off > tolerance(gradient.dtype) * expected.abs().amax(1, keepdim=True) + least).any()):
            return False
    return True


def _gradients(joined: GradientEdge, n: int, outputs: Outputs, weights: Tensor) -> Sequence[Tensor | None]:
    """Of the joined numbers, each example's share weighed by its entry (N,), at the outputs that are by example.

    Empty where the numbers are not by example, or no output is.
    """
    metadata = joined.node._input_metadata[joined.output_nr]
    shape = tuple(metadata.shape)
    # Of flattened tokens too: all rows of one example after another.
    rows = [t for t in outputs.tensors if t.dim() and t.numel() and t.shape[0] % n == 0]
    if not shape or math.prod(shape) % n or not rows:
        return ()
    direction = weights.repeat_interleave(math.prod(shape) // n).view(shape)
    return torch.autograd.grad([joined], rows, [direction], retain_graph=True, allow_unused=True)


def _weights(n: int, dtype: torch.dtype) -> Tensor:
    drawn = torch.frombuffer(bytearray(os.urandom(n)), dtype=torch.uint8).to(torch.int32)
    exponents = _HALF_EXPONENTS if dtype == torch.float16 else _EXPONENTS
    signs = 1 - 2 * (drawn // 128)
    return torch.ldexp(signs, drawn % exponents - exponents // 2)
