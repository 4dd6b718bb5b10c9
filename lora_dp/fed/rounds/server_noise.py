"""Server noise: clipped changes of whole clients are summed, noised once, and divided by the expected number."""

import torch
from torch import Tensor

from lora_dp.fed.methods import MERGED, Contribution, Layers, Method, State
from lora_dp.fed.methods.low_rank import dense
from lora_dp.fed.rounds.privacy_plan import PrivacyPlan, client_mechanism, clipped
from lora_dp.fed.rounds.regulators import regulators
from lora_dp.privacy.randomness import RandomSource


class NoisySum:
    """DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963): mean = start + (Σ clip(xₖ − start) + σ·C·z) / (q·clients).

    A client that was drawn and left out adds nothing, and changes neither the noise nor the divisor. Nobody drawn is
    noise alone.

    Args:
        plan: privacy with noise by the server.
        method: what is summed of an update, and in which basis its change is measured.
        layers: the adapted layers.
        state: the global state that the turn starts from.
        round_index, turn: from 0.
    """

    def __init__(
        self, plan: PrivacyPlan, method: Method, layers: Layers, state: State, round_index: int, turn: int
    ) -> None:
        self._plan, self._method, self._layers = plan, method, layers
        self._rules = regulators(method, state, round_index, turn)
        self._names = [n for n in state if not n.endswith(MERGED) and method.trains(n, round_index, turn)]
        self._start = self._contribution(state)
        self._sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in self._start.items()}

    def _contribution(self, state: State) -> dict[str, Tensor]:
        found = self._method.contribution({name: state[name] for name in self._names}, self._layers)
        return {name: dense(value) for name, value in found.items()}

    def add(self, update: State, start: State) -> bool:
        """Takes in one client's update from its own start; False where its change is not finite and adds nothing."""
        before = self._contribution(start)
        change = {name: value.double() - before[name].double() for name, value in self._contribution(update).items()}
        for name, rule in self._rules.items():
            change[name] = rule.measured(change[name])
        bounded = clipped(change, self._plan.max_update_norm)
        if bounded is None:
            return False
        for name, value in bounded.items():
            self._sums[name].add_(value)
        return True

    def result(self, source: RandomSource) -> Contribution:
        """The noised mean. The caller has counted it in the ledger."""
        plan = self._plan
        mechanism = client_mechanism(plan.max_update_norm, plan.turn_noise_multiplier(1), source)
        released = mechanism.release(list(self._sums.values()))
        mean: Contribution = {}
        for name, noisy in zip(self._sums, released, strict=True):
            change = noisy / (plan.client_rate * plan.clients)
            if name in self._rules:
                change = self._rules[name].restored(change)
            start = self._start[name]
            mean[name] = (start.double() + change).to(start.dtype)
        return mean
