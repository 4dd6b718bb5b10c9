"""Loss and accuracies of a model on examples that are taken to be public."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lora_dp.fed.data.examples import Examples
from lora_dp.fed.models.loading import logits
from lora_dp.fed.models.options import Precision

EVALUATION_BATCH = 256


class Evaluation(NamedTuple):
    """What a model achieves on examples.

    Attributes:
        loss: mean cross-entropy, in nats.
        accuracy: share of the examples that are classified rightly, 0 … 1.
        balanced_accuracy: mean over the classes that occur of the share of their examples that are, 0 … 1 (mean
            recall; Brodersen et al. 2010, The balanced accuracy and its posterior distribution).

    >>> Evaluation(loss=0.7, accuracy=0.75, balanced_accuracy=0.5).balanced_accuracy
    0.5
    """

    loss: float
    accuracy: float
    balanced_accuracy: float


def evaluate(
    model: nn.Module, examples: Examples, device: torch.device, precision: Precision = "float32"
) -> Evaluation:
    """Loss, accuracy and balanced accuracy of a model, which is left in eval mode.

    Raises:
        RuntimeError: there are no examples.
    """
    model.eval()
    total = 0.0
    labels, right = [], []
    with torch.no_grad():
        for batch in examples.batches(EVALUATION_BATCH):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            scores = logits(model, batch, precision)
            total += F.cross_entropy(scores, batch["labels"], reduction="sum").item()
            labels.append(batch["labels"].cpu())
            right.append((scores.argmax(1) == batch["labels"]).cpu())
    classes, hit = torch.cat(labels), torch.cat(right)
    there = classes.bincount() > 0
    recalls = classes.bincount(hit.double())[there] / classes.bincount()[there]
    return Evaluation(total / len(examples), int(hit.sum()) / len(examples), float(recalls.mean()))
