"""Losses of single examples by a model's task: each is Transformers' own loss of that example alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from lora_dp.trainers.example_losses import example_losses_of, split_labels

BERT = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
IDS = torch.randint(3, 30, (4, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * length + [0] * (7 - length) for length in (7, 5, 3, 6)])


def bert(kind: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    return getattr(tf, f"BertFor{kind}")(tf.BertConfig(**BERT, **config)).eval()


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=8)).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = tf.T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=20, num_layers=1, num_heads=2, dropout_rate=0.0)
    config.decoder_start_token_id = 0
    return tf.T5ForConditionalGeneration(config).eval()


def vit() -> nn.Module:
    torch.manual_seed(0)
    config = tf.ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=20,
        num_labels=3,
    )
    return tf.ViTForImageClassification(config).eval()


def bart() -> nn.Module:
    torch.manual_seed(0)
    config = tf.BartConfig(
        vocab_size=30, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=20, dropout=0.0
    )
    return tf.BartForCausalLM(config).eval()


TOKENS = IDS.masked_fill(MASK == 0, -100)
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "causal": (gpt, {"input_ids": IDS, "attention_mask": MASK, "labels": TOKENS}),
    # Its labels are shifted already.
    "decoder": (bart, {"input_ids": IDS, "labels": TOKENS}),
    "masked": (lambda: bert("MaskedLM"), {"input_ids": IDS, "attention_mask": MASK, "labels": TOKENS}),
    "tokens": (
        lambda: bert("TokenClassification", num_labels=3),
        {"input_ids": IDS, "attention_mask": MASK, "labels": (IDS % 3).masked_fill(MASK == 0, -100)},
    ),
    "classes": (
        lambda: bert("SequenceClassification", num_labels=3),
        {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0, 1, 2, 0])},
    ),
    "regression": (
        lambda: bert("SequenceClassification", num_labels=1),
        {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0.5, 1.0, -2.0, 0.0])},
    ),
    "several-labels": (
        lambda: bert("SequenceClassification", num_labels=3, problem_type="multi_label_classification"),
        {"input_ids": IDS, "attention_mask": MASK, "labels": torch.eye(4, 3)},
    ),
    "images": (vit, {"pixel_values": torch.randn(4, 1, 8, 8), "labels": torch.tensor([0, 1, 2, 0])}),
    "seq2seq": (t5, {"input_ids": IDS, "attention_mask": MASK, "labels": TOKENS}),
}


@pytest.mark.parametrize("case", CASES)
def test_each_is_transformers_loss_of_that_example_alone(case: str) -> None:
    build, batch = CASES[case]
    model = build()
    inputs, labels = split_labels(batch, ["labels"])
    if case == "seq2seq":
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels["labels"])
    with torch.no_grad():
        found = example_losses_of(model)(model(**inputs), labels)
        alone = [model(**{name: value[i : i + 1] for name, value in batch.items()}).loss for i in range(4)]
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-5, atol=1e-6)
    assert found.std() > 0


def test_answers_in_a_text_are_found_among_its_own_tokens() -> None:
    model = bert("QuestionAnswering")
    batch = {
        "input_ids": IDS,
        "attention_mask": MASK,
        "start_positions": torch.tensor([1, 0, 2, 3]),
        "end_positions": torch.tensor([3, 4, 2, 5]),
    }
    inputs, labels = split_labels(batch, [])
    labels["attention_mask"] = MASK
    with torch.no_grad():
        found = example_losses_of(model)(model(**inputs), labels)
        first = model(**{name: value[:1] for name, value in batch.items()}).loss  # the longest: no padding
    torch.testing.assert_close(found[0], first)


def test_smoothing_is_torchs() -> None:
    model = bert("SequenceClassification", num_labels=3)
    inputs, labels = split_labels(CASES["classes"][1], ["labels"])
    with torch.no_grad():
        outputs = model(**inputs)
    smooth = nn.functional.cross_entropy(outputs.logits, labels["labels"], reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(example_losses_of(model, 0.2)(outputs, labels), smooth)
    with pytest.raises(ValueError, match="for classification alone"):
        example_losses_of(gpt(), 0.2)
    regression = bert("SequenceClassification", num_labels=1, problem_type="regression")
    inputs, labels = split_labels(CASES["regression"][1], ["labels"])
    with pytest.raises(ValueError, match="for one class an example"):
        example_losses_of(regression, 0.2)(regression(**inputs), labels)


def test_a_model_for_another_task_names_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"not known for a Linear: give compute_loss_func"):
        example_losses_of(nn.Linear(2, 2))
