"""Privacy accounting: what a run has released, and the epsilon that it adds up to.

A run is a list of private steps, each the Gaussian mechanism on a Poisson sample. :class:`~lora_dp.Ledger` keeps that
list; Google's ``dp-accounting`` composes it under the add-or-remove-one relation, by one of two accountants:

- ``"pld"``: privacy loss distributions (Doroshenko et al. 2022, arXiv 2207.04380) and Rényi DP, whichever proves the
  smaller epsilon; tight, from 10 ms to a second;
- ``"rdp"``: Rényi DP alone (Mironov et al. 2019, arXiv 1908.10530); about a millisecond once a kind of step has been
  seen, with an epsilon some 5 to 25 % larger, and more at sample rates below 0.001.

Both give an upper bound on the true epsilon. Planning (a noise multiplier, a number of steps) is built on the same
numbers, so that what was planned and what is reported never disagree.
"""

from lora_dp.privacy.accounting.epsilon import Accountant
from lora_dp.privacy.accounting.ledger import Ledger, PrivacyBudgetExceeded
from lora_dp.privacy.accounting.planning import calibrate_noise_multiplier, max_steps
from lora_dp.privacy.accounting.steps import PoissonGaussian, check_delta, check_epsilon, check_promise

__all__ = [
    "Accountant",
    "Ledger",
    "PoissonGaussian",
    "PrivacyBudgetExceeded",
    "calibrate_noise_multiplier",
    "check_delta",
    "check_epsilon",
    "check_promise",
    "max_steps",
]
