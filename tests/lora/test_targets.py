"""Which layers get an adapter: by their names, and by whether they are linear layers that are called."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from lora_dp import DPLinear, LoRAConfig, inject_lora
from tests.lora.adapted_models import adapted, linear, of, trainable
from tests.tiny_models import HEADS, KINDS, build


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_leaves_the_output_head_frozen(kind):
    plain = build(kind)
    heads = {name for name in linear(plain) if name == HEADS[kind] or name.startswith(f"{HEADS[kind]}.")}
    assert heads
    model = inject_lora(copy.deepcopy(plain), LoRAConfig(r=2))
    assert adapted(model) == linear(plain) - heads
    assert trainable(model) == of(model, "lora_A", "lora_B")
    model = inject_lora(copy.deepcopy(plain), LoRAConfig(r=2, trainable_modules=[HEADS[kind]]))
    assert adapted(model) == linear(plain) - heads
    assert all(isinstance(model.get_submodule(name), DPLinear) for name in heads)


def test_all_linear_leaves_output_embeddings_frozen_as_peft_does():
    model = tf.LlamaForCausalLM(
        tf.LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, vocab_size=40)
    )
    assert "lm_head" not in adapted(inject_lora(model, LoRAConfig(r=2)))
    assert adapted(inject_lora(tf.LlamaForCausalLM(model.config), LoRAConfig(r=2, target_modules=["lm_head"]))) == {
        "lm_head"
    }


def test_a_regular_expression_is_matched_against_the_whole_name():
    model = inject_lora(build("roberta"), LoRAConfig(r=2, target_modules=r".*layer\.1\..*\.(query|key)"))
    assert adapted(model) == {f"roberta.encoder.layer.1.attention.self.{name}" for name in ("query", "key")}


def test_a_name_matches_from_dot_to_dot():
    model = inject_lora(build("roberta"), LoRAConfig(r=2, target_modules=["output.dense"]))
    assert adapted(model) == {
        f"roberta.encoder.layer.{i}.{part}" for i in (0, 1) for part in ("attention.output.dense", "output.dense")
    }


def test_a_trained_module_is_never_adapted():
    model = inject_lora(build("roberta"), LoRAConfig(r=2, target_modules=["dense"], trainable_modules=["classifier"]))
    assert isinstance(model.classifier.dense, DPLinear)
    assert "roberta.encoder.layer.0.output.dense" in adapted(model)


def test_a_convolution_of_the_same_name_is_left_alone():
    model = inject_lora(build("timm_vit"), LoRAConfig(r=2, target_modules=["proj"]))
    assert adapted(model) == {"blocks.0.attn.proj", "blocks.1.attn.proj"}
    assert isinstance(model.patch_embed.proj, nn.Conv2d) and not model.patch_embed.proj.weight.requires_grad


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Named(nn.Linear):
    pass


def test_layers_whose_forward_is_not_a_linear_layer_are_passed_over_or_refused():
    def make() -> nn.Sequential:
        hooked = nn.Linear(4, 4)
        hooked.forward = lambda x: 3 * F.linear(x, hooked.weight)
        normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        return nn.Sequential(nn.Linear(4, 4), Named(4, 4), Scaled(4, 4), hooked, normed, LayerNorm2d(4))

    model, x = make(), torch.randn(2, 4)
    plain = model[:5](x)
    inject_lora(model, LoRAConfig(r=2))
    assert adapted(model) == {"0", "1"}
    torch.testing.assert_close(model[:5](x), plain)
    for number, reason in (
        ("2", "Scaled has a forward of its own"),
        ("3", "Linear has a forward of its own"),
        ("4", "computed by a parametrization"),
    ):
        with pytest.raises(ValueError, match=f"'{number}' cannot carry an adapter, since .*{reason}"):
            inject_lora(make(), LoRAConfig(r=2, target_modules=[number]))
        with pytest.raises(ValueError, match=f"'{number}' cannot be trained in private, since .*{reason}"):
            inject_lora(make(), LoRAConfig(r=2, target_modules=["0"], trainable_modules=[number]))
    with pytest.raises(ValueError, match="'5' cannot be trained in private, since its class LayerNorm2d"):
        inject_lora(make(), LoRAConfig(r=2, trainable_modules=["5"]))


def test_layers_that_torch_reads_without_calling_are_refused():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.out = nn.Linear(8, 8)

    assert adapted(inject_lora(Block(), LoRAConfig(r=2))) == {"out"}
    for settings in ({"target_modules": ["out_proj"]}, {"trainable_modules": ["out_proj"]}):
        with pytest.raises(ValueError, match=r"'attention\.out_proj' cannot .* nn\.MultiheadAttention reads"):
            inject_lora(Block(), LoRAConfig(r=2, **settings))
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    with pytest.raises(ValueError, match=r"'layers\.0\.linear1' cannot carry .* in evaluation"):
        inject_lora(encoder, LoRAConfig(r=2, target_modules=["linear1"]))
    with pytest.raises(ValueError, match=r"no linear layer to adapt.*'layers\.0\.self_attn\.out_proj' is none"):
        inject_lora(encoder, LoRAConfig(r=2))


@pytest.mark.slow
def test_transformers_is_not_imported_for_a_model_without_it():
    code = (
        "import sys; from torch import nn; from lora_dp import LoRAConfig, inject_lora; "
        "inject_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2)); "
        "sys.exit('transformers' in sys.modules or 'timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["query", "value"], "layers_to_transform": [1]},
        {"target_modules": ["query", "value", "dense"], "exclude_modules": ["output.dense", "value"]},
        {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
        {"target_modules": ["dense"], "layers_to_transform": 0, "exclude_modules": ["attention.output.dense"]},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_what_is_left_out_is_what_peft_leaves_out(settings):
    settings = {"modules_to_save": ["classifier"], **settings}
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(build("roberta"), peft.LoraConfig(r=2, **settings))
    prefix = "base_model.model."
    expected = {
        name.removeprefix(prefix)
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    assert expected
    assert adapted(inject_lora(build("roberta"), LoRAConfig(r=2, **settings))) == expected
    given = peft.LoraConfig(r=2, **settings)  # itself
    assert adapted(inject_lora(build("roberta"), given)) == expected


def test_pefts_config_is_taken_with_all_it_says():
    peft = pytest.importorskip("peft")
    given = peft.LoraConfig(
        r=3, lora_alpha=6, lora_dropout=0.1, use_rslora=True, bias="lora_only", target_modules=["query"]
    )
    model = inject_lora(build("roberta"), given)
    assert model.lora_config == LoRAConfig(
        r=3, alpha=6, dropout=0.1, rslora=True, bias="lora_only", target_modules=["query"]
    )
    start = inject_lora(build("roberta"), peft.LoraConfig(target_modules=["query"], init_lora_weights="orthogonal"))
    assert start.lora_config.init_a == "orthonormal"


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"use_dora": True}, "The LoraConfig sets use_dora=True, which is not supported"),
        ({"rank_pattern": {"query": 1}}, "for patterns of ranks and scalings, give make_private the model of get_peft"),
        ({"target_modules": None}, "names no target_modules: name the layers, or give make_private the model of"),
        ({"init_lora_weights": "pissa"}, "give its model to make_private"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_of_pefts_config_is_not_plain_lora_is_named(settings, words):
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match=words):
        inject_lora(build("roberta"), peft.LoraConfig(**{"target_modules": ["query"], **settings}))


def test_another_kind_of_pefts_is_named():
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="PrefixTuningConfig describes a 'PREFIX_TUNING' adapter: only 'LORA'"):
        inject_lora(build("roberta"), peft.PrefixTuningConfig(num_virtual_tokens=3))


def test_names_to_leave_out_are_looked_up_too():
    with pytest.raises(ValueError, match=r"exclude_modules: no module is named 'valeu'; did you mean 'value'"):
        inject_lora(build("roberta"), LoRAConfig(r=2, exclude_modules=["valeu"]))
    with pytest.raises(ValueError, match="leave none of the layers that target_modules names"):
        inject_lora(build("roberta"), LoRAConfig(r=2, layers_to_transform=[7]))
