"""The door of the command line, ``lora-dp`` or ``python -m lora_dp.fed``: which command, and what is missing for it.

It imports the standard library alone, so that help, a version or a typo is answered at once.
"""

import sys
import time
from collections.abc import Sequence

import lora_dp
from lora_dp.extras import NotInstalled, needing
from lora_dp.fed.did_you_mean import nearest
from lora_dp.fed.interrupts import INTERRUPTED, quiet_interrupts

COMMANDS = ("run", "compare", "resume", "report", "inspect", "audit", "pretrain", "advise")
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
        with quiet_interrupts(), needing("lora_dp.fed", "fed"):
            from lora_dp.fed import commands
        return commands.main(command, words, began)
    except NotInstalled as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
