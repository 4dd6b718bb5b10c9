"""Adapters put into models, merged, and exchanged; whatever does not fit is refused by name."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from lora_dp import DPEmbedding, DPLayerNorm, DPLinear, DPLoRALinear, LoRAConfig, inject_lora
from lora_dp.lora.adapters import adapter_state, load_adapter_state
from lora_dp.lora.merging import merge_adapters, unmerge_adapters
from tests.tiny_models import HEADS, KINDS, TARGETS, TEXT, build, logits, randomise


def adapted(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, DPLoRALinear)}


def linear(model: nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def of(model: nn.Module, *endings: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.endswith(endings)}


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


def test_adapter_state_goes_from_one_model_to_another():
    config = LoRAConfig(r=2, trainable_modules=["classifier"], bias="lora_only")
    source, target = (inject_lora(build("roberta"), config) for _ in range(2))
    randomise(source)
    state = adapter_state(source)
    assert set(state) == trainable(source)
    load_adapter_state(target, state)
    assert torch.equal(logits(source, "roberta"), logits(target, "roberta"))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, adapter_state(target)[name]) for name, tensor in state.items()), "it shares memory"


def test_adapter_state_holds_both_factors_even_if_one_is_frozen():
    model = inject_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2))
    model[0].lora_A.requires_grad_(False)
    assert set(adapter_state(model)) == {"0.lora_A", "0.lora_B"}


def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded():
    model = inject_lora(nn.Sequential(nn.Linear(4, 5)), LoRAConfig(r=2))
    before = adapter_state(model)
    ones = {name: torch.ones_like(tensor) for name, tensor in before.items()}
    with pytest.raises(ValueError, match=r"lacks '0\.lora_B'"):
        load_adapter_state(model, {"0.lora_A": ones["0.lora_A"]})
    with pytest.raises(ValueError, match=r"model's adapters lack: '1\.lora_A'"):
        load_adapter_state(model, ones | {"1.lora_A": torch.ones(1)})
    with pytest.raises(ValueError, match=r"'0\.lora_B' with shape \(5, 3\) where the model needs \(5, 2\)"):
        load_adapter_state(model, ones | {"0.lora_B": torch.ones(5, 3)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state(model).items())
    merge_adapters(model)
    with pytest.raises(ValueError, match="'0' is merged: call unmerge_adapters"):
        load_adapter_state(model, ones)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be a whole number of at least 1, got 0"),
        ({"r": -2}, "at least 1, got -2"),
        ({"r": 1.5}, "whole number"),
        ({"alpha": 0}, "alpha must be above 0, got 0"),
        ({"alpha": -1.0}, "alpha must be"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"dropout": 1}, r"dropout must lie in \[0, 1\), got 1"),
        ({"dropout": -0.1}, "dropout must"),
        ({"bias": "some"}, "'none', 'all' or 'lora_only', got 'some'"),
        ({"target_modules": []}, "is empty"),
        ({"target_modules": ""}, "is empty"),
        ({"target_modules": [""]}, "is empty"),
        ({"trainable_modules": [""]}, "is empty"),
        ({"target_modules": "("}, "no regular expression"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**settings)


@pytest.mark.parametrize("setting", ["target_modules", "trainable_modules"])
@pytest.mark.parametrize("given", [None, 5, [None], ["query", 3], True, iter(["query"]), b"query"])
def test_names_are_a_list_of_names(setting, given):
    with pytest.raises(TypeError, match=f"^{setting} must be a list of names, got .*: .*\\.$") as refusal:
        LoRAConfig(**{setting: given})
    assert str(refusal.value).count(". ") == 0


@pytest.mark.parametrize("given", [("query", "value"), {"query": 1, "value": 2}.keys(), frozenset(["query", "value"])])
def test_any_collection_of_names_will_do(given):
    assert sorted(LoRAConfig(target_modules=given).target_modules) == ["query", "value"]


def test_trainable_modules_is_a_list():
    with pytest.raises(TypeError, match=r"write \['classifier'\]"):
        LoRAConfig(trainable_modules="classifier")


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


def test_a_layer_norm_over_more_dimensions_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm((3, 4)))
    with pytest.raises(ValueError, match=r"'1' cannot be trained in private: .*\(3, 4\)"):
        inject_lora(model, LoRAConfig(r=2, trainable_modules=["1"]))
    assert trainable(inject_lora(model, LoRAConfig(r=2, bias="all"))) == {"0.lora_A", "0.lora_B", "0.bias"}


def test_transformers_is_not_imported_for_a_model_without_it():
    code = (
        "import sys; from torch import nn; from lora_dp import LoRAConfig, inject_lora; "
        "inject_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2)); "
        "sys.exit('transformers' in sys.modules or 'timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
