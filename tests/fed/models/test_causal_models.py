"""Causal language models with adapters in place."""

from pathlib import Path

import pytest
import torch
import transformers

from lora_dp.fed.models.causal_models import load_causal_model
from lora_dp.fed.models.options import ModelConfig
from lora_dp.nn.lora_linear import DPLoRALinear
from tests.fed.models.tiny_texts import bert_folder
from tests.fed.tiny_language import language_model
from tests.language_models import FAMILIES


def adapted(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, DPLoRALinear)]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_and_the_output_layer_stays(tmp_path: Path, family: str) -> None:
    loaded = load_causal_model(ModelConfig(name=language_model(tmp_path, family), r=2))
    names = adapted(loaded.model)
    assert names and not any("lm_head" in name for name in names)
    blocks = {int(part) for name in names for part in name.split(".") if part.isdigit() and len(part) == 1}
    assert blocks >= {0, 1} and loaded.heads == [] and not loaded.head_is_new and loaded.config.features == "own"
    trained = [name for name, p in loaded.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained) and loaded.model.training
    assert loaded.spec.max_length == 32 and loaded.spec.tokenizer.pad_token_id == 0
    assert all(p.dtype == torch.float32 for p in loaded.model.parameters())


def test_last_blocks_alone(tmp_path: Path) -> None:
    name = language_model(tmp_path)
    one = load_causal_model(ModelConfig(name=name, r=2, adapt_last=1))
    assert adapted(one.model) and all(".layers.1." in layer for layer in adapted(one.model))
    chosen = load_causal_model(ModelConfig(name=name, r=2), adapts_last=1)
    assert adapted(chosen.model) == adapted(one.model) and chosen.config.adapt_last == 1
    named = load_causal_model(ModelConfig(name=name, r=2, target_modules=["q_proj"]), adapts_last=1)
    assert len(adapted(named.model)) == 2 and named.config.adapt_last is None


def test_the_seed_decides_the_start_and_nothing_else_is_drawn(tmp_path: Path) -> None:
    name = language_model(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, again, other = (
        load_causal_model(ModelConfig(name=name, r=2), seed=seed).model.state_dict() for seed in (0, 0, 1)
    )
    assert torch.rand(1).equal(expected)
    assert all(first[key].equal(again[key]) for key in first)
    assert {key.rpartition(".")[2] for key in first if not first[key].equal(other[key])} == {"lora_A"}


def test_cores_and_merged_scales(tmp_path: Path) -> None:
    loaded = load_causal_model(ModelConfig(name=language_model(tmp_path), r=2, alpha=4.0), adapter="xs")
    layer = next(module for module in loaded.model.modules() if isinstance(module, DPLoRALinear))
    assert layer.alpha == 4.0 and any(name.endswith("lora_R") for name, _ in loaded.model.named_parameters())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("default", "the default model takes images, and is no language model: give one by --model"),
        ("vit_tiny_patch16_224", "could not load vit_tiny_patch16_224 as a causal language model"),
        ("/nowhere", "could not load /nowhere as a causal language model"),
    ],
)
def test_what_is_no_language_model_is_told(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_causal_model(ModelConfig(name=name))


def test_a_model_with_an_encoder_is_refused(tmp_path: Path) -> None:
    language_model(tmp_path / "words")
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="as a causal language model: give a Transformers hub name or folder of one"):
        load_causal_model(ModelConfig(name=str(tmp_path)))


def test_a_model_that_sees_what_it_is_to_tell_is_refused(tmp_path: Path) -> None:
    """Transformers loads BERT as a causal model all the same."""
    with pytest.raises(ValueError, match="sees the whole text at each of its tokens"):
        load_causal_model(ModelConfig(name=bert_folder(tmp_path)))
