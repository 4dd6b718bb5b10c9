"""The federation in one process: one model in memory, on which the clients take their turns."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lora_dp.accounting import Ledger, PrivacyBudgetExceeded
from lora_dp.adapters import adapter_state, load_adapter_state
from lora_dp.fed.client import Client, LocalTraining
from lora_dp.fed.config import RunConfig
from lora_dp.fed.data import encode, open_data
from lora_dp.fed.examples import Examples
from lora_dp.fed.methods import Method, get_method
from lora_dp.fed.models import Precision, load_model, logits
from lora_dp.fed.partition import partition
from lora_dp.fed.server import Server, draw_clients, nbytes

EVALUATION_BATCH = 256
# Streams of the seed that must not coincide.
_DRAWS, _CLIENTS = 1, 2


@dataclass(frozen=True)
class RoundResult:
    """What is known after a round. All of it is public: the loss is that of the validation data, which are taken to be
    public; losses and norms on private examples are never computed for show.

    Attributes:
        round: from 1; 0 is the start.
        phases: factors that the round trained.
        participants: clients that took part.
        loss, accuracy: of the global model on the validation data; None in a round that is not evaluated.
        epsilon: worst ε of all clients so far; inf without privacy.
        bytes_up, bytes_down: tensors sent to and by the server in this round.
        seconds: duration.
    """

    round: int
    phases: str
    participants: list[int]
    loss: float | None
    accuracy: float | None
    epsilon: float
    bytes_up: int
    bytes_down: int
    seconds: float


class Federation:
    """Method, clients, server and the one model that they share.

    Args:
        model: with adapters in place, on its device.
        parts: each client's private examples.
        validation: public examples to evaluate on.
        method: what clients train and how the server combines.
        training: settings of the clients.
        rounds: planned.
        clients_per_round: None for all.
        weighting: "examples" (public numbers) or "equal".
        seed: of the draws of clients.
        reproducible: sampling and noise follow the seed too.
    """

    def __init__(
        self, model: nn.Module, parts: Sequence[Examples], validation: Examples, method: Method,
        training: LocalTraining, *, clients_per_round: int | None = None, weighting: str = "examples",
        seed: int = 0, reproducible: bool = False,
    ) -> None:
        self.model, self.validation, self.method, self.training = model, validation, method, training
        self.device = next(model.parameters()).device
        self.weighting = weighting
        self.clients = [
            Client(index, part, training, _client_seed(seed, index) if reproducible else None)
            for index, part in enumerate(parts)
        ]
        self.server = Server(adapter_state(model))
        self.rounds_done = 0
        self._per_round = clients_per_round or len(self.clients)
        self._draws = np.random.default_rng([seed, _DRAWS])
        # Version of the global state that each client holds.
        self._seen = [-1] * len(self.clients)

    @classmethod
    def from_config(cls, config: RunConfig) -> "Federation":
        """Opens data and model and splits the examples over the clients.

        Raises:
            ValueError: data, model and settings that do not go together, in one sentence.
        """
        device = _device(config.run.device)
        seed = config.run.seed
        # Dropout and the like; what privacy rests on comes from the engines' own sources.
        torch.manual_seed(seed)
        raw = open_data(config.data)
        loaded = load_model(config.model, raw.num_labels, raw.kind, seed=seed)
        splits = encode(raw, loaded.spec)
        chosen = config.federation
        parts = partition(
            splits.train.labels.numpy(), chosen.clients, chosen.partition, alpha=chosen.dirichlet_alpha, seed=seed
        )
        return cls(
            loaded.model.to(device), [splits.train.subset(part) for part in parts], splits.validation,
            get_method(chosen.method), LocalTraining.from_config(config), clients_per_round=chosen.clients_per_round,
            weighting=chosen.weighting, seed=seed, reproducible=config.run.reproducible,
        )

    def draw(self) -> list[int]:
        """The clients of the next round, among those whose budget has room for it; empty when none has."""
        eligible = [client.index for client in self.clients if client.can_take_part]
        return draw_clients(eligible, self._per_round, self._draws)

    def run_round(
        self, participants: Sequence[int], on_step: Callable[[], None] = lambda: None, *, evaluate: bool = True
    ) -> RoundResult:
        """Local training of each participant in turn, and the server's combination.

        Updates are combined as they come, so that memory does not grow with the number of clients.

        Raises:
            PrivacyBudgetExceeded: no participant had budget left.
        """
        start = time.perf_counter()
        index, server = self.rounds_done, self.server
        aggregation = self.method.aggregation(index)
        trained: list[int] = []
        up = down = 0
        for number in participants:
            client = self.clients[number]
            try:
                update = client.train(self.model, server.state, self.method, index, on_step)
            except PrivacyBudgetExceeded:
                continue
            down += nbytes(server.news(self._seen[number]))
            up += nbytes(update)
            self._seen[number] = server.version
            aggregation.add(update, self._weight(client))
            trained.append(number)
        if not trained:
            raise PrivacyBudgetExceeded("No client has budget left for a round: the run ends here.")
        server.apply(aggregation.result())
        self.rounds_done += 1
        loss, accuracy = self.evaluate() if evaluate else (None, None)
        return RoundResult(
            self.rounds_done, self.method.phases(index), trained, loss, accuracy, self.worst_epsilon(), up, down,
            time.perf_counter() - start,
        )

    def evaluate(self) -> tuple[float, float]:
        """Mean cross-entropy (nats) and accuracy (0 … 1) of the global model on the validation data."""
        self.load_global_state()
        return evaluate(self.model, self.validation, self.device, self.training.precision)

    def load_global_state(self) -> None:
        """Puts the global adapter and head into the model."""
        load_adapter_state(self.model, self.server.state)

    def start(self) -> RoundResult:
        """The global model before the first round, as round 0."""
        begin = time.perf_counter()
        loss, accuracy = self.evaluate()
        return RoundResult(0, "", [], loss, accuracy, self.worst_epsilon(), 0, 0, time.perf_counter() - begin)

    def worst_epsilon(self, pending: Sequence[int] = ()) -> float:
        """Largest ε of all clients; `pending` ones count with the round that they are about to take part in."""
        return max(self._epsilon(self._ledger_with(client, client.index in pending)) for client in self.clients)

    def account(self, pending: Sequence[int] = ()) -> dict[str, Any]:
        """Every client's ledger and ε, ready for JSON (an infinite ε is null). `pending` as above: to be written
        before the round begins, so that a crash can over-count but never under-count."""
        clients = []
        for client in self.clients:
            ledger = self._ledger_with(client, client.index in pending)
            clients.append({
                "client": client.index, "examples": len(client.examples), "steps": ledger.steps,
                "epsilon": finite(self._epsilon(ledger)), "ledger": ledger.state_dict(),
            })
        return {
            "unit": "one example of one client, added or removed",
            "delta": self.training.delta,
            "accountant": self.training.accountant,
            "target_epsilon": self.training.epsilon,
            "worst_epsilon": finite(self.worst_epsilon(pending)),
            "clients": clients,
        }

    def _ledger_with(self, client: Client, pending: bool) -> Ledger:
        ledger = Ledger()
        for event, count in client.ledger.entries:
            ledger.append(event, count)
        if pending:
            ledger.append(client.event, self.training.local_steps)
        return ledger

    def _epsilon(self, ledger: Ledger) -> float:
        return ledger.epsilon(self.training.delta, self.training.accountant)

    def _weight(self, client: Client) -> float:
        return float(len(client.examples)) if self.weighting == "examples" else 1.0


def evaluate(
    model: nn.Module, examples: Examples, device: torch.device, precision: Precision = "float32"
) -> tuple[float, float]:
    """Mean cross-entropy (nats) and accuracy (0 … 1) of a model."""
    model.eval()
    total, correct = 0.0, 0
    with torch.no_grad():
        for batch in examples.batches(EVALUATION_BATCH):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            scores = logits(model, batch, precision)
            total += F.cross_entropy(scores, batch["labels"], reduction="sum").item()
            correct += int((scores.argmax(1) == batch["labels"]).sum())
    return total / len(examples), correct / len(examples)


def finite(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


def _client_seed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, _CLIENTS, index]).generate_state(1, np.uint64)[0] >> 1)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"There is no device {name!r} here: choose auto or cpu.") from error
    return device
