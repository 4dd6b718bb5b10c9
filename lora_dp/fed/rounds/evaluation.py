"""Loss and accuracy of a model on examples that are taken to be public."""

import torch
import torch.nn.functional as F
from torch import nn

from lora_dp.fed.data.examples import Examples
from lora_dp.fed.models.loading import logits
from lora_dp.fed.models.options import Precision

EVALUATION_BATCH = 256


def evaluate(
    model: nn.Module, examples: Examples, device: torch.device, precision: Precision = "float32"
) -> tuple[float, float]:
    """Mean cross-entropy (nats) and accuracy (0 … 1) of a model."""
    model.eval()
    total, correct = 0.0, 0
    with torch.no_grad():
        for batch in examples.batches(EVALUATION_BATCH):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            scores = logits(model, batch, precision)
            total += F.cross_entropy(scores, batch["labels"], reduction="sum").item()
            correct += int((scores.argmax(1) == batch["labels"]).sum())
    return total / len(examples), correct / len(examples)
