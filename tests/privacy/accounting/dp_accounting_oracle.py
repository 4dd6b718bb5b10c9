"""dp-accounting called directly."""

from lora_dp.privacy.accounting import Ledger, PoissonGaussian

DELTA = 1e-5


def ledger_of(*entries: tuple[float, float, int]) -> Ledger:
    ledger = Ledger()
    for rate, noise, steps in entries:
        ledger.append(PoissonGaussian(noise, rate), steps)
    return ledger
