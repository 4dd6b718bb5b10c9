"""The loss of each example, for whatever a model of the federation is to learn."""

import torch
from torch import Tensor, nn

from lora_dp.fed.data.examples import Batch
from lora_dp.fed.data.kept_activations import model_inputs
from lora_dp.fed.models.loading import logits
from lora_dp.fed.models.options import Precision
from lora_dp.losses import classification_loss


def task_losses(model: nn.Module, batch: Batch, precision: Precision = "float32") -> Tensor:
    """Cross-entropy (N,), in nats: of a class, or for language models the mean over an example's own learned tokens.

    Args:
        model: whose outputs are scores, or a :class:`lora_dp.fed.models.completion_loss.CompletionLoss`.
        batch: encoded, with "labels".
        precision: in which the model runs.
    """
    targets = batch["labels"]
    if targets.dim() == 1:
        return classification_loss(logits(model, batch, precision), targets)
    return _called(model, batch, precision)


def token_counts(model: nn.Module, batch: Batch, precision: Precision = "float32") -> Tensor:
    """Of each text (N, 3), float64: nats over its learned tokens, how many they are, and how many are the likeliest."""
    return _called(model, batch, precision, counted=True)


def training_inputs(batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """What a model is called with in training: a language model's targets are among it, which returns losses."""
    args, named = model_inputs(batch)
    return args, named if batch["labels"].dim() == 1 else {**named, "targets": batch["labels"]}


def _called(model: nn.Module, batch: Batch, precision: Precision, **how: bool) -> Tensor:
    args, named = training_inputs(batch)
    with torch.autocast(batch["labels"].device.type, torch.bfloat16, enabled=precision == "bf16"):
        found: Tensor = model(*args, **named, **how)
    return found if found.dtype == torch.float64 else found.float()
