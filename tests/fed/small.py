"""A small federation with real private training, in float64, for the tests of methods and privacy units."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_dp.fed.data.examples import ImageExamples
from lora_dp.fed.methods import Method, factor, get_method
from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.local_engine import LocalEngine
from lora_dp.fed.rounds.local_training import LocalTraining
from lora_dp.fed.rounds.messages import Task, Workspace
from lora_dp.fed.rounds.privacy_plan import PrivacyPlan
from lora_dp.fed.rounds.seeds import Stream, derived_seed
from lora_dp.nn.layers import DPLinear
from lora_dp.nn.lora_linear import DPLoRALinear
from lora_dp.nn.lora_tangent_linear import DPLoRATangentLinear
from lora_dp.nn.lora_xs_linear import DPLoRAXSLinear

TRAINING = LocalTraining(
    optimizer="sgd", learning_rate=0.3, lr_ratio=1.0, low_pass=None, low_pass_strength=0.0, batch_size=8, local_steps=3
)
PLAIN = replace(TRAINING, batch_size=1000)


def plan_for(method: Method, training: LocalTraining, **changes: Any) -> PrivacyPlan:
    """ε = 8 for examples unless said otherwise."""
    settings: dict[str, Any] = {
        "epsilon": 8.0,
        "delta": 1e-5,
        "accountant": "rdp",
        "unit": "example",
        "noise_by": "server",
        "max_grad_norm": 1.0,
        "max_update_norm": 1.0,
        "clipping": "flat",
        "batch_size": training.batch_size,
        "steps": training.local_steps,
        "turns": method.turns,
        "rounds": 4,
        "participations": 4,
        "client_rate": 1.0,
        "clients": 3,
        "mechanism": "sound",
        "examples": 41,
    }
    return PrivacyPlan(**{**settings, **changes})


class Adapted(nn.Sequential):
    """Two adapted layers and a trained head."""

    def __init__(self, r: int = 2, alpha: float | None = None, adapter: str = "lora") -> None:
        torch.manual_seed(0)
        head = DPLinear.from_linear(nn.Linear(6, 3))
        layer = {"lora": DPLoRALinear, "xs": DPLoRAXSLinear, "tangent": DPLoRATangentLinear}[adapter]
        super().__init__(nn.Flatten(), layer(12, 6, r=r, alpha=alpha), nn.Tanh(), layer(6, 6, r=r, alpha=alpha), head)
        self.double()


class Doubles(ImageExamples):
    """Images as float64."""

    def _inputs(self, rows: Tensor) -> dict[str, Tensor]:
        return {name: tensor.double() for name, tensor in super()._inputs(rows).items()}


def make_examples(count: int, seed: int) -> ImageExamples:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, 3, 4), dtype=torch.uint8, generator=generator)
    return Doubles(pixels, torch.randint(0, 3, (count,), generator=generator), (0.5,), (0.5,))


def make_federation(
    method: str,
    training: LocalTraining = TRAINING,
    sizes: Sequence[int] = (12, 20, 9),
    *,
    r: int = 2,
    alpha: float | None = None,
    ranks: Sequence[int] | None = None,
    options: dict[str, Any] | None = None,
    weighting: str = "examples",
    reproducible: bool = True,
    seed: int = 0,
    **privacy: Any,
) -> Federation:
    made = get_method(method, options)
    workspace = Workspace(Adapted(r, alpha, made.adapter))
    if alpha is not None:
        from lora_dp.fed.methods import Layers

        workspace.layers = Layers(workspace.layers.shapes, r, alpha)
    privacy = {"clients": len(sizes), "examples": sum(sizes), **privacy}
    trainer = Trainer(workspace, made, training, plan_for(made, training, **privacy), seed, reproducible)
    parts = [make_examples(size, number) for number, size in enumerate(sizes)]
    return Federation(
        trainer, LocalEngine(trainer, parts), sizes, make_examples(5, 99), ranks=ranks, weighting=weighting
    )


def updates(federation: Federation, turn: int = 0) -> list[dict[str, Tensor]]:
    """What each client would send now, seen from outside; the state that it starts from is ``federation.server``'s."""
    index = federation.rounds_done
    engine = federation.engine
    assert isinstance(engine, LocalEngine)
    found = []
    for client, rank in enumerate(federation.ranks):
        state = federation.method.for_client(federation.server.state, federation.server.layers, rank)
        update = federation.trainer.train(client, engine.parts[client], Task(index, turn, rank, state))
        found.append(update.tensors)
    return found


def products(state: dict[str, Tensor], scaling: float = 1.0) -> dict[str, Tensor]:
    """s·B·A plus what was merged, and what the tangent's coordinates add, by layer."""
    layers = {name.rpartition(".")[0] for name in state if factor(name)}
    return {
        layer: scaling
        * state[f"{layer}.lora_B"]
        @ state.get(f"{layer}.lora_R", eye(state, layer))
        @ state[f"{layer}.lora_A"]
        + scaling * tangent(state, layer)
        + state.get(f"{layer}.merged", 0)
        for layer in layers
    }


def tangent(state: dict[str, Tensor], layer: str) -> Tensor | float:
    """dB·A + U·dA·(I − AᵀA), where the adapter has such coordinates."""
    if f"{layer}.lora_dA" not in state:
        return 0.0
    a, b, da, db = (state[f"{layer}.lora_{name}"] for name in ("A", "B", "dA", "dB"))
    lengths = b.norm(dim=0)
    return db @ a + b / torch.where(lengths > 0, lengths, 1) @ (da - da @ a.t() @ a)


def eye(state: dict[str, Tensor], layer: str) -> Tensor:
    """What stands between the factors of an adapter that has no core."""
    return torch.eye(len(state[f"{layer}.lora_A"]), dtype=torch.float64)


def federation_generators(rounds: int) -> list[torch.Generator]:
    """The public generator of each round, as the server makes it."""
    return [torch.Generator().manual_seed(derived_seed(0, Stream.BEGIN, index)) for index in range(rounds)]
