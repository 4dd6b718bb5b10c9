"""Ctrl-C while a command starts: interrupts that a caller handles stay the caller's."""

import signal

from lora_dp.fed.interrupts import quiet_interrupts


def test_interrupts_that_a_caller_handles_stay_the_callers():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with quiet_interrupts():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with quiet_interrupts():
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
