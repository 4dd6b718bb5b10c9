"""The native library, and which tensors it takes."""

import torch
from torch import Tensor

from lora_dp.ops import registry

try:
    from lora_dp import _native as native
except ImportError as error:
    raise ImportError("the native library of lora_dp is not built: run `pip install -e .` in the repository") from error

__all__ = ["check_filled", "in_memory", "native", "native_takes", "refuse_capture", "why_not"]


def native_takes(device: torch.device) -> bool:
    """Whether native ops run on this device; not inside :func:`lora_dp.ops.registry.reference_only`."""
    return not registry.only_reference() and why_not(device) is None


def in_memory(tensor: Tensor) -> bool:
    """Whether all elements of a contiguous tensor lie in its storage, each at a multiple of its size."""
    size = tensor.element_size()
    held = tensor.untyped_storage().nbytes() >= (tensor.storage_offset() + tensor.numel()) * size
    return tensor.numel() == 0 or (held and tensor.data_ptr() % size == 0)


def check_filled(op: str, out: Tensor) -> None:
    """Refuse a tensor that an op cannot fill with 64-bit integers.

    Raises:
        ValueError: another dtype or layout, or a tensor that is not in memory.
    """
    if out.layout != torch.strided or out._is_zerotensor() or out.dtype != torch.int64 or not out.is_contiguous():
        got = out.stride() if out.layout == torch.strided else out.layout
        raise ValueError(f"{op}: out must be contiguous and int64, got {out.dtype} {got}.")
    if not in_memory(out):
        raise ValueError(f"{op}: out reaches beyond its storage, or its address is odd: give it cloned.")


def refuse_capture(op: str, device: torch.device) -> None:
    """Noise in a CUDA graph would be the same in every replay.

    Raises:
        RuntimeError: a graph is being captured on this device's current stream.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{op}: a captured graph would repeat its noise: leave the private step out of the capture.")


# Devices on which the native ops have shown that they run.
_tried: set[torch.device] = set()


def why_not(device: torch.device) -> str | None:
    """What keeps native ops from running on this device; None where they run."""
    if device.type == "cpu" or device in _tried:
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return "native ops are for CPUs and NVIDIA GPUs"
    if not native.cuda:
        return "installed where no CUDA compiler (nvcc) was found: install again where there is one"
    if torch.cuda.get_device_capability(device) < registry.LEAST_CAPABILITY:
        return "compute capability below 8.0"
    if (failed := _failed_trial(device)) is None:
        _tried.add(device)
    return failed


def _failed_trial(device: torch.device) -> str | None:
    """Draws a few numbers on the GPU and on the CPU: what was compiled may not fit the driver."""
    key, n, scale = native.new_key(), 1000, 2.0**32
    try:
        found, wanted = (torch.empty(n, dtype=torch.int64, device=where) for where in (device, "cpu"))
        native.rounded_gaussians(key, 0, 0, scale, wanted.data_ptr(), n)
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            native.rounded_gaussians_cuda(key, 0, 0, scale, found.data_ptr(), n, stream)
        if torch.equal(found.cpu(), wanted):
            return None
        return "a trial gave other numbers than the CPU: please report this"
    except RuntimeError as error:
        return f"a trial failed ({error}): if it stays so, install again with an nvcc that fits the driver"
    finally:
        native.drop_key(key)
