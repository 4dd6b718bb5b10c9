"""What of lora-dp is built in here, what runs where, and why something does not."""

import importlib.metadata
import platform
from dataclasses import dataclass

import torch

from lora_dp.ops.native import native, why_not
from lora_dp.ops.registry import LEAST_CAPABILITY, kernels_take


@dataclass(frozen=True)
class Backend:
    """One way in which ops run.

    Attributes:
        name: of the way.
        device: on which, as torch names it.
        runs: whether it does here.
        detail: how, or why not and what to do.

    >>> always, *_, reference = backends()
    >>> always.name, always.device, always.runs
    ('native C++', 'cpu', True)
    >>> reference.name, reference.device
    ('plain torch', 'any')
    """

    name: str
    device: str
    runs: bool
    detail: str


def backends() -> list[Backend]:
    """Every way in which ops can run, on the CPU and on each GPU: native C++ and CUDA, Triton, plain torch.

    >>> [backend.name for backend in backends() if backend.device in ("cpu", "any") and backend.runs]
    ['native C++', 'plain torch']
    """
    locked = (
        "keys locked in memory"
        if native.keys_are_locked()
        else ("keys not locked in memory: raise the limit of locked memory (ulimit -l) to keep them out of swap")
    )
    found = [Backend("native C++", "cpu", True, f"noise and updates in {native.instructions()} vectors; {locked}")]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        absent = "no GPU is visible to torch"
        cuda = "built" if native.cuda else "not built: install again where nvcc is"
        found += [
            Backend("native CUDA", "cuda", False, f"{absent}; {cuda}"),
            Backend("Triton", "cuda", False, f"{absent}; {_triton()[1]}"),
        ]
    for index in range(count):
        device = torch.device("cuda", index)
        name = f"cuda:{index}"
        reason = why_not(device)
        what = torch.cuda.get_device_name(device)
        found += [
            Backend("native CUDA", name, reason is None, what if reason is None else f"{what}: {reason}"),
            _triton_on(device, name, what),
        ]
    found.append(Backend("plain torch", "any", True, f"torch {torch.__version__}: the reference, where no other runs"))
    return found


def _triton() -> tuple[bool, str]:
    try:
        return True, f"Triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:
        return False, "Triton is not installed: pip install triton"


def _triton_on(device: torch.device, name: str, what: str) -> Backend:
    installed, version = _triton()
    if not installed:
        return Backend("Triton", name, False, version)
    if not kernels_take(torch.empty(0, device=device)):
        least = ".".join(map(str, LEAST_CAPABILITY))
        return Backend("Triton", name, False, f"{what}: needs an NVIDIA GPU of compute capability {least} or later")
    return Backend("Triton", name, True, f"{what}, {version}: the layers, clipping and sums")


def describe() -> str:
    """:func:`~lora_dp.backends` as a table for people."""
    rows = [("", "device", "runs", "")]
    rows += [(b.name, b.device, "yes" if b.runs else "no", b.detail) for b in backends()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    head = f"lora-dp {importlib.metadata.version('lora-dp')}, Python {platform.python_version()}, {platform.platform()}"
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    ]
    return "\n".join([head, "", *lines])
