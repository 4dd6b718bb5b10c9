"""Which clip bounds there are; :mod:`lora_dp.privacy.clipping` derives both."""

LEAST_BOUND, LARGEST_BOUND = 1e-20, 1e20
BOUNDS = f"{LEAST_BOUND:g} and {LARGEST_BOUND:g}".replace("e+", "e")
