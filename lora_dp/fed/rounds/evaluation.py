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
    return examples.batches(_TEXTS_AT_ONCE if _are_texts_to_learn(examples) else EVALUATION_BATCH)


def _are_texts_to_learn(examples: Examples) -> bool:
    return examples.targets([]).dim() == 2


def evaluate(
    model: nn.Module, examples: Examples, device: torch.device, precision: Precision = "float32"
) -> Evaluation:
    """Loss and accuracies of a model, which is left in eval mode.

    Raises:
        RuntimeError: there are no examples.
    """
    model.eval()
    batches = ({name: tensor.to(device) for name, tensor in batch.items()} for batch in evaluation_batches(examples))
    with torch.no_grad():
        evaluated = _of_tokens if _are_texts_to_learn(examples) else _of_classes
        return evaluated(model, batches, precision)


def _of_tokens(model: nn.Module, batches: Iterator[Batch], precision: Precision) -> Evaluation:
    counts = torch.stack([token_counts(model, batch, precision).sum(0).cpu() for batch in batches]).sum(0)
    nats, tokens, right = counts.tolist()
    return Evaluation(nats / tokens, right / tokens, None)


def _of_classes(model: nn.Module, batches: Iterator[Batch], precision: Precision) -> Evaluation:
    total = 0.0
    labels, right = [], []
    for batch in batches:
        scores = logits(model, batch, precision)
        total += F.cross_entropy(scores, batch["labels"], reduction="sum").item()
        labels.append(batch["labels"].cpu())
        right.append((scores.argmax(1) == batch["labels"]).cpu())
    classes, hit = torch.cat(labels), torch.cat(right)
    there = classes.bincount() > 0
    recalls = classes.bincount(hit.double())[there] / classes.bincount()[there]
    return Evaluation(total / len(classes), int(hit.sum()) / len(classes), float(recalls.mean()))
