"""What each kernel takes of a chip, found by compiling ahead of time: no GPU is needed.

``python -m lora_dp.kernels`` prints the table. Registers and local memory come from the machine code itself; a
kernel that spills has a stack frame or local memory.
"""

import importlib
import os
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

# Shared memory that one block may have, by compute capability (CUDA C++ Programming Guide, table of capabilities).
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

# A build that wants more compiles to next to nothing, and would look as if it fitted.
TENSOR_COLUMNS = 512


@dataclass(frozen=True)
class Resources:
    """One build on one architecture: registers a thread, bytes of stack and local memory a thread, shared bytes, and
    columns of the tensor memory that sm_100 has."""

    kernel: str
    label: str
    capability: int
    registers: int
    stack: int
    local: int
    shared: int
    tensor: int = 0

    @property
    def fits(self) -> bool:
        """No spills, and no more shared and tensor memory than the chip has."""
        return (
            self.stack == 0
            and self.local == 0
            and self.shared <= SHARED_LIMITS[self.capability]
            and self.tensor <= TENSOR_COLUMNS
        )


def modules() -> list[str]:
    """The kernel files: those that list builds."""
    package = importlib.import_module("lora_dp.kernels")
    names = [
        f"lora_dp.kernels.{info.name}"
        for info in pkgutil.iter_modules(package.__path__)
        if info.name not in ("__main__", "resources")
    ]
    return [name for name in names if hasattr(importlib.import_module(name), "builds")]


def compile_kernels(module: str, capabilities: Sequence[int] = tuple(SHARED_LIMITS)) -> list[Resources]:
    """Compile every build of one kernel file for every architecture.

    Raises:
        RuntimeError: Triton has no tool that reads machine code, or a build does not compile.
    """
    return list(_measure(module, capabilities))


def _measure(module: str, capabilities: Sequence[int]) -> Iterator[Resources]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for build in importlib.import_module(module).builds():
        names = build.kernel.arg_names
        signature = {name: build.signature.get(name, "constexpr") for name in names}
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in build.divisible_by_16}
        options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
        for capability in capabilities:
            compiled = triton.compile(
                ASTSource(build.kernel, signature, dict(build.constexprs), attributes),
                target=GPUTarget("cuda", capability, 32),
                options=options,
            )
            registers, stack, local = _usage(compiled.asm["cubin"])
            yield Resources(
                build.kernel.__name__,
                build.label,
                capability,
                registers,
                stack,
                local,
                compiled.metadata.shared,
                getattr(compiled.metadata, "tmem_size", None) or 0,
            )


def _usage(cubin: bytes) -> tuple[int, int, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name], capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump gave no resource usage: {report.strip()[:200] or 'no output'}")
    return int(found[1]), int(found[2]), int(found[3])


def measure_all(processes: int | None = None) -> Iterator[list[Resources]]:
    """:func:`compile_kernels` of every kernel file, several at a time."""
    with ProcessPoolExecutor(processes or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_kernels, modules())


def main() -> None:
    """Print the table; exit with status 1 if something does not fit."""
    print(f"{'kernel':<28}{'build':<52}{'sm':>4}{'registers':>11}{'stack':>7}{'local':>7}{'shared':>9}{'tensor':>8}")
    bad = 0
    for rows in measure_all():
        for row in rows:
            bad += not row.fits
            print(
                f"{row.kernel:<28}{row.label:<52}{row.capability:>4}{row.registers:>11}{row.stack:>7}{row.local:>7}"
                f"{row.shared:>9}{row.tensor:>8}{'' if row.fits else '  does not fit'}",
                flush=True,
            )
    raise SystemExit(1 if bad else 0)
