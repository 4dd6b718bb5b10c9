"""round(scale · z) for independent standard normals z, from ChaCha20 (RFC 8439) bits; exact on every device.

Each pair of values is a function of 256 bits: u, an odd multiple of 2⁻¹²⁸ in (0, 1), and v, a multiple of 2⁻¹²⁸ in
[0, 1), give √(−2 ln u)·cos 2πv and √(−2 ln u)·sin 2πv (Box and Muller 1958). The product with ``scale`` is rounded
correctly: what comes out depends on the bits alone, not on processor, compiler or mathematical library
(``csrc/rounded_gaussian.h`` has the error analysis). How far that is from the rounding of a true Gaussian:

- *Tail.* u ≥ 2⁻¹²⁸, so no value lies beyond √(256 ln 2) = 13.32 deviations; a true pair does with probability 2⁻¹²⁸.
- *Resolution.* A true u within the same step of 2⁻¹²⁷ changes the integer with probability below 2⁻⁸⁹, a true v with
  probability below 2⁻⁹¹.
- *Arithmetic.* 120 fractional bits leave a wrong integer with probability below 2⁻⁷⁵.

All together: total variation below 2⁻⁷⁴ a value.
"""

import torch
from torch import Tensor

from lora_dp.ops.native import check_filled, native, native_takes, refuse_capture
from lora_dp.ops.registry import LIBRARY


def _fill(out: Tensor, key: int, parameter: int, draw: int, scale: float) -> None:
    check_filled("rounded_gaussian_", out)
    refuse_capture("rounded_gaussian_", out.device)
    if out.device.type == "cuda" and native_takes(out.device):
        with torch.cuda.device(out.device):
            stream = torch.cuda.current_stream().cuda_stream
            native.rounded_gaussians_cuda(key, parameter, draw, scale, out.data_ptr(), out.numel(), stream)
    elif out.device.type == "cpu":
        native.rounded_gaussians(key, parameter, draw, scale, out.data_ptr(), out.numel())
    else:
        values = torch.empty(out.shape, dtype=torch.int64, device="cpu")
        native.rounded_gaussians(key, parameter, draw, scale, values.data_ptr(), values.numel())
        out.copy_(values)
    # What is written through an address, autograd does not see.
    torch.autograd.graph.increment_version(out)


def _fake(out: Tensor, key: int, parameter: int, draw: int, scale: float) -> None:
    return None


LIBRARY.define("rounded_gaussian_(Tensor(a!) out, int key, int parameter, int draw, float scale) -> ()")
LIBRARY.impl("rounded_gaussian_", _fill, "CompositeExplicitAutograd")
torch.library.register_fake("lora_dp::rounded_gaussian_", _fake, lib=LIBRARY)


def rounded_gaussian_(out: Tensor, key: int, parameter: int, draw: int, scale: float) -> Tensor:
    """Fills ``out`` with independent round(scale · z).

    The same (key, parameter, draw) gives the same values, on every device: the caller keeps them apart.

    Args:
        out: int64, contiguous, any shape and device. Where no native op runs, values are drawn on the CPU.
        key: number of a key of the native library.
        parameter: which of the parameters that share a draw, in [0, 2²⁴).
        draw: in [0, 2⁶³).
        scale: deviation, in [1, 2³³).

    Returns:
        ``out``.

    Raises:
        TypeError: no tensor.
        ValueError: wrong dtype or layout, a number out of range, or an unknown key.
    """
    if not isinstance(out, Tensor):
        raise TypeError(f"rounded_gaussian_: out must be a tensor, got {type(out).__name__}.")
    torch.ops.lora_dp.rounded_gaussian_(out, key, parameter, draw, scale)
    return out
