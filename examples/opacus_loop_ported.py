"""Handwritten digits under ε = 8, ported from opacus_loop.py."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_dp import BatchMemoryManager, LoRAConfig, PrivacyEngine, inject_lora

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
model = inject_lora(model, LoRAConfig(target_modules=[], trainable_modules=["0", "2"]))
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
loader = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=256)
criterion = nn.CrossEntropyLoss()

engine = PrivacyEngine()
model, optimizer, loader = engine.make_private_with_epsilon(
    model=model,
    optimizer=optimizer,
    data_loader=loader,
    target_epsilon=8,
    target_delta=1e-5,
    epochs=10,
    max_grad_norm=1.0,
)
for _ in range(10):
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=64, optimizer=optimizer) as parts:
        for x, y in parts:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
with torch.no_grad():
    accuracy = (model(images[1400:]).argmax(1) == labels[1400:]).float().mean()
print(f"σ = {optimizer.noise_multiplier:.2f}: accuracy {accuracy:.3f}, ε = {engine.get_epsilon(delta=1e-5):.2f}")
