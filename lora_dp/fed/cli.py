"""The door of the command line, ``lora-dp`` or ``python -m lora_dp.fed``: which command, and what is missing for it.

It imports the standard library alone, so that help, a version or a typo is answered at once.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import lora_dp
from lora_dp.extras import missing
from lora_dp.fed.did_you_mean import nearest

COMMANDS = ("run", "compare", "resume", "report", "inspect", "audit", "pretrain")
INTERRUPTED = 130  # the shell's code for Ctrl-C
# What a process has done before this line is no more than starting Python.
_BEGAN = time.monotonic()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (by default sys.argv's) and returns the exit code: 2 for a wrong option or input."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    began = _BEGAN if arguments is None else time.monotonic()
    if words[:1] == ["--version"]:
        print(f"lora-dp {lora_dp.__version__}")
        return 0
    command = words.pop(0) if words and not words[0].startswith("-") else "run"
    if command not in COMMANDS:
        sys.stderr.write(f"error: there is no command {command!r}: {nearest(command, COMMANDS)}\n")
        return 2
    try:
        with quiet_interrupts():
            try:
                from lora_dp.fed import commands
            except ModuleNotFoundError as error:
                package = (error.name or "lora_dp").partition(".")[0]
                if package == "lora_dp":
                    raise
                sys.stderr.write(f"error: {missing('lora_dp.fed', package, 'fed')}\n")
                return 2
        return commands.main(command, words, began)
    except KeyboardInterrupt:
        return INTERRUPTED


@contextmanager
def quiet_interrupts() -> Iterator[None]:
    """Inside, while modules are imported and nothing has begun, Ctrl-C ends the process without a word.

    An exception would be raised somewhere in a module that is half imported, and come out as another one.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        os._exit(INTERRUPTED)

    in_charge = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if in_charge else None
    if before is not signal.default_int_handler:  # ignored, or a caller's own
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
