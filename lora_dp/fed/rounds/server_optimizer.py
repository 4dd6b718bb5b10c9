"""The server's step from the mean of a round, and the average of the states that it passes through.

All of it sees released values alone: post-processing, which costs no privacy.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lora_dp.fed.methods import MERGED, State
from lora_dp.fed.server_options import Averaging, ServerOptimizerName

MOMENTUM = 0.9
BETAS = (0.9, 0.99)
# Of Adam's divisor, in deviations of the noise: what lies below is noise alone.
FLOOR = 0.5
_EPS = 1e-8
DECAY = 0.95


@dataclass
class ServerOptimizer:
    """θ ← θ + rate · step of the mean change Δ that the clients' updates have.

    - "average": the step is Δ, FedAvg at rate 1 (McMahan et al. 2017, arXiv 1602.05629).
    - "momentum": m ← 0.9·m + Δ (FedAvgM, arXiv 1909.06335).
    - "adam": m̂ / √max(v̂ − s², (s/2)²) with the *known* variance s² of the noise in Δ taken out of the second moment
      (FedAdam, arXiv 2003.00295, with the correction of DP-AdamBC, arXiv 2312.14334): noise alone would else make all
      steps alike.

    Args:
        name: which.
        rate: the server's learning rate.

    Attributes:
        first, second: moments by parameter.
        steps: by parameter, so many changes have come.
    """

    name: ServerOptimizerName
    rate: float
    first: State = field(default_factory=dict)
    second: State = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)

    @property
    def takes_the_mean(self) -> bool:
        """Whether the mean is the next state as it is."""
        return self.name == "average" and self.rate == 1

    def stepped(self, mean: State, start: Mapping[str, Tensor], noise: Mapping[str, float]) -> State:
        """The state in place of the mean.

        Args:
            mean: of the clients' tensors, by name.
            start: what they started from.
            noise: s by name, the deviation of the noise in each number of the mean; 0 without.
        """
        if self.takes_the_mean:
            return mean
        return {name: self._moved(name, value, start[name], noise.get(name, 0.0)) for name, value in mean.items()}

    def _moved(self, name: str, mean: Tensor, start: Tensor, noise: float) -> Tensor:
        change = mean.double() - start.double()
        step = change
        self.steps[name] = count = self.steps.get(name, 0) + 1
        if self.name == "momentum":
            step = self.first[name] = change + MOMENTUM * self.first.get(name, torch.zeros_like(change))
        elif self.name == "adam":
            decay, slow = BETAS
            first = decay * self.first.get(name, torch.zeros_like(change)) + (1 - decay) * change
            second = slow * self.second.get(name, torch.zeros_like(change)) + (1 - slow) * change.square()
            self.first[name], self.second[name] = first, second
            signal = second / (1 - slow**count) - noise**2
            step = first / (1 - decay**count) / signal.clamp(min=(FLOOR * noise) ** 2 + _EPS**2).sqrt()
        return (start.double() + self.rate * step).to(mean.dtype)

    def snapshot(self) -> "ServerOptimizer":
        """As it is now; tensors are replaced and never changed, so nothing is copied."""
        return replace(self, first=dict(self.first), second=dict(self.second), steps=dict(self.steps))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return {f"{kind}:{name}": t for kind in ("first", "second") for name, t in getattr(self, kind).items()}

    def restore(self, tensors: Mapping[str, Tensor], steps: Mapping[str, int]) -> None:
        """Goes on from :meth:`tensors` and ``steps``."""
        self.first, self.second, self.steps = {}, {}, {name: int(count) for name, count in steps.items()}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(":")
            getattr(self, kind)[name] = tensor


@dataclass
class StateAverage:
    """The average of the states after each round: their noise averages out (De et al. 2022, arXiv 2204.13650).

    Args:
        kind: "tail", all of the second half of the run alike; "ema", each round the more the later, by 0.95; "none".
        rounds: planned.

    Attributes:
        held: the average so far, by name; empty before the first.
        count: states in it.
    """

    kind: Averaging
    rounds: int
    held: State = field(default_factory=dict)
    count: int = 0

    def add(self, state: Mapping[str, Tensor], rounds_done: int) -> None:
        """Takes in the state after so many rounds."""
        if self.kind == "none" or self.kind == "tail" and rounds_done <= self.rounds // 2:
            return
        self.count += 1
        # The first states of an exponential average count as they would in a plain one.
        part = 1 / self.count if self.kind == "tail" else max(1 - DECAY, 1 / self.count)
        for name, tensor in state.items():
            if name.endswith(MERGED):
                continue
            before = self.held.get(name)
            new = tensor.double()
            self.held[name] = new if before is None else before + part * (new - before)

    def snapshot(self) -> "StateAverage":
        """As it is now; tensors are replaced and never changed, so nothing is copied."""
        return replace(self, held=dict(self.held))

    def of(self, state: State) -> State:
        """The state with averages in place of what is averaged."""
        return {
            name: self.held[name].to(tensor.dtype) if name in self.held else tensor for name, tensor in state.items()
        }
