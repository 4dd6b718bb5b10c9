"""Adapters added into the weights beneath them: the same outputs as before."""

import pytest
import torch
import transformers as tf

from lora_dp import DPLoRALinear, LoRAConfig, inject_lora, load_adapter, save_adapter
from lora_dp.lora.merging import merge_adapters, merge_and_unload, unmerge_adapters
from tests.lora.merged_files import adapted
from tests.support import make_private
from tests.tiny_models import HEADS, KINDS, build, logits, randomise

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_unmerged_say_the_same(kind):
    model = build(kind)
    plain = logits(model, kind)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    randomise(inject_lora(model, LoRAConfig(r=2, alpha=3, rslora=True)))
    unmerged = logits(model, kind)
    assert (unmerged - plain).abs().max() > 1e-3
    merge_adapters(model)
    assert all(layer.merged for layer in model.modules() if isinstance(layer, DPLoRALinear))
    torch.testing.assert_close(logits(model, kind), unmerged, rtol=1e-4, atol=1e-5)
    unmerge_adapters(model)
    torch.testing.assert_close(logits(model, kind), unmerged, rtol=1e-4, atol=1e-5)
    state = model.state_dict()
    assert all(torch.allclose(state[name], weight, atol=1e-5) for name, weight in weights.items())


def test_half_a_merge_is_not_saved(tmp_path):
    model = adapted("llama")
    next(module for module in model.modules() if isinstance(module, DPLoRALinear)).merge()
    with pytest.raises(ValueError, match="Some adapters of the model are merged"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("kind", KINDS)
def test_unloaded_it_is_an_ordinary_model_that_says_the_same(kind):
    model = build(kind)
    classes = {name: type(module) for name, module in model.named_modules()}
    randomise(inject_lora(model, LoRAConfig(r=2, trainable_modules=[HEADS[kind]], bias="all")))
    make_private(model, batch_size=2)
    expected = logits(model.eval(), kind)
    plain = merge_and_unload(model)
    assert plain is model
    found = {name: type(module) for name, module in plain.named_modules()}
    # timm's own kinds of layers compute what torch's do, and are torch's now.
    assert {name: kind for name, kind in found.items() if "timm" not in classes[name].__module__} == {
        name: kind for name, kind in classes.items() if "timm" not in kind.__module__
    }
    assert not any("lora" in name for name, _ in plain.named_parameters())
    torch.testing.assert_close(logits(plain, kind), expected, rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert not plain._forward_pre_hooks
    assert not plain._forward_hooks
    if hasattr(plain, "save_pretrained"):
        assert "save_pretrained" not in vars(plain)


def test_a_model_in_half_precision_stays_one_when_unloaded():
    model = build("llama").bfloat16()
    randomise(inject_lora(model, LoRAConfig(r=2, trainable_modules=["score"], bias="all")))
    assert model.score.weight.dtype == torch.float32
    assert {p.dtype for p in merge_and_unload(model).parameters()} == {torch.bfloat16}
    assert logits(model, "llama").isfinite().all()


def test_a_layer_by_itself_is_replaced():
    layer = DPLoRALinear(4, 3, r=2)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 4)
    expected = layer(x)
    torch.testing.assert_close(merge_and_unload(layer)(x), expected)


def test_pefts_model_has_its_own():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"call model\.merge_and_unload\(\)"):
        merge_and_unload(model)
