"""One client without noise or clipping is the centralised optimizer, written out here."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_dp.fed.data.examples import ImageExamples
from lora_dp.fed.methods import METHODS, factor, get_method
from lora_dp.fed.rounds.seeds import Stream, derived_seed
from lora_dp.nn.lora_linear import DPLoRALinear
from tests.fed.small import PLAIN, Adapted, federation_generators, make_examples, make_federation, tangent

PLANNED_ROUNDS = 4
MERGING = ("flora", "rac-lora", "galore")


def plain_step(model, optimizer, batch, trained: str, noise=lambda layer: 0.0) -> None:
    """``noise`` is on the adapted weights while the gradient is taken, and not in the step."""
    optimizer.zero_grad()
    adapted = [m for m in model.modules() if isinstance(m, DPLoRALinear)]
    kept = [layer.weight.data.clone() for layer in adapted]
    for layer in adapted:
        layer.weight.data.add_(noise(layer))
    F.cross_entropy(model(batch["pixel_values"]), batch["labels"]).backward()
    for layer, weight in zip(adapted, kept, strict=True):
        layer.weight.data.copy_(weight)
    for name, p in model.named_parameters():
        if factor(name) is not None and factor(name) not in trained:
            p.grad = None
    optimizer.step()


class BlockMeans:
    """AdamW with one second moment a tensor that outlives rounds, and steps along the last round's change."""

    def __init__(self, groups, memory, earlier, steps):
        self.groups, self.memory, self.step_number, self.earlier, self.steps = groups, memory, 0, earlier, steps
        for group in groups:
            for p in group["params"]:
                mine = memory.setdefault(p, {"v": 0.0, "change": torch.zeros_like(p)})
                mine.update(m=torch.zeros_like(p), start=p.detach().clone())

    def zero_grad(self):
        for p in self.memory:
            p.grad = None

    @torch.no_grad()
    def step(self):
        self.step_number += 1
        for group in self.groups:
            for p in group["params"]:
                mine = self.memory[p]
                mine["m"] = 0.9 * mine["m"] + 0.1 * p.grad
                mine["v"] = 0.999 * mine["v"] + 0.001 * p.grad.square().mean()
                m = mine["m"] / (1 - 0.9**self.step_number)
                v = mine["v"] / (1 - 0.999 ** (self.earlier + self.step_number))
                p.mul_(1 - 0.01 * group["lr"])
                # Beside a B of zero, A has no gradient, and no noise.
                p.sub_(group["lr"] * m / max(v, 1e-16) ** 0.5).add_(0.5 * mine["change"] / self.steps)

    @torch.no_grad()
    def finish(self):
        for p, mine in self.memory.items():
            mine["change"] = p - mine["start"]


def perturbation(method: str, place: tuple[int, int, int], step: int, steps: int):
    """Flat-LoRA's, arXiv 2409.14396: Gaussian, in each row in proportion to its norm, rising on half a cosine."""
    if not method.startswith("flat-lora"):
        return lambda layer: 0.0
    generator = torch.Generator().manual_seed(derived_seed(0, Stream.PERTURBATION, *place, step))
    strength = get_method(method).rho / 2 * (1 - math.cos(math.pi * (step + 1) / steps))

    def noise(layer):
        weight = adapted_weight(layer)
        rows = [row.square().sum().sqrt() / math.sqrt(len(row)) for row in weight]
        return strength * torch.stack(rows)[:, None] * torch.randn(weight.shape, generator=generator).double()

    return noise


def centralised(method: str, training, examples: ImageExamples, rounds: int) -> dict[str, Tensor]:
    """Plain full-batch torch; returns head and adapted weights W. Alternation goes on through the rounds."""
    model = Adapted(adapter=get_method(method).adapter)
    adapted = {name: m for name, m in model.named_modules() if isinstance(m, DPLoRALinear)}
    batch = examples.batch(range(len(examples)))
    made, base = get_method(method), method.removeprefix("flat-lora:")
    random, memory = federation_generators(rounds), {}
    for index in range(rounds):
        begin(base, adapted, index, random[index])
        for turn in range(made.turns):
            groups = [
                {"params": [p], "lr": training.learning_rate * (training.lr_ratio if factor(name) == "B" else 1)}
                for name, p in model.named_parameters()
                if p.requires_grad
            ]
            if base == "dp-fedadamw":
                optimizer = BlockMeans(groups, memory, index * training.local_steps, training.local_steps)
            else:
                optimizer = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[training.optimizer](groups)
            phases = made.phases(index, turn)
            cycle = ("AB",) if phases == "AB" else phases
            for step in range(index * training.local_steps, (index + 1) * training.local_steps):
                noise = perturbation(method, (0, index, turn), step, PLANNED_ROUNDS * training.local_steps)
                plain_step(model, optimizer, batch, cycle[step % len(cycle)], noise)
        finish(base, adapted, index)
        if base == "dp-fedadamw":
            optimizer.finish()
    head = {f"4.{n}": p.detach() for n, p in model[4].named_parameters()}
    return {**head, **{n: adapted_weight(m) for n, m in adapted.items()}}


def adapted_weight(layer: DPLoRALinear) -> Tensor:
    core = getattr(layer, "lora_R", torch.eye(layer.r).double())
    beside = tangent({f"x.{name}": p.detach() for name, p in layer.named_parameters()}, "x")
    return (layer.weight + layer.lora_B @ core @ layer.lora_A + beside).detach()


@torch.no_grad()
def begin(method: str, adapted, index: int, generator: torch.Generator) -> None:
    for layer in adapted.values():
        if method == "rac-lora" or method == "flora" and index:
            drawn = torch.rand(layer.lora_A.shape, generator=generator, dtype=torch.float64) * 2 - 1
            layer.lora_A.copy_(drawn / math.sqrt(layer.in_features))
            layer.lora_B.zero_()
        if method == "fedsvd" and index == 0:
            values, vectors = torch.linalg.eigh(layer.lora_A @ layer.lora_A.t())
            layer.lora_A.copy_(vectors / values.sqrt() @ vectors.t() @ layer.lora_A)
        if method == "galore" and index == 0:
            drawn = torch.randn(layer.lora_B.shape, generator=generator, dtype=torch.float64)
            layer.lora_B.copy_(torch.linalg.qr(drawn)[0])
            layer.lora_A.zero_()


@torch.no_grad()
def finish(method: str, adapted, index: int) -> None:
    for layer in adapted.values():
        if method in MERGING:
            layer.weight.add_(layer.lora_B @ layer.lora_A)
        if method in ("flora", "rac-lora"):
            layer.lora_B.zero_()
        if method == "galore" and index % 2 == 0:
            layer.lora_A.copy_(torch.linalg.qr(layer.lora_A.t())[0].t())
            layer.lora_B.zero_()
        elif method == "galore":
            layer.lora_B.copy_(torch.linalg.qr(layer.lora_B)[0])
            layer.lora_A.zero_()
        if method in ("flexlora", "fedsvd", "prism"):
            u, s, vh = torch.linalg.svd(adapted_weight(layer) - layer.weight)
            r = layer.r
            layer.lora_B.copy_(u[:, :r] * s[:r])
            layer.lora_A.copy_(vh[:r])
        if method == "fedask":
            u, s, vh = torch.linalg.svd(layer.lora_B @ layer.lora_A)
            layer.lora_B.copy_(u[:, : layer.r] * s[: layer.r].sqrt())
            layer.lora_A.copy_(s[: layer.r, None].sqrt() * vh[: layer.r])
        if method == "prism":
            layer.lora_dA.zero_()
            layer.lora_dB.zero_()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", [*METHODS, "flat-lora:flora", "flat-lora:deer", "flat-lora:lora-xs"])
def test_one_client_without_privacy_is_the_centralised_optimizer(method, optimizer):
    training = replace(PLAIN, optimizer=optimizer, learning_rate=0.05, lr_ratio=3.0)
    federation = make_federation(method, training, sizes=(12,), epsilon=None)
    assert federation.plan.rounds == PLANNED_ROUNDS
    for _ in range(3):
        federation.run_round([0])
    expected = centralised(method, training, make_examples(12, 0), rounds=3)
    federation.load_global_state()
    model = federation.model
    found = {f"4.{n}": p.detach() for n, p in model[4].named_parameters()}
    found |= {n: adapted_weight(m) for n, m in model.named_modules() if isinstance(m, DPLoRALinear)}
    start = Adapted()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-9, msg=name)
    assert not torch.allclose(expected["1"], start[1].weight, rtol=1e-3)
