"""Adapters and private layers put into models: what is trained, what stays as it was, and what is refused."""

import copy

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from lora_dp import DPEmbedding, DPLayerNorm, DPLinear, DPLoRALinear, LoRAConfig, inject_lora
from lora_dp.lora.merging import merge_adapters
from tests.lora.adapted_models import adapted, linear, of, trainable
from tests.tiny_models import HEADS, KINDS, TARGETS, TEXT, build, logits


def fingerprint(model: nn.Module) -> tuple[list[tuple[str, type]], list[tuple[str, bool]]]:
    modules = [(name, type(module)) for name, module in model.named_modules()]
    return modules, [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_injection_changes_nothing_but_what_is_trained(kind):
    plain = build(kind)
    model = copy.deepcopy(plain)
    assert inject_lora(model, LoRAConfig(r=2, target_modules=TARGETS[kind], trainable_modules=[HEADS[kind]])) is model
    assert adapted(model) == {
        name for name in linear(plain) if name.endswith(tuple(f".{target}" for target in TARGETS[kind]))
    }
    before, after = plain.state_dict(), model.state_dict()
    factors = {f"{name}.{factor}" for name in adapted(model) for factor in ("lora_A", "lora_B")}
    assert set(after) == set(before) | factors
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert trainable(model) == factors | {name for name in after if name.startswith(HEADS[kind])}
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(logits(model, kind), logits(plain, kind), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "name", "private"),
    [
        ("timm_vit", "norm", DPLayerNorm),
        ("vit", "vit.layernorm", DPLayerNorm),
        ("gpt2", "wte", DPEmbedding),
        ("roberta", "word_embeddings", DPEmbedding),
        ("gpt2", "h.0.mlp.c_fc", DPLinear),
    ],
)
def test_trained_modules_become_private_and_compute_the_same(kind, name, private):
    model = build(kind)
    plain = logits(model, kind)
    inject_lora(model, LoRAConfig(r=2, trainable_modules=[name]))
    roots = [n for n, m in model.named_modules() if f".{n}".endswith(f".{name}") and not isinstance(m, nn.Identity)]
    assert roots and all(isinstance(model.get_submodule(root), private) for root in roots)
    assert trainable(model) - of(model, "lora_A", "lora_B") == {
        n for n, _ in model.named_parameters() if n.rpartition(".")[0] in roots
    }
    torch.testing.assert_close(logits(model, kind), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_trained_biases(bias):
    plain = build("vit")
    model = inject_lora(copy.deepcopy(plain), LoRAConfig(r=2, target_modules=["q_proj"], bias=bias))
    expected = {"none": set(), "lora_only": of(plain, "q_proj.bias"), "all": of(plain, ".bias")}[bias]
    expected -= {"vit.embeddings.patch_embeddings.projection.bias"}  # a convolution's
    assert trainable(model) - of(model, "lora_A", "lora_B") == expected
    torch.testing.assert_close(logits(model, "vit"), logits(plain, "vit"), rtol=1e-5, atol=1e-6)


def test_mode_dtype_and_device_stay():
    """But what is trained is kept in float32, as PEFT keeps its factors."""
    model = build("roberta").to(torch.bfloat16).train()
    model.roberta.encoder.layer[1].eval()
    inject_lora(model, LoRAConfig(r=2, trainable_modules=["classifier"]))
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {torch.bfloat16}
    for name, module in model.named_modules():
        assert module.training == ("encoder.layer.1" not in name), name
    with torch.device("meta"):
        blocks = nn.Sequential(nn.Linear(4, 4))
    inject_lora(blocks, LoRAConfig(r=2))
    assert blocks[0].lora_A.is_meta and blocks[0].lora_B.is_meta


class Twice(nn.Module):
    """One linear layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), self.first])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](self.first(x)))


@pytest.mark.parametrize("target", ["first", "1"])
def test_a_shared_layer_is_replaced_by_one_layer(target):
    model = inject_lora(Twice(), LoRAConfig(r=2, target_modules=[target]))
    assert isinstance(model.first, DPLoRALinear) and model.blocks[1] is model.first
    assert type(model.blocks[0]) is nn.Linear
    model = inject_lora(Twice(), LoRAConfig(r=2, target_modules=["0"], trainable_modules=[target]))
    assert isinstance(model.first, DPLinear) and model.blocks[1] is model.first


def test_tied_weights_are_not_trained_and_not_merged():
    config = tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, **TEXT)
    for name in ("lm_head", "wte"):
        with pytest.raises(ValueError, match=r"'transformer\.wte\.weight' and 'lm_head\.weight' are one parameter"):
            inject_lora(tf.GPT2LMHeadModel(config), LoRAConfig(r=2, trainable_modules=[name]))
    model = inject_lora(tf.GPT2LMHeadModel(config), LoRAConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"'lm_head' shares its weight with 'transformer\.wte'.*untie"):
        merge_adapters(model)
    assert not model.lm_head.merged


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "roberta",
            {"target_modules": ["query", "vaule"]},
            r"no Linear or Conv1D is named 'vaule'; did you mean 'value'",
        ),
        ("roberta", {"target_modules": ["self.qerry"]}, r"'self\.qerry'; did you mean 'self\.query'"),
        ("roberta", {"target_modules": "query"}, r"regular expression for full names; for a name write \['query'\]"),
        ("gpt2", {"target_modules": ["blocks"]}, r"'blocks'; there are 'c_attn', 'c_fc', 'c_proj', 'score'\."),
        (
            "vit",
            {"target_modules": ["projection"]},
            r"no Linear or Conv1D is named 'projection'; did you mean '._proj'",
        ),
        ("vit", {"trainable_modules": ["clasifier"]}, r"no module is named 'clasifier'; did you mean 'classifier'"),
        ("roberta", {"trainable_modules": ["dropout"]}, "'dropout' has no parameters to train"),
        (
            "roberta",
            {"target_modules": ["out_proj"], "trainable_modules": ["classifier"]},
            "'out_proj' lies within trainable_modules",
        ),
        ("vit", {"trainable_modules": ["projection"]}, r"'vit.*projection' cannot.*covers weight, bias of a Conv2d"),
        ("vit", {"trainable_modules": ["embeddings"]}, r"'vit\.embeddings'.*covers cls_token, position_embeddings"),
        ("llama", {"trainable_modules": ["norm"]}, r"'model\.norm'.*covers weight of a LlamaRMSNorm"),
        (
            "llama",
            {"r": 9, "target_modules": ["q_proj", "k_proj"]},
            r"Rank 9 is above the size of 'model\.layers\.0\.self_attn\.k_proj' \(16 → 8\): choose r ≤ 8",
        ),
        ("roberta", {"r": 17}, "Rank 17 is above the size of 'roberta"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_leaves_the_model_alone(kind, settings, message):
    model = build(kind)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        inject_lora(model, LoRAConfig(**({"r": 2} | settings)))
    assert fingerprint(model) == before
    assert not hasattr(model, "lora_config")


def test_an_adapted_model_is_not_adapted_again():
    model = inject_lora(build("roberta"), LoRAConfig(r=2))
    with pytest.raises(ValueError, match=r"adapters already \(at 'roberta"):
        inject_lora(model, LoRAConfig(r=2))


def test_a_layer_norm_over_more_dimensions_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm((3, 4)))
    with pytest.raises(ValueError, match=r"'1' cannot be trained in private: .*\(3, 4\)"):
        inject_lora(model, LoRAConfig(r=2, trainable_modules=["1"]))
    assert trainable(inject_lora(model, LoRAConfig(r=2, bias="all"))) == {"0.lora_A", "0.lora_B", "0.bias"}
