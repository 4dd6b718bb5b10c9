"""Lower bounds on the engine's ε beside what it claims, and on the engine with half of its noise.

Its figures are in docs/how-to/auditing.md.

    python -m benchmarks.audit_engine

A minute of one core.
"""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from jsonargparse import auto_cli
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_dp import LoRAConfig, PrivacyEngine, inject_lora
from lora_dp.auditing import AuditResult, GradientCanaries, audit, plot_audits
from lora_dp.privacy.accounting import calibrate_noise_multiplier
from lora_dp.privacy.mechanism import Mechanism

EPSILONS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
DELTA, CANARIES, EXAMPLES = 1e-5, 1400, 64
# Of 21 sound audits one would be called violated at 0.95.
CONFIDENCE = 0.99
# Series of the picture: its name, what is assumed, and whether half of the noise is left out.
SERIES: tuple[tuple[str, Any, bool], ...] = (
    ("nothing assumed", "nothing", False),
    ("Gaussian trade-off", "gaussian", False),
    ("independent canaries, Gaussian", "independent gaussian", False),
    ("the same, half the noise left out", "independent gaussian", True),
)


def training(noise_multiplier: float) -> Callable[[Any], None]:
    """One step on a full batch, of 1,479 trainable numbers."""

    def train_fn(plant: Any) -> None:
        model: nn.Module = inject_lora(
            nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 7)),
            LoRAConfig(r=8, alpha=8, target_modules=["0"], trainable_modules=["2"]),
        )
        data = TensorDataset(torch.randn(EXAMPLES, 64), torch.randint(0, 7, (EXAMPLES,)))
        model, optimizer, loader = PrivacyEngine(accountant="pld").make_private(
            model=model,
            optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01),
            data_loader=DataLoader(data, batch_size=EXAMPLES),
            noise_multiplier=noise_multiplier,
            max_grad_norm=1.0,
        )
        plant(optimizer, loader)
        model.train()
        for inputs, labels in loader.take(1):
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()

    return train_fn


def main(output: Path = Path("benchmarks/results/audit-engine")) -> None:
    """Audits, and draws.

    Args:
        output: folder for results.json and audit.png.
    """
    output.mkdir(parents=True, exist_ok=True)
    whole, found = Mechanism.noise_std, dict[str, list[AuditResult]]()
    for name, assume, halved in SERIES:
        fault: Any = (
            mock.patch.object(Mechanism, "noise_std", lambda self, size: whole(self, size) / 2)
            if halved
            else nullcontext()
        )
        with fault:
            found[name] = [
                audit(
                    training(calibrate_noise_multiplier(epsilon, DELTA, 1.0, 1)),
                    GradientCanaries(CANARIES),
                    delta=DELTA,
                    confidence=CONFIDENCE,
                    assume=assume,
                )
                for epsilon in EPSILONS
            ]
        print(name, *found[name], sep="\n", flush=True)
    results = {name: [asdict(result) for result in series] for name, series in found.items()}
    (output / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    plot_audits({name: list(series) for name, series in found.items()}, output / "audit.png")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
