"""DP-FedAdamW: AdamW at the clients, with moments and a direction that they share (arXiv 2602.19945)."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, ClassVar

from lora_dp.fed.methods.base import Contribution, Layers, LocalTurn, Method, Phases, State
from lora_dp.fed.methods.low_rank import dense

if TYPE_CHECKING:
    from torch.optim import Optimizer

# What travels beside a parameter: its name with this at the end.
SECOND, DIRECTION = ".second", ".direction"


@dataclass(frozen=True)
class DPFedAdamW(Method):
    """A and B by AdamW with one second moment a tensor, averaged over the clients; the server averages A and B.

    The second moment has the noise's known variance taken out (:mod:`lora_dp.optim.block_adam`), and is a function of
    noised gradients alone. Each local step goes besides by ``pull``/K of the global state's last change, K the local
    steps of a round. So local steps keep to the global direction. Both cost no privacy.

    Where whole clients are protected, their gradients carry no noise: nothing is said of their moments, and these start
    anew in each round.

    Args:
        pull: γ, the share of the last change that a round goes on.
    """

    pull: float = 0.5

    name: ClassVar[str] = "dp-fedadamw"
    learning_rates: ClassVar = {1: 0.0005, 3: 0.0005, 8: 0.0005, inf: 0.003}
    own_optimizer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.pull < 1:
            raise ValueError(f"dp-fedadamw's pull must be in [0, 1), not {self.pull}: 0.5 is usual.")

    def phases(self, round_index: int, turn: int = 0) -> Phases:
        return "AB"

    def trains(self, parameter: str, round_index: int, turn: int = 0) -> bool:
        return not parameter.endswith(DIRECTION) and super().trains(parameter, round_index, turn)

    def beside(self, state: State, whole_clients: bool) -> State:
        trained = {name: tensor for name, tensor in state.items() if self.trains(name, 0)}
        kept = {name + DIRECTION: tensor.new_zeros(tensor.shape) for name, tensor in trained.items()}
        if not whole_clients:
            kept |= {name + SECOND: tensor.new_zeros(1) for name, tensor in trained.items()}
        return kept

    def optimizer(self, turn: LocalTurn) -> Optimizer:
        from lora_dp.optim.block_adam import BlockAdamW  # and torch with it

        made = BlockAdamW(turn.groups)
        for name, parameter in turn.tensors.items():
            if (direction := turn.tensors.get(name + DIRECTION)) is not None:
                second = turn.tensors.get(name + SECOND)
                earlier = 0 if second is None else turn.first
                made.go_on(
                    parameter,
                    parameter.new_zeros(1) if second is None else second,
                    earlier,
                    direction * (self.pull / turn.steps),
                )
        return made

    def combine(
        self, mean: Contribution, state: State, layers: Layers, round_index: int, turn: int = 0
    ) -> Contribution:
        moved = {
            name + DIRECTION: dense(value) - state[name] for name, value in mean.items() if name + DIRECTION in state
        }
        return {**mean, **moved}
