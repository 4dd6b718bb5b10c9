"""The compiler, which sees where a loop leaves an array of vectors, as no sanitizer does, has nothing to say."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
COMPILER = shutil.which("g++")
WIDE = platform.machine().lower() in ("x86_64", "amd64")
# By CMakeLists.txt.
SOURCES = {
    "kernels.cpp": [],
    "secret_key.cpp": [],
    "kernels_avx2.cpp": ["-DLORA_DP_X86_KERNELS", "-mavx2"],
    "kernels_avx512.cpp": ["-DLORA_DP_X86_KERNELS", "-mavx512f", "-mprefer-vector-width=512"],
}


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("level", ["-O1", "-O3"])
@pytest.mark.parametrize("source", SOURCES)
def test_native_code_compiles_without_a_warning(source: str, level: str) -> None:
    if SOURCES[source] and not WIDE:
        pytest.skip("needs a compiler for x86-64")
    built = subprocess.run(
        [
            str(COMPILER),
            "-std=c++17",
            level,
            *SOURCES[source],
            "-Wall",
            "-Wextra",
            "-Werror",
            "-c",
            str(CSRC / source),
            "-o",
            "/dev/null",
        ],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
