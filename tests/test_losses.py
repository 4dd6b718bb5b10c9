"""Losses of single examples: each against its definition, one example at a time; no example knows of another."""

import doctest

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lora_dp.losses
from lora_dp.losses import causal_lm_loss, classification_loss, masked_lm_loss, question_answering_loss, regression_loss
from tests.models import assert_refuses

LENGTHS = (5, 2, 3, 1)


def tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(7, (4, 5), generator=generator)
    for row, length in enumerate(LENGTHS):
        labels[row, length:] = -100
    return logits, labels


def test_examples_of_the_docstrings_run():
    found = doctest.testmod(lora_dp.losses, extraglobs={"torch": torch})
    assert found.attempted >= 5 and not found.failed


def test_classification_is_the_cross_entropy_of_each():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, -100, 1, 1])
    for smoothing in (0.0, 0.1):
        losses = classification_loss(logits, labels, label_smoothing=smoothing)
        for i, label in enumerate(labels):
            alone = F.cross_entropy(logits[i : i + 1], labels[i : i + 1], label_smoothing=smoothing)
            assert losses[i] == 0 if label == -100 else torch.isclose(losses[i], alone)
    soft = torch.softmax(torch.randn(5, 3), 1)
    assert torch.allclose(classification_loss(logits, soft), -(soft * logits.log_softmax(1)).sum(1), atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_token_losses_are_of_each_examples_own_tokens(reduction):
    logits, labels = tokens()
    whole, shifted = (
        masked_lm_loss(logits, labels, reduction=reduction),
        causal_lm_loss(logits, labels, reduction=reduction),
    )
    for i, length in enumerate(LENGTHS):
        expected = F.cross_entropy(logits[i, :length], labels[i, :length], reduction=reduction)
        assert torch.isclose(whole[i], expected)
        following = (
            0.0
            if length == 1
            else float(F.cross_entropy(logits[i, : length - 1], labels[i, 1:length], reduction=reduction))
        )
        assert float(shifted[i]) == pytest.approx(following)


def test_causal_loss_is_transformers_on_a_single_example():
    import transformers as tf

    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(
        tf.LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2)
    )
    ids = torch.randint(40, (3, 6))
    for i in range(3):
        output = model(input_ids=ids[i : i + 1], labels=ids[i : i + 1])
        assert torch.isclose(causal_lm_loss(output.logits, ids[i : i + 1])[0], output.loss)


def test_regression_is_the_mean_over_own_outputs():
    predictions, targets = torch.randn(4, 3), torch.randn(4, 3)
    for i in range(4):
        assert torch.isclose(regression_loss(predictions, targets)[i], F.mse_loss(predictions[i], targets[i]))
    assert torch.equal(regression_loss(predictions[:, 0], targets[:, 0]), (predictions - targets)[:, 0].square())


def test_answers_are_looked_for_among_own_tokens_alone():
    """More padding changes nothing, and a position outside an example's own tokens counts for nothing."""
    starts, ends = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    lengths, first, last = torch.tensor([6, 4, 3]), torch.tensor([1, 3, 0]), torch.tensor([5, 4, 99])
    mask = (torch.arange(6) < lengths.unsqueeze(1)).long()
    losses = question_answering_loss(starts, ends, first, last, mask)
    for i, length in enumerate(lengths):
        terms = [
            F.cross_entropy(logits[i : i + 1, :length], place[i : i + 1])
            for logits, place in ((starts, first), (ends, last))
            if place[i] < length
        ]
        assert torch.isclose(losses[i], sum(terms) / 2)
    wider = [F.pad(tensor, (0, 3), value=9.0) for tensor in (starts, ends)]
    assert torch.allclose(question_answering_loss(*wider, first, last, F.pad(mask, (0, 3))), losses)


@pytest.mark.parametrize("position", [-100, -1, 4, 99])
def test_a_position_outside_of_the_sequence_counts_for_nothing(position):
    logits, inside = torch.randn(1, 4, dtype=torch.float64), torch.tensor([2])
    mask, outside = torch.ones(1, 4), torch.tensor([position])
    alone = F.cross_entropy(logits, inside) / 2
    for first, last in ((outside, inside), (inside, outside)):
        assert torch.isclose(question_answering_loss(logits, logits, first, last, mask)[0], alone)
    assert question_answering_loss(logits, logits, outside, outside, mask).tolist() == [0.0]


def test_float64_outputs_have_float64_losses():
    logits = torch.randn(3, 4, dtype=torch.float64)
    assert classification_loss(logits, torch.tensor([0, 1, 2])).dtype == torch.float64
    assert regression_loss(logits, logits.float()).dtype == torch.float64


def test_a_regression_of_half_precision_is_in_float32():
    predictions, targets = torch.full((2, 3), 1.0, dtype=torch.bfloat16), torch.full((2, 3), 1.001)
    assert regression_loss(predictions, targets).tolist() == pytest.approx([1e-6, 1e-6], rel=1e-2)


def test_half_precision_outputs_have_float32_losses():
    logits = torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    losses = classification_loss(logits, torch.tensor([0, 1]))
    losses.sum().backward()
    assert losses.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("logits (N, K) with labels (N,)", lambda: classification_loss(torch.zeros(2, 3, 4), torch.zeros(2).long())),
        ("(N, T, V)", lambda: masked_lm_loss(torch.zeros(2, 3), torch.zeros(2, 3).long())),
        (
            "choose 'mean' or 'sum'",
            lambda: causal_lm_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3).long(), reduction="none"),
        ),
        ("of one shape", lambda: regression_loss(torch.zeros(3, 1), torch.zeros(3))),
        ("of one shape", lambda: regression_loss(torch.zeros(()), torch.zeros(()))),
        ("logits (N, K) with labels (N,)", lambda: classification_loss(torch.zeros(2, 3), torch.zeros(3).long())),
        ("logits (N, K) with labels (N,)", lambda: classification_loss(torch.zeros(2, 3), torch.zeros(2, 1).long())),
        ("(N, T, V)", lambda: masked_lm_loss(torch.zeros(2, 3, 4), torch.zeros(2, 2).long())),
        ("(N, T, V)", lambda: masked_lm_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))),
        ("(N, T, V)", lambda: causal_lm_loss(torch.zeros(2, 3, 4), torch.zeros(2).long())),
        ("(N, T, V)", lambda: causal_lm_loss(torch.zeros(3), torch.zeros(3).long())),
        *[
            (
                "question_answering_loss takes",
                lambda shapes=shapes: question_answering_loss(
                    *[torch.zeros(shape, dtype=torch.long if len(shape) == 1 else torch.float) for shape in shapes]
                ),
            )
            for shapes in (
                ((2, 3), (2, 4), (2,), (2,), (2, 3)),
                ((2, 3), (2, 3), (2,), (2,), (2, 4)),
                ((2, 3), (2, 3), (3,), (3,), (2, 3)),
                ((2, 3), (2, 3), (3,), (2,), (2, 3)),
                ((2, 3, 1), (2, 3, 1), (2,), (2,), (2, 3, 1)),
            )
        ],
        (
            "question_answering_loss takes",
            lambda: question_answering_loss(
                torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2).long(), torch.zeros(3).long(), torch.ones(2, 3)
            ),
        ),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(words, call):
    assert_refuses(ValueError, words, call)
