"""Runs tests in forks of one process, which has imported what takes long: torch, pytest and what tests import.

It reads one request a line, as JSON: ``{"tests": [...], "first": [...]}``; and answers with one line:
``{"status": "passed" | "killed" | "timeout" | "nothing", "test": "..." | null, "seconds": ...}``. It is started in a
copy of the repository whose package it must not have imported itself.
"""

import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import sys
import time
from typing import Any

import pytest

# Imported before the forks, where they are installed.
SLOW = (
    "torch",
    "torch.testing",
    "torch.utils.data",
    "numpy",
    "scipy.stats",
    "hypothesis",
    "dp_accounting.pld",
    "dp_accounting.rdp",
    "opacus",
    "peft",
    "transformers",
    "timm",
    "datasets",
    "flwr.app",
    "flwr.clientapp",
    "flwr.serverapp",
    "yaml",
    "sklearn.metrics",
    "pandas",
    "matplotlib.pyplot",
    "mpmath",
    "jsonargparse",
    "psutil",
    "_hypothesis_pytestplugin",
    "pdb",
    "torch.utils._pytree",
    "torch.func",
    "torch._dynamo",
    "tabulate",
    "rich.console",
    "torch.nn.attention",
)
# A test that takes longer, in seconds, hangs.
LIMIT = 100
_MEMORY = 24 * 2**30


class First:
    """A plugin of pytest: some tests before all others, one time limit a test, and what failed first."""

    def __init__(self, first: list[str]) -> None:
        self.order = {node: number for number, node in enumerate(first)}
        self.failed: str | None = None
        self.ran = 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self.order.get(item.nodeid, len(self.order)))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.ran += 1
        signal.alarm(LIMIT)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.failed is None:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.failed is None:
            self.failed = report.nodeid or None


def run(tests: list[str], first: list[str], answer: int) -> None:
    """In a fork: the tests until one fails; writes what failed."""
    signal.alarm(LIMIT)
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # AddressSanitizer takes terabytes of addresses
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    plugin = First(first)
    # Plugins that collect garbage, measure, start processes, or leave something behind are of no use here.
    without = ("cacheprovider", "faulthandler", "unraisableexception", "threadexception", "benchmark", "xdist")
    # Nor are tests that take minutes: they would pass the limit, and a survivor be taken for an endless loop.
    code = pytest.main(
        ["-x", "--tb=no", "-m", "not long", "--hypothesis-profile=ci", *(f"-pno:{name}" for name in without), *tests],
        plugins=[plugin],
    )
    # A test of this name may be gone; a file that cannot be imported is a mistake found.
    gone = code == pytest.ExitCode.USAGE_ERROR and any("::" in test for test in tests)
    status = (
        "killed"
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) and not gone
        else ("passed" if plugin.ran and not gone else "nothing")
    )
    os.write(answer, json.dumps({"status": status, "test": plugin.failed}).encode())


def fork(request: dict[str, Any], silence: int) -> dict[str, Any]:
    """The answer to a request."""
    reading, writing = os.pipe()
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            os.setsid()
            for stream in (0, 1, 2):
                os.dup2(silence, stream)
            run(request["tests"], request["first"], writing)
            status = 0
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        _, status = os.waitpid(child, 0)
        # What a killed test has started ends with it, and lets go of the pipe.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        text = file.read()
    timed_out = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
    found = json.loads(text) if text else {"status": "timeout" if timed_out else "killed", "test": None}
    return {**found, "seconds": round(time.monotonic() - begin, 2)}


def main() -> None:
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    silence = os.open(os.devnull, os.O_RDWR)
    os.dup2(silence, 1)
    for name in SLOW:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    if "lora_dp" in sys.modules:
        raise RuntimeError("the package was imported before the forks: no mutant of it would ever run")
    gc.freeze()
    print("ready", file=answers, flush=True)
    for line in requests:
        print(json.dumps(fork(json.loads(line), silence)), file=answers, flush=True)


if __name__ == "__main__":
    main()
