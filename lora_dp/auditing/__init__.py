"""Auditing: does a training keep the ε that it claims? Lower bounds on ε, at a stated confidence, by trying to leak.

    result = audit(train_fn, GradientCanaries(count=1000), delta=1e-5)
    print(result)

:mod:`~lora_dp.auditing.bounds` has the mathematics with its sources, :mod:`~lora_dp.auditing.canaries` what is planted.
"""

from lora_dp.auditing.audit import AuditResult, audit, plot_audits
from lora_dp.auditing.bounds import (
    clopper_pearson_upper,
    gaussian_epsilon,
    one_run_epsilon,
    one_run_mu,
    one_run_p_value,
    two_world_epsilon,
    two_world_mu,
)
from lora_dp.auditing.canaries import ExampleCanaries, GradientCanaries, PlantedCanaries

__all__ = [
    "AuditResult",
    "ExampleCanaries",
    "GradientCanaries",
    "PlantedCanaries",
    "audit",
    "clopper_pearson_upper",
    "gaussian_epsilon",
    "one_run_epsilon",
    "one_run_mu",
    "one_run_p_value",
    "plot_audits",
    "two_world_epsilon",
    "two_world_mu",
]
