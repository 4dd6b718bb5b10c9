"""PEFT stores embeddings and output layers beside an adapter: after a resize, on request, or where they are adapted."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_dp import DPLoRALinear, LoRAConfig, inject_lora, load_adapter, merge_adapters, save_adapter
from tests.tiny_models import randomise

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
IDS = torch.arange(30, 44)[None]


def base(family: str = "llama", vocabulary: int = 44, tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    if family == "gpt2":
        model: Any = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=20))
    else:
        model = tf.LlamaForCausalLM(
            tf.LlamaConfig(
                vocab_size=40,
                hidden_size=16,
                intermediate_size=20,
                num_hidden_layers=1,
                num_attention_heads=2,
                tie_word_embeddings=tied,
            )
        )
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model.eval()


def scores(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def by_peft(folder: Path, family: str = "llama", tied: bool = False, embeddings: Any = True, **settings: Any) -> Tensor:
    """Saves an adapter of PEFT's over embeddings that are not ``base``'s, and returns what the whole model says."""
    model = base(family, tied=tied)
    with torch.no_grad():
        for end in (model.get_input_embeddings(), model.get_output_embeddings()):
            end.weight.add_(0.3)
    theirs = randomise(peft.get_peft_model(model, peft.LoraConfig(r=2, **settings)).eval())
    theirs.save_pretrained(folder, save_embedding_layers=embeddings)
    return scores(theirs)


@pytest.mark.parametrize(
    ("family", "tied", "settings"),
    [
        ("llama", False, {"target_modules": ["q_proj"]}),
        ("llama", True, {"target_modules": ["q_proj"]}),
        ("gpt2", True, {"target_modules": ["c_attn"]}),
        ("llama", False, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("llama", False, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
        ("llama", False, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
        ("llama", False, {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["lm_head"]}),
    ],
)
def test_loaded_with_the_adapter_and_saved_on(family, tied, settings, tmp_path):
    expected = by_peft(tmp_path / "theirs", family, tied, **settings)
    model = load_adapter(base(family), tmp_path / "theirs")
    assert (scores(base(family)) - expected).abs().max() > 1e-2
    torch.testing.assert_close(scores(model), expected, rtol=1e-4, atol=1e-5)
    save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base(family), tmp_path / "ours").eval()
    torch.testing.assert_close(scores(again), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores(load_adapter(model, tmp_path / "ours")), expected, rtol=1e-4, atol=1e-5)


def test_carried_embeddings_stay_frozen(tmp_path):
    by_peft(tmp_path, target_modules=["q_proj"])
    model = load_adapter(base(), tmp_path)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapted_output_layer(merged, tmp_path):
    """PEFT stores its plain weight; so do we, merged or not."""
    expected = by_peft(tmp_path / "theirs", embeddings="auto", target_modules=["q_proj", "lm_head"])
    stored = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    model = load_adapter(base(), tmp_path / "theirs")
    assert isinstance(model.lm_head, DPLoRALinear)
    # The embedding beneath was not stored: it is this model's own.
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.3)
    torch.testing.assert_close(scores(model), expected, rtol=1e-4, atol=1e-5)
    if merged:
        merge_adapters(model)
    save_adapter(model, tmp_path / "ours")
    again = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert again.keys() == stored.keys()
    for key, tensor in stored.items():
        torch.testing.assert_close(again[key], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("whole", [None, ["embed_tokens", "lm_head"]])
def test_a_vocabulary_of_another_size_is_named_with_the_remedy(whole, tmp_path):
    by_peft(tmp_path, target_modules=["q_proj"], modules_to_save=whole)
    model = base(vocabulary=40)
    names = list(model.state_dict())
    with pytest.raises(
        ValueError,
        match=r"carries '(model\.embed_tokens|lm_head)\.weight' with shape \(44, 16\) where "
        r"the model has \(40, 16\): call model\.resize_token_embeddings\(44\)",
    ):
        load_adapter(model, tmp_path)
    assert list(model.state_dict()) == names
    model.resize_token_embeddings(44, mean_resizing=False)
    load_adapter(model, tmp_path)


def test_adapted_embeddings_are_refused_by_name(tmp_path):
    by_peft(tmp_path, embeddings="auto", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match=r"adapts the embedding 'model\.embed_tokens'.*train it whole"):
        load_adapter(base(), tmp_path)


def test_trained_single_tokens_are_refused_by_name(tmp_path):
    by_peft(tmp_path, embeddings="auto", target_modules=["q_proj"], trainable_token_indices=[1, 2])
    with pytest.raises(ValueError, match=r"trainable_token_indices=.* is not supported"):
        load_adapter(base(), tmp_path)


def test_a_model_without_embeddings_takes_none(tmp_path):
    by_peft(tmp_path, target_modules=["q_proj"])
    model = base().model
    wrapped = nn.ModuleDict({"model": model, "lm_head": nn.Linear(16, 44, bias=False)})
    with pytest.raises(ValueError, match=r"what the model's adapters lack: 'base_model\.model\.lm_head\.weight'"):
        load_adapter(wrapped, tmp_path)


def test_our_own_files_carry_none_unasked(tmp_path):
    save_adapter(randomise(inject_lora(base(), LoRAConfig(r=2, target_modules=["q_proj"]))), tmp_path)
    assert all(".lora_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
