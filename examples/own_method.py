"""A federated method of one's own: one class, tried here in one process.

The page docs/reference/methods.md makes a package of it.

    python examples/own_method.py

Takes about twenty seconds, and downloads nothing.
"""

from dataclasses import dataclass
from typing import ClassVar

from lora_dp.fed.methods import METHODS, Method


@dataclass(frozen=True)
class WarmUp(Method):
    """B alone for the first rounds, then both factors."""

    until: int = 5

    name: ClassVar[str] = "warm-up"
    learning_rates: ClassVar = {8: 0.5, float("inf"): 0.3}

    def phases(self, round_index, turn=0):
        return "B" if round_index < self.until else "AB"


if __name__ == "__main__":  # a try without a package: this process alone knows the name
    from lora_dp.fed import RunConfig, run

    METHODS[WarmUp.name] = WarmUp
    config = RunConfig.from_flat({"method": "warm-up", "method_options": {"until": 2}, "rounds": 4, "local_steps": 5})
    for result in run(config).rounds[1:]:
        print(f"round {result.round} trained {result.phases}: accuracy {result.accuracy:.3f}, ε = {result.epsilon:.2f}")
