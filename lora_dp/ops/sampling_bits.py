"""Uniform random bits from ChaCha20 (RFC 8439), on the device where they are wanted."""

import torch
from torch import Tensor

from lora_dp.ops.native import check_filled, native, native_takes, refuse_capture
from lora_dp.ops.registry import LIBRARY


def _fill(out: Tensor, key: int, draw: int) -> None:
    check_filled("sampling_bits_", out)
    refuse_capture("sampling_bits_", out.device)
    if out.device.type == "cuda" and native_takes(out.device):
        with torch.cuda.device(out.device):
            stream = torch.cuda.current_stream().cuda_stream
            native.sampling_bits_cuda(key, draw, out.data_ptr(), 8 * out.numel(), stream)
    elif out.device.type == "cpu":
        native.sampling_bits(key, draw, out.data_ptr(), 8 * out.numel())
    else:
        bits = torch.empty(out.shape, dtype=torch.int64, device="cpu")
        native.sampling_bits(key, draw, bits.data_ptr(), 8 * bits.numel())
        out.copy_(bits)
    # What is written through an address, autograd does not see.
    torch.autograd.graph.increment_version(out)


def _fake(out: Tensor, key: int, draw: int) -> None:
    return None


LIBRARY.define("sampling_bits_(Tensor(a!) out, int key, int draw) -> ()")
LIBRARY.impl("sampling_bits_", _fill, "CompositeExplicitAutograd")
torch.library.register_fake("lora_dp::sampling_bits_", _fake, lib=LIBRARY)


def sampling_bits_(out: Tensor, key: int, draw: int) -> Tensor:
    """Fills ``out`` with 64 uniform bits an element, the same for the same (key, draw) on every device.

    The bytes lie in memory in the order of RFC 8439, 2.4.

    Args:
        out: int64, contiguous, any shape and device, at most 2³⁵ elements.
        key: number of a key of the native library.
        draw: in [0, 2⁶³): the caller never uses one twice.

    Returns:
        ``out``.

    Raises:
        TypeError: no tensor.
        ValueError: wrong dtype or layout, too many elements, a draw out of range, or an unknown key.
    """
    if not isinstance(out, Tensor):
        raise TypeError(f"sampling_bits_: out must be a tensor, got {type(out).__name__}.")
    torch.ops.lora_dp.sampling_bits_(out, key, draw)
    return out
