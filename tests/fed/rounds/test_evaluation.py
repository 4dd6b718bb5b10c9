"""Loss and accuracy on public examples: means over all of them, whatever the batches."""

import pytest
import torch
from torch import nn

from lora_dp.fed.data.examples import ImageExamples
from lora_dp.fed.rounds import evaluation
from lora_dp.fed.rounds.evaluation import evaluate
from tests.fed.small import Adapted, make_examples


@pytest.mark.parametrize("at_once", [256, 4])
def test_they_are_the_means_over_all_examples(monkeypatch, at_once):
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", at_once)
    model, examples = Adapted(), make_examples(11, 3)
    loss, accuracy, balanced = evaluate(model, examples, torch.device("cpu"))
    batch = examples.batch(range(11))
    scores = model(batch["pixel_values"]).detach()
    shares = torch.softmax(scores, 1)[torch.arange(11), batch["labels"]]
    assert loss == pytest.approx(float(-shares.log().mean()), rel=1e-12)
    right = scores.argmax(1) == batch["labels"]
    assert accuracy == int(right.sum()) / 11
    recalls = [float(right[batch["labels"] == each].double().mean()) for each in batch["labels"].unique()]
    assert balanced == pytest.approx(sum(recalls) / len(recalls), rel=1e-12)


class Always(nn.Module):
    """Says class 2, whatever it is shown."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.eye(4)[2].expand(len(pixels), 4)


def test_balanced_accuracy_is_the_mean_recall_of_the_classes_that_occur():
    labels = torch.tensor([2] * 6 + [0] * 2)  # none of classes 1 and 3
    examples = ImageExamples(torch.zeros(8, 1, 4, 4, dtype=torch.uint8), labels, [0.0], [1.0])
    found = evaluate(Always(), examples, torch.device("cpu"))
    assert (found.accuracy, found.balanced_accuracy) == (0.75, 0.5)


def test_dropout_is_off_and_no_graph_is_kept():
    model = nn.Sequential(Adapted(), nn.Dropout(0.9)).train()
    found = [evaluate(model, make_examples(5, 1), torch.device("cpu")) for _ in range(2)]
    assert found[0] == found[1] and not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
