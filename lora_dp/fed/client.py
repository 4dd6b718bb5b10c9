"""One client: its examples, its privacy account, and its part of a round on the model that all clients share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lora_dp.accounting import Ledger, PoissonGaussian, PrivacyBudgetExceeded, calibrate_noise_multiplier
from lora_dp.adapters import adapter_state, load_adapter_state
from lora_dp.clipping import ClippingName
from lora_dp.engine import PrivacyEngine
from lora_dp.fed.config import RunConfig
from lora_dp.fed.examples import Examples
from lora_dp.fed.methods import Method, State, factor
from lora_dp.fed.models import Precision, logits
from lora_dp.filtering import FilterName, make_filter


@dataclass(frozen=True)
class LocalTraining:
    """How clients train: alike for all of them.

    Attributes:
        learning_rate: of A and the head; B's is this times `lr_ratio`.
        epsilon: each client's budget for `participations` rounds of `local_steps`, or None without privacy.
    """

    optimizer: Literal["sgd", "adamw"]
    learning_rate: float
    lr_ratio: float
    low_pass: FilterName | None
    low_pass_strength: float
    batch_size: int
    local_steps: int
    participations: int
    epsilon: float | None
    delta: float
    max_grad_norm: float
    clipping: ClippingName
    accountant: Literal["pld", "rdp"]
    precision: Precision = "float32"

    @classmethod
    def from_config(cls, config: RunConfig) -> "LocalTraining":
        chosen, federation, privacy = config.optimization, config.federation, config.privacy
        assert chosen.lr is not None and chosen.lr_ratio is not None
        assert chosen.low_pass is not None and chosen.low_pass_strength is not None
        return cls(
            chosen.optimizer, chosen.lr, chosen.lr_ratio,
            None if chosen.low_pass == "none" else chosen.low_pass, chosen.low_pass_strength,
            federation.batch_size, federation.local_steps, federation.participations,
            privacy.target, privacy.delta, privacy.max_grad_norm, privacy.clipping, privacy.accountant,
            config.model.precision,
        )

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """A fresh optimizer over the model's trainable parameters, B's with its own learning rate."""
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in trainable if factor(name) != "B"], "lr": self.learning_rate},
            {"params": [p for name, p in trainable if factor(name) == "B"], "lr": self.learning_rate * self.lr_ratio},
        ]
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[self.optimizer]
        return kind(groups, lr=self.learning_rate)


class Client:
    """A client. Between rounds it holds its examples' indices and its ledger: no model, no optimizer.

    Guarantee: every update that leaves is the result of noised steps only, so that all of them together are (ε, δ)
    differentially private under adding or removing one of this client's examples (design: local, example-level).
    Taken to be public: the number of its examples, which rounds it takes part in, and all settings.

    Args:
        index: number of the client, from 0.
        examples: its private data, at least one.
        training: settings.
        reproducible_seed: None for secret sampling and noise.
    """

    def __init__(
        self, index: int, examples: Examples, training: LocalTraining, reproducible_seed: int | None = None
    ) -> None:
        self.index, self.examples, self.training = index, examples, training
        self.batch_size = min(training.batch_size, len(examples))
        self._engine = PrivacyEngine(training.accountant, reproducible_seed=reproducible_seed)
        noise = 0.0
        if training.epsilon is not None:
            noise = calibrate_noise_multiplier(
                training.epsilon, training.delta, self.batch_size / len(examples), self.planned_steps,
                training.accountant,
            )
        self.event = PoissonGaussian(noise, self.batch_size / len(examples))

    @property
    def ledger(self) -> Ledger:
        """Every step so far."""
        return self._engine.ledger

    @property
    def planned_steps(self) -> int:
        """Steps that the noise is calibrated for."""
        return self.training.participations * self.training.local_steps

    @property
    def can_take_part(self) -> bool:
        """Whether the budget has room for another round; a function of public quantities only."""
        return self.training.epsilon is None or self.ledger.steps + self.training.local_steps <= self.planned_steps

    def train(
        self, model: nn.Module, state: State, method: Method, round_index: int,
        on_step: Callable[[], None] = lambda: None,
    ) -> State:
        """Takes its local steps from the global state and returns the tensors that the round trains.

        Args:
            model: the shared model; left with this client's parameters.
            state: the global adapter state.
            on_step: called after each batch.

        Raises:
            PrivacyBudgetExceeded: the round would overrun the budget; nothing was trained.
        """
        if not self.can_take_part:
            raise PrivacyBudgetExceeded(
                f"Client {self.index} has spent its budget for {self.planned_steps} steps: it takes part in no more "
                "rounds."
            )
        load_adapter_state(model, state)
        model.train()
        training, device = self.training, next(model.parameters()).device
        private = training.epsilon is not None
        loader = DataLoader(self.examples, batch_size=self.batch_size, collate_fn=self.examples.collate)
        model, optimizer, batches = self._engine.make_private(
            model=model,
            optimizer=training.make_optimizer(model),
            data_loader=loader,
            noise_multiplier=self.event.noise_multiplier,
            max_grad_norm=training.max_grad_norm if private else float("inf"),
            clipping=training.clipping if private else "flat",
            phases=method.phases(round_index),
            low_pass=make_filter(training.low_pass, training.low_pass_strength),
        )
        # A cycle of phases goes on through the rounds: with an odd number of local steps too, each factor has its turn.
        optimizer.steps_taken = round_index * training.local_steps
        optimizer.activate()
        for batch in batches.take(training.local_steps):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            F.cross_entropy(logits(model, batch, training.precision), batch["labels"]).backward()
            optimizer.step()
            optimizer.zero_grad()
            on_step()
        return {
            name: tensor.detach().clone()
            for name, tensor in adapter_state(model).items()
            if method.trains(name, round_index)
        }
