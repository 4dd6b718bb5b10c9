"""Losses of each example, for classes and for tokens."""

import pytest
import torch
from torch import nn

from lora_dp.fed.models.completion_loss import CompletionLoss
from lora_dp.fed.models.task_losses import task_losses, token_counts, training_inputs
from lora_dp.losses import causal_lm_loss, classification_loss
from tests.language_models import causal_lm, completions, stacked


def test_of_classes_from_scores() -> None:
    model = nn.Flatten()
    batch = {"pixel_values": torch.randn(3, 1, 2, 2), "labels": torch.tensor([0, 3, 1])}
    found = task_losses(model, batch)
    torch.testing.assert_close(found, classification_loss(batch["pixel_values"].flatten(1), batch["labels"]))
    assert training_inputs(batch)[1] == {}


def test_of_tokens_by_a_model_that_returns_them() -> None:
    model = causal_lm("llama").eval()
    batch = stacked(completions(4))
    args, named = training_inputs(batch)
    assert args == () and named.keys() == {"input_ids", "attention_mask", "targets"}
    scores = model(batch["input_ids"], batch["attention_mask"]).logits
    found = task_losses(CompletionLoss(model), batch)
    torch.testing.assert_close(found, causal_lm_loss(scores, batch["labels"]))
    counts = token_counts(CompletionLoss(model), batch)
    torch.testing.assert_close(counts[:, 0] / counts[:, 1], found)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_precision_is_that_of_the_model(precision: str) -> None:
    seen = []

    class Noting(nn.Module):
        def forward(self, targets, counted=False, **inputs):
            seen.append(torch.is_autocast_enabled("cpu"))
            return torch.ones(len(targets), dtype=torch.bfloat16)

    batch = stacked(completions(2))
    assert task_losses(Noting(), batch, precision).dtype == torch.float32  # type: ignore[arg-type]
    token_counts(Noting(), batch, precision)  # type: ignore[arg-type]
    assert seen == [precision == "bf16"] * 2
