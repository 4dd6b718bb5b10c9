"""A copy of the repository in which mutants are put and tests are run, one at a time."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.mutation.mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]
_COPIED = ("lora_dp", "kernels", "csrc", "tests", "benchmarks", "docs", "examples")
# What leaves an array or a word's width stops the process: without it, such a mistake often changes nothing.
_STOPPED = "-fsanitize=bounds,shift -fsanitize-undefined-trap-on-error -D_GLIBCXX_ASSERTIONS"
_SANITIZED = "-fsanitize=address -fno-omit-frame-pointer"
# AddressSanitizer turns mlock into nothing, which these tests look for.
_LOCKED = "csrc/secret_key.cpp"
# An editable install puts its own finder ahead of every path.
_SITE = """import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable_")]
"""


class Workbench:
    """Copies the repository, and starts what runs tests there. Use it as a context.

    Args:
        folder: of the copy; what is there is replaced, but for what C++ was compiled to.
        interpreted: run Triton's kernels in its interpreter.
    """

    def __init__(self, folder: Path, *, interpreted: bool = False) -> None:
        self.tree = folder / "tree"
        self._folder = folder
        self._interpreted = interpreted
        # By whether AddressSanitizer watches.
        self._servers: dict[bool, subprocess.Popen[str]] = {}
        self._sound: dict[tuple[str, bool], bool] = {}
        self._sound_libraries: dict[bool, bytes] = {}

    def __enter__(self) -> "Workbench":
        shutil.rmtree(self.tree, ignore_errors=True)
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
        for name in _COPIED:
            shutil.copytree(ROOT / name, self.tree / name, ignore=ignored)
        for path in (self.tree / "csrc").iterdir():
            path.touch()  # newer than what was last compiled, which may have been a mutant
        for path in [*ROOT.glob("*.toml"), *ROOT.glob("*.md"), *ROOT.glob("*.txt")]:
            shutil.copy(path, self.tree)
        (self.tree / "lora_dp" / "kernels").symlink_to("../kernels")
        (self.tree / "sitecustomize.py").write_text(_SITE)
        self._library = self.tree / "lora_dp" / Path(_installed_library()).name
        self._use(b"")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        for server in self._servers.values():
            assert server.stdin is not None
            server.stdin.close()
            server.wait()
        self._servers = {}

    def ask(self, tests: list[str], first: list[str], sanitized: bool = False) -> dict[str, Any]:
        """What the server answers (:mod:`tests.mutation.server`); ``sanitized`` for one under AddressSanitizer."""
        if sanitized not in self._servers:
            environment = {
                **os.environ,
                "PYTHONPATH": str(self.tree),
                "OMP_NUM_THREADS": "1",
                "MPLBACKEND": "Agg",
                "HF_HUB_OFFLINE": "1",
            }
            environment.pop("PYTEST_ADDOPTS", None)
            environment["TRITON_INTERPRET"] = "1" if self._interpreted else "0"
            if sanitized:  # the interpreter is not, so that the runtimes must be loaded ahead of it
                environment["LD_PRELOAD"] = " ".join(map(_runtime, ("libasan.so", "libstdc++.so")))
                environment["ASAN_OPTIONS"] = "detect_leaks=0"
            server = self._servers[sanitized] = subprocess.Popen(
                [sys.executable, "-m", "tests.mutation.server"],
                cwd=self.tree,
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            if _line(server) != "ready":
                raise RuntimeError("The process that runs tests did not start: see its error above.")
        server = self._servers[sanitized]
        assert server.stdin is not None
        print(json.dumps({"tests": tests, "first": first}), file=server.stdin, flush=True)
        answer: dict[str, Any] = json.loads(_line(server))
        return answer

    def sound(self, test: str, sanitized: bool) -> bool:
        """Whether this test passes where there is no mistake; asked once."""
        if (test, sanitized) not in self._sound:
            self._sound[test, sanitized] = self.ask([test], [], sanitized)["status"] == "passed"
        return self._sound[test, sanitized]

    def try_out(self, mutant: Mutant, tests: list[str], likely: list[str]) -> dict[str, Any]:
        """Puts the mistake in, runs tests until one fails, and takes it out.

        Args:
            mutant: of a file of the repository.
            tests: files, in the order in which they run.
            likely: tests to run before all others.

        Returns:
            ``status`` ("killed", "survived", "timeout", "not compiled", "same code" where the compiler makes the same
            library of it), the ``test`` that failed, ``seconds``.

        Raises:
            RuntimeError: a test fails without the mistake too.
        """
        path = self.tree / mutant.path
        source = (ROOT / mutant.path).read_text(encoding="utf-8")
        compiled = mutant.path.startswith("csrc/")
        sanitized = compiled and mutant.path != _LOCKED
        mutated = mutant.applied(source)
        if compiled and sanitized not in self._sound_libraries:
            self._sound_libraries[sanitized] = self._compile(sanitized)
        path.write_text(mutated, encoding="utf-8")
        try:
            library = self._compile(sanitized) if compiled else b""
            if not (library if compiled else _parses(mutated)):
                return {"status": "not compiled", "test": None, "seconds": 0.0}
            if compiled and library == self._sound_libraries[sanitized]:
                return {"status": "same code", "test": None, "seconds": 0.0}
            self._use(library)
            found = self.ask(likely, [], sanitized) if likely else {"status": "passed", "seconds": 0.0}
            if found["status"] in ("passed", "nothing"):
                found = self.ask(tests, likely, sanitized)
        finally:
            path.write_text(source, encoding="utf-8")
        if found["status"] == "nothing":
            raise RuntimeError(f"No test ran for {mutant.path}: {tests}.")
        # Of a process that ended, nobody knows in which test.
        failed = [found["test"]] if found["test"] is not None else tests if found["status"] == "killed" else []
        self._use(self._sound_libraries[sanitized] if compiled else b"")
        for test in failed:
            if not self.sound(test, sanitized):
                raise RuntimeError(f"{test} fails without a mutant too: mend that first.")
        return {**found, "status": "survived" if found["status"] == "passed" else found["status"]}

    def _use(self, library: bytes) -> None:
        """This is the copy's library from now on; empty for the one that is installed."""
        new = self._library.with_suffix(".new")
        new.write_bytes(library or Path(_installed_library()).read_bytes())
        os.replace(new, self._library)

    def _compile(self, sanitized: bool) -> bytes:
        """The library that the copy's C++ makes; empty where it is no C++."""
        nanobind, build = self._folder / "nanobind", self._folder / ("sanitized" if sanitized else "build")
        if not nanobind.exists():
            subprocess.run(
                [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(nanobind), "nanobind>=2.4"],
                check=True,
            )
        if not (build / "build.ninja").exists():
            # Quick to compile rather than quick: the portable kernels alone, which every machine has.
            subprocess.run(
                [
                    "cmake",
                    "-S",
                    str(self.tree),
                    "-B",
                    str(build),
                    "-G",
                    "Ninja",
                    "-DLORA_DP_CUDA=OFF",
                    "-DCMAKE_SYSTEM_NAME=Linux",
                    "-DCMAKE_SYSTEM_PROCESSOR=generic",
                    "-DCMAKE_BUILD_TYPE=None",
                    f"-DCMAKE_CXX_FLAGS=-O1 -DNDEBUG {_STOPPED}{f' {_SANITIZED}' * sanitized}",
                    f"-DPython_EXECUTABLE={sys.executable}",
                    f"-Dnanobind_DIR={nanobind / 'nanobind' / 'cmake'}",
                ],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        built = subprocess.run(["ninja", "-C", str(build)], capture_output=True, text=True)
        if built.returncode:
            return b""
        return next(build.glob("_native*.so")).read_bytes()


def _line(server: "subprocess.Popen[str]") -> str:
    assert server.stdout is not None
    return server.stdout.readline().strip()


def _runtime(name: str) -> str:
    compiler = os.environ.get("CXX", "g++")
    return subprocess.run(
        [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def _installed_library() -> str:
    from lora_dp import _native

    assert _native.__file__ is not None
    return _native.__file__
