"""A federation as a checkpoint holds it: tensors, and plain numbers."""

from typing import Any

import numpy as np
import torch

from lora_dp.fed.rounds.federation import Federation


def checkpoint(federation: Federation) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What a resumed run needs: tensors, and plain numbers. Sources of randomness are made anew for each round."""
    state, average, optimizer = federation.server.state, federation.average, federation.optimizer
    held = {f"average:{name}": tensor for name, tensor in average.held.items()}
    return {**state, **optimizer.tensors(), **held}, {
        "optimizer": optimizer.steps,
        "averaged": average.count,
        "round": federation.rounds_done,
        "run": None if federation.log is None else federation.log.run,
        "server": federation.server.bookkeeping(),
        "seen": federation.seen.tolist(),
    }


def restore(federation: Federation, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
    """Puts what :func:`checkpoint` returned into a federation of the same configuration.

    Raises:
        ValueError: it belongs to another model.
    """
    beside = {key: tensor.to(federation.device) for key, tensor in tensors.items() if ":" in key}
    federation.server.restore({k: t for k, t in tensors.items() if k not in beside}, numbers["server"])
    average, held = federation.average, "average:"
    moments = {key: tensor for key, tensor in beside.items() if not key.startswith(held)}
    federation.optimizer.restore(moments, numbers.get("optimizer", {}))
    average.held = {key.removeprefix(held): tensor for key, tensor in beside.items() if key.startswith(held)}
    average.count = numbers.get("averaged", 0)
    federation.rounds_done = numbers["round"]
    federation.seen = np.asarray(numbers["seen"], dtype=np.int64)
