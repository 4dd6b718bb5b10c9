"""Loss and accuracy on public examples: means over all of them, whatever the batches."""

import pytest
import torch
from torch import nn

from lora_dp.fed.rounds import evaluation
from lora_dp.fed.rounds.evaluation import evaluate
from tests.fed.small import Adapted, make_examples


@pytest.mark.parametrize("at_once", [256, 4])
def test_they_are_the_means_over_all_examples(monkeypatch, at_once):
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", at_once)
    model, examples = Adapted(), make_examples(11, 3)
    loss, accuracy = evaluate(model, examples, torch.device("cpu"))
    batch = examples.batch(range(11))
    scores = model(batch["pixel_values"]).detach()
    shares = torch.softmax(scores, 1)[torch.arange(11), batch["labels"]]
    assert loss == pytest.approx(float(-shares.log().mean()), rel=1e-12)
    assert accuracy == int((scores.argmax(1) == batch["labels"]).sum()) / 11


def test_dropout_is_off_and_no_graph_is_kept():
    model = nn.Sequential(Adapted(), nn.Dropout(0.9)).train()
    found = [evaluate(model, make_examples(5, 1), torch.device("cpu")) for _ in range(2)]
    assert found[0] == found[1] and not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
