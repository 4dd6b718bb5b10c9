"""What a model with adapters writes, opened again, computes what the model did: merged, unmerged, or a refusal."""

import copy
import importlib.util
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from lora_dp import DPLoRALinear, LoRAConfig, inject_lora, load_adapter, merge_adapters, save_adapter, unmerge_adapters
from tests.tiny_models import HEADS, KINDS, build, logits, randomise

TRANSFORMERS = ["roberta", "gpt2", "llama", "vit"]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def adapted(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    settings = {"r": 2, "trainable_modules": [HEADS[kind]], "bias": "all"} | settings
    return randomise(inject_lora(build(kind).to(dtype), LoRAConfig(**settings)))


def opened(kind: str, folder: Path, **options: Any) -> nn.Module:
    auto = tf.AutoModelForImageClassification if kind == "vit" else tf.AutoModelForSequenceClassification
    return auto.from_pretrained(folder, **options).eval()


def by_torch(model: nn.Module, path: Path) -> dict[str, Tensor]:
    torch.save(model.state_dict(), path)
    return torch.load(path)


def by_safetensors(model: nn.Module, path: Path) -> dict[str, Tensor]:
    save_file(model.state_dict(), path)
    return load_file(path)


def by_save_model(model: nn.Module, path: Path) -> dict[str, Tensor]:
    save_model(model, str(path))
    return load_file(path)


WAYS: list[Callable[[nn.Module, Path], dict[str, Tensor]]] = [by_torch, by_safetensors, by_save_model]


@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.parametrize("merged", [True, False])
def test_from_pretrained_opens_what_save_pretrained_wrote(kind, merged, tmp_path):
    model = adapted(kind)
    expected = logits(model, kind)
    assert (expected - logits(build(kind), kind)).abs().max() > 1e-2
    if merged:
        merge_adapters(model)
    model.save_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits(opened(kind, tmp_path / "ours"), kind), expected, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "ours" / "adapter_config.json").exists() != merged
    if merged:
        build(kind).save_pretrained(tmp_path / "plain")
        ours, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "plain"))
        assert ours.keys() == plain.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_in_half_precision(dtype, tmp_path):
    model = adapted("roberta", dtype)
    merge_adapters(model)
    expected = logits(model, "roberta")
    model.save_pretrained(tmp_path)
    again = opened("roberta", tmp_path, dtype=dtype)
    assert torch.equal(logits(again, "roberta"), expected)


def test_a_reader_without_peft_is_spoken_of(tmp_path, monkeypatch):
    model = adapted("llama")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="only where PEFT is installed.*or call merge_adapters"):
        model.save_pretrained(tmp_path)


def test_a_trainers_checkpoint_resumes(tmp_path):
    """It saves by save_pretrained, and loads the weights into the adapted model."""
    model, fresh = adapted("roberta"), adapted("roberta")
    for parameter in fresh.parameters():
        parameter.data.mul_(0.5 if parameter.requires_grad else 1)
    model.save_pretrained(tmp_path)
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert torch.equal(logits(fresh, "roberta"), logits(model, "roberta"))


def test_merged_weights_never_lie_beside_an_adapter(tmp_path):
    """from_pretrained would add it once more."""
    model = adapted("llama")
    save_adapter(model, tmp_path)
    merge_adapters(model)
    with pytest.raises(ValueError, match="once more: give another folder"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_half_a_merge_is_not_saved(tmp_path):
    model = adapted("llama")
    next(module for module in model.modules() if isinstance(module, DPLoRALinear)).merge()
    with pytest.raises(ValueError, match="Some adapters of the model are merged"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_part_of_an_adapted_model_is_not_saved_without_the_adapters(tmp_path):
    model = adapted("llama", trainable_modules=[])
    with pytest.raises(ValueError, match="call merge_adapters first"):
        model.model.save_pretrained(tmp_path)
    expected = model.model(input_ids=torch.arange(1, 8)[None])[0]
    merge_adapters(model)
    model.model.save_pretrained(tmp_path)
    again = tf.AutoModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(input_ids=torch.arange(1, 8)[None])[0], expected, rtol=1e-4, atol=1e-5)


class Hub(nn.Module, PyTorchModelHubMixin):
    """Its ``from_pretrained`` would drop factors without a word."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


def test_what_transformers_does_not_open_is_saved_merged_only(tmp_path):
    model = randomise(inject_lora(Hub(), LoRAConfig(r=2)))
    with pytest.raises(ValueError, match="would lose the adapters when opened again: call merge_adapters first"):
        model.save_pretrained(tmp_path)
    x = torch.randn(3, 4)
    expected = model.layer(x)
    merge_adapters(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(Hub.from_pretrained(tmp_path).layer(x), expected)


def test_only_the_main_process_writes(tmp_path):
    adapted("llama").save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "adapter_config.json").exists()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_state_is_a_plain_models(kind, way, tmp_path):
    model = adapted(kind)
    expected = logits(model, kind)
    merge_adapters(model)
    plain = build(kind)
    plain.load_state_dict(way(model, tmp_path / "file"))
    torch.testing.assert_close(logits(plain, kind), expected, rtol=1e-4, atol=1e-5)
    unmerge_adapters(model)
    torch.testing.assert_close(logits(model, kind), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_the_adapter_never_counts_twice(way, strict, tmp_path):
    model = adapted("gpt2")
    expected = logits(model, "gpt2")
    plain_state = copy.deepcopy(model.state_dict())
    merge_adapters(model)
    state = way(model, tmp_path / "file")
    model.load_state_dict(state, strict=strict)  # its own: nothing changes, merged or by a round trip
    torch.testing.assert_close(logits(model, "gpt2"), expected, rtol=1e-4, atol=1e-5)
    unmerge_adapters(model)
    with pytest.raises(RuntimeError, match=r"merged weight for 'transformer\.h\.0.*after unmerge_adapters"):
        model.load_state_dict(state, strict=strict)
    torch.testing.assert_close(logits(model, "gpt2"), expected, rtol=1e-4, atol=1e-5)
    # A state with factors is whole: a merged model takes it, and is unmerged.
    merge_adapters(model)
    model.load_state_dict(plain_state)
    assert not any(module.merged for module in model.modules() if isinstance(module, DPLoRALinear))
    torch.testing.assert_close(logits(model, "gpt2"), expected, rtol=1e-4, atol=1e-5)


def test_a_merged_state_is_refused_by_a_fresh_adapter_too():
    """It would train on and save an adapter for another base model than its own."""
    model = adapted("llama")
    merge_adapters(model)
    fresh = inject_lora(build("llama"), LoRAConfig(r=2, trainable_modules=["score"]))
    with pytest.raises(RuntimeError, match="load it into the plain model"):
        fresh.load_state_dict(model.state_dict(), strict=False)


def test_a_merged_layer_takes_no_part_of_a_state():
    layer, other = (DPLoRALinear(6, 5, r=2) for _ in range(2))
    for one in (layer, other):
        nn.init.normal_(one.lora_B)
    state = other.state_dict()
    layer.merge()
    before = copy.deepcopy(layer.state_dict())
    for keys, words in (({"lora_A", "lora_B"}, "factors"), ({"lora_B"}, "factors"), ({"weight", "bias"}, "weight")):
        with pytest.raises(RuntimeError, match=f"is merged, and the state holds .*{words} alone"):
            layer.load_state_dict({key: state[key] for key in keys}, strict=False)
    assert layer.merged and all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in before.items())


def test_plain_weights_still_go_beneath_an_adapter():
    model, base = adapted("llama", bias="none", trainable_modules=[]), build("llama")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1.5)
    missing = model.load_state_dict(base.state_dict(), strict=False).missing_keys
    assert missing and all(key.endswith(("lora_A", "lora_B")) for key in missing)
    layer = model.model.layers[0].mlp.down_proj
    assert torch.equal(layer.weight, base.model.layers[0].mlp.down_proj.weight) and layer.lora_B.any()


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ["roberta", "timm_vit"])
def test_copies_and_pickles(kind, merged, tmp_path):
    model = adapted(kind)
    if merged:
        merge_adapters(model)
    expected = logits(model, kind)
    torch.save(model, tmp_path / "whole.pt")
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "whole.pt", weights_only=False),
    ):
        assert torch.equal(logits(copied, kind), expected)
        unmerge_adapters(copied)
        torch.testing.assert_close(logits(copied, kind), expected, rtol=1e-4, atol=1e-5)
        if kind == "roberta":  # what it saves is its own, not the first model's
            for parameter in copied.parameters():
                parameter.data.mul_(0.9)
            copied.save_pretrained(tmp_path / "copy")
            torch.testing.assert_close(
                logits(opened(kind, tmp_path / "copy"), kind), logits(copied, kind), rtol=1e-4, atol=1e-5
            )
    assert torch.equal(logits(model, kind), expected)


def test_an_adapter_is_saved_from_a_merged_model(tmp_path):
    model = adapted("llama")
    save_adapter(model, tmp_path / "before")
    merge_adapters(model)
    save_adapter(model, tmp_path / "after")
    expected = logits(model, "llama")
    for folder in ("before", "after"):
        torch.testing.assert_close(
            logits(load_adapter(build("llama"), tmp_path / folder), "llama"), expected, rtol=1e-4, atol=1e-5
        )


def test_tied_weights_are_saved_unmerged(tmp_path):
    """An adapted output layer that shares its weight with the embedding cannot be merged, but is saved whole."""
    config = tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=20)
    torch.manual_seed(0)
    model = randomise(inject_lora(tf.GPT2LMHeadModel(config).eval(), LoRAConfig(r=2, target_modules=["lm_head"])))
    with pytest.raises(ValueError, match="untie"):
        merge_adapters(model)
    model.save_pretrained(tmp_path)
    ids = torch.arange(1, 8)[None]
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_tied_embeddings_beside_merged_layers(tmp_path):
    config = tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=20)
    torch.manual_seed(0)
    model = randomise(inject_lora(tf.GPT2LMHeadModel(config).eval(), LoRAConfig(r=2, target_modules=["c_attn"])))
    merge_adapters(model)
    model.save_pretrained(tmp_path)
    ids = torch.arange(1, 8)[None]
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
