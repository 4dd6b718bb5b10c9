"""The part of the clip bound for which coefficients are worked out, by kernels and by :mod:`lora_dp.privacy.clipping`.

That module says why. Needs no Triton.
"""

MARGIN = 1 - 2.0**-19
