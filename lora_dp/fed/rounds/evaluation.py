"""Loss and accuracies of a model on examples that are taken to be public."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lora_dp.fed.data.examples import Batch, Examples
from lora_dp.fed.models.loading import logits
from lora_dp.fed.models.options import Precision
from lora_dp.fed.models.task_losses import token_counts

EVALUATION_BATCH = 256
# A language model scores every token of its vocabulary at each place, which takes memory.
_TEXTS_AT_ONCE = 16


class Evaluation(NamedTuple):
    """What a model achieves on examples.

    Attributes:
        loss: mean cross-entropy, in nats, over the examples; of a language model over all tokens that it learns.
        accuracy: share of the examples, or of these tokens, that are said rightly, 0 … 1.
        balanced_accuracy: mean over the classes that occur of the share of their examples that are, 0 … 1 (mean
            recall; Brodersen et al. 2010, The balanced accuracy and its posterior distribution); None for a language
            model.

    >>> Evaluation(loss=0.7, accuracy=0.75, balanced_accuracy=0.5).balanced_accuracy
    0.5
    """

    loss: float
    accuracy: float
    balanced_accuracy: float | None


def perplexity(loss: float) -> float:
    """Of a mean loss over tokens in nats: as many tokens, equally likely, would be as hard to tell; inf if too large.

    >>> round(perplexity(2.0), 2)
    7.39
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def evaluation_batches(examples: Examples) -> Iterator[Batch]:
    """All examples in order, as many at a time as memory has room for without gradients."""
    return examples.batches(_TEXTS_AT_ONCE if examples.targets([]).dim() == 2 else EVALUATION_BATCH)


def evaluate(
    model: nn.Module, examples: Examples, device: torch.device, precision: Precision = "float32"
) -> Evaluation:
    """Loss and accuracies of a model, which is left in eval mode.

    Raises:
        RuntimeError: there are no examples.
    """
    model.eval()
    total, counts = 0.0, torch.zeros(3, dtype=torch.float64)
    labels, right = [], []
    with torch.no_grad():
        for batch in evaluation_batches(examples):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            targets = batch["labels"]
            if targets.dim() == 2:
                counts += token_counts(model, batch, precision).sum(0).cpu()
                continue
            scores = logits(model, batch, precision)
            total += F.cross_entropy(scores, targets, reduction="sum").item()
            labels.append(targets.cpu())
            right.append((scores.argmax(1) == targets).cpu())
    if counts[1]:
        nats, tokens, said = counts.tolist()
        return Evaluation(nats / tokens, said / tokens, None)
    classes, hit = torch.cat(labels), torch.cat(right)
    there = classes.bincount() > 0
    recalls = classes.bincount(hit.double())[there] / classes.bincount()[there]
    return Evaluation(total / len(examples), int(hit.sum()) / len(examples), float(recalls.mean()))
