"""Does my training loop keep the ε that it claims? An attack on it says how large ε must at least be.

    python examples/audit_own_loop.py

Takes a few seconds. The loop is audited twice: as it should be, and with a quarter of the noise that was planned.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_dp import Ledger, LoRAConfig, PrivacyEngine, PrivateDataLoader, PrivateOptimizer, inject_lora
from lora_dp.auditing import GradientCanaries, audit
from lora_dp.losses import classification_loss
from lora_dp.privacy.accounting import PoissonGaussian

DELTA, NOISE, STEPS = 1e-5, 1.0, 4
images, labels = torch.randn(256, 64), torch.randint(0, 7, (256,))

Plant = Callable[[PrivateOptimizer, PrivateDataLoader], None]


def my_training(plant: Plant, noise_multiplier: float) -> None:
    """A training as one always does it, but for the line that plants the canaries."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 7))
    model = inject_lora(model, LoRAConfig(r=8, target_modules=["0"], trainable_modules=["2"]))
    model, optimizer, loader = PrivacyEngine().make_private(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01),
        data_loader=DataLoader(TensorDataset(images, labels), batch_size=128),
        noise_multiplier=noise_multiplier,
        max_grad_norm=1.0,
    )
    plant(optimizer, loader)
    model.train()
    for x, y in loader.take(STEPS):
        optimizer.backward(classification_loss(model(x), y))
        optimizer.step()


# What is claimed: the ε of the steps as they were planned.
planned = Ledger()
planned.append(PoissonGaussian(NOISE, sample_rate=128 / 256), STEPS)

canaries = GradientCanaries(count=1000)
for name, noise_multiplier in (("as planned", NOISE), ("a quarter of the noise", NOISE / 4)):
    result = audit(
        lambda plant, noise_multiplier=noise_multiplier: my_training(plant, noise_multiplier),
        canaries,
        delta=DELTA,
        claimed_epsilon=planned.epsilon,
        confidence=0.999,
        assume="independent",  # as the engine's noise and batches are; one run then says as much as a thousand
    )
    print(f"{name}: {result}")
