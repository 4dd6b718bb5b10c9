"""Federations whose model has a feature head, and what their clients' sums are without noise."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_dp.fed.methods import factor
from lora_dp.fed.rounds import head_start
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.local_engine import LocalEngine
from lora_dp.fed.rounds.messages import Reply, Update
from lora_dp.nn.feature_head import FeatureHead
from lora_dp.nn.feature_sums import FeatureMoments, SumWeights, unit_length
from lora_dp.nn.lora_linear import DPLoRALinear
from tests.fed.rounds.told_clients import begun
from tests.fed.small import TRAINING, make_examples

SIZES = (12, 20, 9)
SHARE = 0.25
EXAMPLE = {"sums_share": SHARE}
CLIENT = {"unit": "client", "noise_by": "client", "delta": 0.01, "sums_share": SHARE}
SERVER = {**CLIENT, "noise_by": "server"}
NONE = {"epsilon": None, "sums_share": SHARE}
WAYS = {"example": EXAMPLE, "client": CLIENT, "server": SERVER}
WEIGHTS = SumWeights()


class Featured(nn.Sequential):
    """An adapted layer, dropout, and a feature head, in float64."""

    def __init__(self, width: int = 8, dropout: float = 0.5) -> None:
        torch.manual_seed(0)
        layer, head = DPLoRALinear(12, width, r=2), FeatureHead(width, 3)
        super().__init__(nn.Flatten(), layer, nn.Tanh(), nn.Dropout(dropout), head)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("4.") or factor(name) is not None)
        self.double()


def summed(
    way: dict[str, Any],
    *,
    width: int = 8,
    sizes: Sequence[int] = SIZES,
    training: dict[str, Any] | None = None,
    parts: Sequence[Any] = (),
    **settings: Any,
) -> Federation:
    """A federation of real clients that are to release their sums."""
    # All examples in each step: clients of all sizes share one calibration.
    made = replace(TRAINING, **{"batch_size": 1000, **(training or {})})
    federation = begun("dp-lora", sizes, privacy=way, training=made, model=Featured(width), **settings)
    own = [make_examples(size, number) for number, size in enumerate(sizes)]
    federation.engine = LocalEngine(federation.trainer, [*parts, *own[len(parts) :]])
    return federation


def features(federation: Federation, client: int) -> tuple[Tensor, Tensor]:
    """A client's features of unit length, and its labels."""
    engine, model = federation.engine, federation.model
    assert isinstance(engine, LocalEngine)
    batch = engine.parts[client].batch(range(len(engine.parts[client])))
    federation.load_global_state()
    with torch.no_grad():
        inside = batch["pixel_values"]
        for layer in list(model.eval())[:-1]:
            inside = layer(inside)
        return unit_length(inside), batch["labels"]


def pooled(federation: Federation, weights: Sequence[float]) -> FeatureMoments:
    """The exact moments of all clients' features, each client's mean with its weight."""
    total = sum(weights)
    parts: list[tuple[Tensor, ...]] = []
    for client, weight in enumerate(weights):
        units, labels = features(federation, client)
        one_hot = torch.nn.functional.one_hot(labels, 3).double()
        means = (one_hot.T @ units, one_hot.sum(0), units.sum(0), units.square().sum(0))
        parts.append(tuple(mean * weight / total / len(labels) for mean in means))
    by_class, shares, first, second = (sum(part) for part in zip(*parts, strict=True))
    return FeatureMoments(by_class, shares, first, second, 0.0, WEIGHTS)  # type: ignore[arg-type]


@contextmanager
def watched() -> Iterator[list[FeatureMoments]]:
    """The moments from which heads are started inside."""
    found: list[FeatureMoments] = []
    plain = head_start.started_head

    def noted(head: FeatureHead, released: FeatureMoments, **options: Any) -> dict[str, Tensor]:
        found.append(released)
        return plain(head, released, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_start, "started_head", noted)
        yield found


def released(federation: Federation) -> FeatureMoments:
    """The moments from which the head is started."""
    with watched() as found:
        head_start.start_head(federation)
    [moments] = found
    return moments


def scores(found: FeatureMoments, exact: FeatureMoments) -> dict[str, Tensor]:
    """The noise in each part, in units of what is told: of deviation 1 where that is right."""
    by_part = {}
    for name, weight in {"class_sums": 1.0, "shares": WEIGHTS.counts, "first": 1.0, "second": 1.0}.items():
        difference = getattr(found, name) - getattr(exact, name)
        by_part[name] = difference.flatten() * weight / found.noise
    return by_part


def numbers(width: int = 8) -> dict[str, tuple[int, ...]]:
    """Shapes of what a client sends."""
    return {"by_class.weight": (3, width + 1), "over_all.weight": (1, 2 * width)}


def sent(client: int, value: float = 0.0, **changes: Any) -> Reply:
    """An answer that holds ``value`` everywhere, but for what is changed; None leaves a tensor out."""
    tensors = {name: torch.full(shape, value, dtype=torch.float64) for name, shape in numbers().items()}
    tensors = {**tensors, **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    return Reply(client, Update({name: tensor for name, tensor in tensors.items() if tensor is not None}))
