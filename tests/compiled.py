"""C++ of the tests, compiled for this machine and opened."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "native"


def opened(name: str, folder: Path, *options: str) -> ctypes.CDLL:
    """``tests/native/NAME.cpp`` as a library in ``folder``; skips the test where no compiler takes its options.

    Products and sums stay apart, as in the library and as nvcc is told.
    """
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler is here")
    library = folder / f"{name}.so"
    built = subprocess.run(
        [
            compiler,
            "-O2",
            "-shared",
            "-fPIC",
            "-ffp-contract=off",
            *options,
            str(FOLDER / f"{name}.cpp"),
            "-o",
            str(library),
        ],
        capture_output=True,
        text=True,
    )
    if "barrier" in built.stderr or "c++20" in built.stderr:
        pytest.skip("the C++ compiler is older than C++20")
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(library))
