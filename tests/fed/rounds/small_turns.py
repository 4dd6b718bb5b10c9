"""Small models of a client, and turns of theirs."""

from dataclasses import replace
from typing import Any

from torch import nn

from lora_dp.fed.methods import get_method
from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.local_training import LocalTraining
from lora_dp.fed.rounds.messages import Workspace
from tests.fed.small import TRAINING, plan_for

ONE_STEP = replace(TRAINING, local_steps=1)
COUNT = 12


def trainer_of(
    model: nn.Module,
    training: LocalTraining = ONE_STEP,
    method: str = "dp-lora",
    *,
    reproducible: bool = True,
    **privacy: Any,
) -> Trainer:
    made = get_method(method)
    return Trainer(Workspace(model), made, training, plan_for(made, training, **privacy), 0, reproducible)
