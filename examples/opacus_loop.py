"""Handwritten digits under ε = 8 with Opacus: what opacus_loop_ported.py is written after."""

import torch
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
loader = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=256)
criterion = nn.CrossEntropyLoss()

engine = PrivacyEngine()
model, optimizer, loader = engine.make_private_with_epsilon(
    module=model,
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
