"""How clients train between two exchanges."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lora_dp.fed.methods import factor
from lora_dp.fed.models.options import Precision
from lora_dp.privacy.filtering import FilterName


@dataclass(frozen=True)
class LocalTraining:
    """How clients train: alike for all of them.

    Attributes:
        learning_rate: of A and the head; B's is this times `lr_ratio`.
    """

    optimizer: Literal["sgd", "adamw"]
    learning_rate: float
    lr_ratio: float
    low_pass: FilterName | None
    low_pass_strength: float
    batch_size: int
    local_steps: int
    precision: Precision = "float32"

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """A fresh optimizer over the model's trainable parameters, B's with its own learning rate."""
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in trainable if factor(name) != "B"], "lr": self.learning_rate},
            {"params": [p for name, p in trainable if factor(name) == "B"], "lr": self.learning_rate * self.lr_ratio},
        ]
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[self.optimizer]
        return kind(groups, lr=self.learning_rate)
