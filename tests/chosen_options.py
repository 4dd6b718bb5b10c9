"""A private run, made with options of a test's choice."""

from typing import Any

import torch

from tests.models import loader_of, mlp, seeded


def make(**options: Any) -> Any:
    model = mlp()
    chosen = {
        "model": model,
        "optimizer": torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        "data_loader": loader_of(20, 4),
        "max_grad_norm": 1.0,
        **options,
    }
    if "target_epsilon" in options:
        return seeded().make_private_with_epsilon(**chosen)
    return seeded().make_private(**{"noise_multiplier": 1.0, **chosen})
