"""Tiny causal language models of five families, in float64, with completion-only labels of uneven lengths."""

from typing import Any

import peft
import torch
import transformers as tf
from torch import Tensor, nn

from lora_dp.losses import causal_lm_loss

VOCABULARY, IGNORED = 40, -100
_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = ["llama", "qwen3", "gemma3", "mixtral", "gpt2"]
ATTENTION = {family: ["q_proj", "v_proj"] for family in FAMILIES} | {"gpt2": ["c_attn"]}


def causal_lm(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """With weights so large that all matter, and no dropout."""
    torch.manual_seed(0)
    model: nn.Module
    if family == "llama":
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**_SMALL))
    elif family == "qwen3":
        model = tf.Qwen3ForCausalLM(tf.Qwen3Config(head_dim=8, **_SMALL))
    elif family == "gemma3":
        model = tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(head_dim=8, sliding_window=4, **_SMALL))
    elif family == "mixtral":
        model = tf.MixtralForCausalLM(tf.MixtralConfig(num_local_experts=4, **_SMALL))
        model.set_experts_implementation("eager")  # the grouped product has no float64
    else:
        small = {name: value for name, value in _SMALL.items() if name != "num_key_value_heads"}
        model = tf.GPT2LMHeadModel(
            tf.GPT2Config(n_layer=2, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **small)
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).train()


def completions(n: int, *, side: str = "right", seed: int = 1) -> list[dict[str, Tensor]]:
    """Texts of 4 to 12 tokens, padded to 12 on either side; the first tokens are a prompt, which is not labelled."""
    draws = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(n):
        length, prompt = 4 + (3 * number) % 9, 1 + number % 3
        ids = torch.randint(3, VOCABULARY, (length,), generator=draws)
        labels = ids.clone()
        labels[:prompt] = IGNORED
        pad = 12 - length
        places = (0, pad) if side == "right" else (pad, 0)
        rows.append(
            {
                "input_ids": nn.functional.pad(ids, places),
                "attention_mask": nn.functional.pad(torch.ones(length, dtype=torch.long), places),
                "labels": nn.functional.pad(labels, places, value=IGNORED),
            }
        )
    return rows


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of them."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def adapted_causal_lm(family: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    """With PEFT's adapters on its attention, whose B is not zero, so that both factors move."""
    config = peft.LoraConfig(
        **{"r": 3, "lora_alpha": 6, "target_modules": ATTENTION[family], "task_type": "CAUSAL_LM", **options}
    )
    model = peft.get_peft_model(causal_lm(family, dtype), config, autocast_adapter_dtype=False)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).train()


def losses_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(N,): of the next tokens, by the labels."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return causal_lm_loss(model(**inputs).logits, batch["labels"])


def one_loss(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
    """Of a text alone."""
    return losses_of(model, stacked([row]))[0]
