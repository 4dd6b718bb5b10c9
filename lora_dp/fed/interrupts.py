"""Ctrl-C while a command starts."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130  # the shell's code for Ctrl-C


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
