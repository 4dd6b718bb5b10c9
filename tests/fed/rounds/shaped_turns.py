"""Turns of a client, and what they add to the sum."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_dp.engine.optimizer import PrivateOptimizer, total
from lora_dp.engine.recorder import recorder_of
from lora_dp.fed.data.examples import TextExamples
from lora_dp.fed.methods import State, factor
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.messages import Task, Workspace
from lora_dp.nn.layers import DPLinear
from lora_dp.nn.lora_linear import DPLoRALinear
from lora_dp.privacy.sampling import PoissonSampler
from tests.fed.rounds.failing_models import ONE_STEP
from tests.fed.small import make_federation


def on_outputs(model: nn.Module, seen: list[int]) -> None:
    """Notes how many rows each pass gives that is no trial of isolation."""
    model.register_forward_hook(lambda module, given, output: seen.append(len(output)) if not tried(module) else None)


def tried(model: nn.Module) -> bool:
    recorder = recorder_of(model)
    return recorder is not None and recorder.tried


def sum_of(federation: Federation, state: State, rows: Sequence[int], examples: Any = None) -> dict[str, Tensor]:
    """What one step on these examples of client 0 releases, but for the noise."""
    sums: dict[str, Tensor] = {}
    names = {id(p): name for name, p in federation.model.named_parameters()}

    def released(self: PrivateOptimizer) -> None:
        sums.update({names[key]: total(part).double() for key, part in self.batch.collect().items()})

    examples = examples if examples is not None else federation.engine.parts[0]  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PoissonSampler, "draw", lambda self: list(rows))
        patch.setattr(PrivateOptimizer, "_release", released)
        patch.setattr("lora_dp.fed.rounds.client.Trainer._check_ledger", lambda *_: None)
        federation.trainer.train(0, examples, Task(0, 0, federation.workspace.layers.r, state))
    return sums


def apart(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys() and left
    return sum(float((left[name] - right[name]).square().sum()) for name in left) ** 0.5


class Reader(nn.Module):
    """Looks at padding: its mean is over all places, whatever the mask says. Without padding it takes another path."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(50, 16)
        self.layer = DPLoRALinear(16, 16, r=2)
        self.head = DPLinear.from_linear(nn.Linear(16, 3))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("head") or factor(name) is not None)

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        path = 1.0 if bool(attention_mask.all()) else 1.01
        hidden = self.layer(path * self.words(input_ids) * (1 + attention_mask.unsqueeze(-1)))
        return self.head(torch.tanh(hidden.mean(1)))


def texts(lengths: Sequence[int]) -> TextExamples:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (len(lengths), 40), generator=generator, dtype=torch.int32)
    ids[torch.arange(40) >= torch.tensor(lengths).view(-1, 1)] = 0
    return TextExamples(ids, torch.tensor(lengths), torch.arange(len(lengths)) % 3, 0)


def reading() -> Federation:
    federation = make_federation("dp-lora", ONE_STEP)
    workspace = Workspace(Reader())
    federation.trainer = replace(federation.trainer, workspace=workspace)
    federation.workspace, federation.model = workspace, workspace.model
    return federation
