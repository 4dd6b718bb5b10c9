"""A model with PEFT's adapters is made private as it stands: oracles, what PEFT does with it after, and refusals."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_dp import LoRAConfig, PrivacyEngine, inject_lora
from lora_dp.lora.peft_layers import DPPeftLinear, adopt_peft_layers
from lora_dp.nn.layers import DPLayerNorm, DPLinear
from tests.language_models import (
    ATTENTION,
    FAMILIES,
    adapted_causal_lm,
    causal_lm,
    completions,
    losses_of,
    one_loss,
    stacked,
)
from tests.models import assert_refuses
from tests.support import brute_force, clip_and_sum, make_private

peft = pytest.importorskip("peft")

ROWS = completions(6)


def adapted(family: str = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    return adapted_causal_lm(family, dtype, **options)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def private_sum(model: nn.Module, rows: list[dict[str, Tensor]], bound: float, **options: Any) -> dict[str, Tensor]:
    """Σᵢ cᵢ gᵢ of one private step without noise, by what SGD with rate 1 moved."""
    optimizer = make_private(model, batch_size=len(rows), max_grad_norm=bound, **options)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.batch.expect(len(rows))
    optimizer.backward(losses_of(model, stacked(rows)))
    optimizer.step()
    return {name: (before[name] - p.detach()) * len(rows) for name, p in model.named_parameters() if p.requires_grad}


def assert_sums(model: nn.Module, rows: list[dict[str, Tensor]], share: float = 1.0) -> None:
    """The private step of ``model`` against brute force, at a bound that clips about half of the examples."""
    gradients = brute_force(model, one_loss, rows, trained(model))
    norms = sorted(sum(float(g.square().sum()) for g in each.values()) ** 0.5 for each in gradients)
    bound = share * norms[len(norms) // 2]
    expected = clip_and_sum(gradients, "flat", bound, lambda name: name)
    found = private_sum(model, rows, bound)
    assert found.keys() == expected.keys()
    for name in expected:
        # C is kept with a margin of 2⁻¹⁹.
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-5 * bound, msg=name)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_single_texts_are_those_of_brute_force(family: str, side: str) -> None:
    assert_sums(adapted(family), completions(6, side=side))


@pytest.mark.parametrize("family", FAMILIES)
def test_and_so_are_those_of_injected_adapters(family: str) -> None:
    model = inject_lora(causal_lm(family), LoRAConfig(r=3, alpha=6, target_modules=ATTENTION[family]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    assert_sums(model.train(), ROWS)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"0.self_attn.q_proj": 1}, "alpha_pattern": {"v_proj": 20}},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["lm_head"], "bias": "all"},
        {"init_lora_weights": "pissa"},
        {"layers_to_transform": [1]},
        {"target_modules": "all-linear"},
        {"exclude_modules": ["k_proj"], "target_modules": ["q_proj", "k_proj"]},
    ],
    ids=lambda options: "-".join(options),
)
def test_settings_of_lora(options: dict[str, Any]) -> None:
    if options.get("init_lora_weights") == "pissa":  # which PEFT computes in float32
        model = peft.get_peft_model(
            causal_lm("llama", torch.float32), peft.LoraConfig(r=3, target_modules=["q_proj"], **options)
        ).double()
    else:
        model = adapted(**options)
    assert_sums(model, ROWS)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_prompts_that_are_one_for_a_whole_batch_are_refused(kind: str) -> None:
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(causal_lm("llama"), config)
    with pytest.raises(ValueError, match=r"PEFT's P.*_TUNING, whose .*: take PrefixTuningConfig, or LoraConfig"):
        make_private(model, batch_size=6)


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_tuning_gives_every_text_its_own_row_of_prefixes(family: str, projected: bool) -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=projected)
    assert_sums(peft.get_peft_model(causal_lm(family), config).double().train(), ROWS)


def test_biases_alone_of_adapted_layers() -> None:
    assert_sums(adapted("gpt2", bias="lora_only"), ROWS)


def test_several_adapters_the_trained_beside_a_frozen_one() -> None:
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "other" in name and "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    model.double()
    model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        if "other" in name:
            parameter.requires_grad_(False)
    assert not any("other" in name for name in trained(model))
    with_both = losses_of(model, stacked(ROWS)).detach()
    assert_sums(model, ROWS)
    model.base_model.set_adapter("default")
    assert not torch.allclose(with_both, losses_of(model.eval(), stacked(ROWS)).detach())  # the frozen one counted


def test_phases_train_one_factor() -> None:
    moved = private_sum(adapted(), ROWS, 1.0, phases="B")
    assert {name.split(".")[-3] for name, change in moved.items() if change.any()} == {"lora_B"}


def test_masks_of_dropout_are_drawn_and_scaled() -> None:
    model = adapted(lora_dropout=0.5)
    adopt_peft_layers(model)
    plain = {id(layer): copy.deepcopy(layer.lora_dropout) for layer in model.modules() if type(layer) is DPPeftLinear}
    assert plain
    make_private(model, batch_size=6)
    first, second = losses_of(model, stacked(ROWS)), losses_of(model, stacked(ROWS))
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(losses_of(model, stacked(ROWS)), losses_of(model, stacked(ROWS)))


def test_forwards_are_pefts_without_an_engine_and_after_training() -> None:
    model = adapted()
    before = losses_of(model, stacked(ROWS)).detach()
    adopt_peft_layers(model)
    assert torch.equal(losses_of(model, stacked(ROWS)).detach(), before)
    assert any(type(module) is DPPeftLinear for module in model.modules())
    adopt_peft_layers(model)  # twice does no harm


def test_what_peft_does_with_a_trained_model(tmp_path: Path) -> None:
    model = adapted(dtype=torch.float32, modules_to_save=["lm_head"])
    base = copy.deepcopy(model.get_base_model().state_dict())
    assert type(model.base_model.model.lm_head.modules_to_save["default"]) is nn.Linear
    private_sum(model, ROWS, 1.0)
    assert type(model.base_model.model.lm_head.modules_to_save["default"]) is DPLinear
    model.eval()
    expected = losses_of(model, stacked(ROWS)).detach()

    with torch.no_grad(), model.disable_adapter():
        plain = losses_of(model, stacked(ROWS))
    assert not torch.allclose(plain, expected)
    assert torch.equal(losses_of(model, stacked(ROWS)).detach(), expected)

    model.save_pretrained(tmp_path)
    opened = peft.PeftModel.from_pretrained(causal_lm("llama", torch.float32), tmp_path).eval()
    torch.testing.assert_close(losses_of(opened, stacked(ROWS)).detach(), expected)

    model.merge_adapter()
    torch.testing.assert_close(losses_of(model, stacked(ROWS)).detach(), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    torch.testing.assert_close(losses_of(merged, stacked(ROWS)).detach(), expected, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert base.keys() > set()


def test_the_optimizer_may_be_older_than_the_private_layers() -> None:
    model = adapted(modules_to_save=["lm_head"])
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    held = {id(p) for group in sgd.param_groups for p in group["params"]}
    adopt_peft_layers(model)
    assert {id(p) for p in model.parameters() if p.requires_grad} == held


def test_layer_norms_that_are_saved_whole() -> None:
    model = adapted("gpt2", modules_to_save=["ln_f"])
    adopt_peft_layers(model)
    assert any(isinstance(module, DPLayerNorm) for module in model.modules())


def test_a_merged_adapter_and_adapters_by_example_are_refused_in_training() -> None:
    model = adapted()
    make_private(model, batch_size=6)
    with torch.no_grad():
        model.merge_adapter()
    assert_refuses(RuntimeError, "call unmerge_adapter", lambda: losses_of(model, stacked(ROWS)))
    model.unmerge_adapter()
    layer = next(module for module in model.modules() if type(module) is DPPeftLinear)
    layer.recorder.open(2)
    assert_refuses(
        ValueError, "leave them out", lambda: layer(torch.zeros(2, 16).double(), adapter_names=["default", "__base__"])
    )


def test_an_adapter_that_comes_later_is_not_trained_unclipped() -> None:
    model = adapted()
    optimizer = make_private(model, batch_size=6)
    model.add_adapter("late", peft.LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    model.double()
    model.set_adapter("late")

    def step() -> None:
        optimizer.batch.expect(6)
        optimizer.backward(losses_of(model, stacked(ROWS)))
        optimizer.step()

    with pytest.raises((RuntimeError, ValueError)):
        step()
    assert optimizer.ledger.steps == 0


@pytest.mark.parametrize(
    "config, named",
    [
        (lambda: peft.LoraConfig(target_modules=["q_proj"], use_dora=True), "has PEFT's DoRA"),
        (lambda: peft.LoraConfig(target_modules=["q_proj"], lora_bias=True), r"lora_bias=True"),
        (lambda: peft.LoraConfig(target_modules=["embed_tokens", "q_proj"]), "is PEFT's lora.layer.Embedding"),
        (lambda: peft.VeraConfig(target_modules=["q_proj"], r=4), "is PEFT's vera"),
        (lambda: peft.LoHaConfig(target_modules=["q_proj"], r=4), "is PEFT's loha"),
        (lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "is PEFT's ia3"),
        (
            lambda: peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3]}),
            "TrainableTokens",
        ),
        (lambda: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]), "LlamaRMSNorm"),
    ],
    ids=["dora", "lora-bias", "embedding", "vera", "loha", "ia3", "tokens", "rms-norm"],
)
def test_what_has_no_gradient_of_single_examples_is_refused_by_name(config: Any, named: str) -> None:
    model = peft.get_peft_model(causal_lm("llama", torch.float32), config())
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=named):
        make_private(model, batch_size=6)
    assert [type(module) for module in model.modules()] == kinds


def test_lora_on_a_convolution_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2))
    model = peft.get_peft_model(net, peft.LoraConfig(r=1, target_modules=["0"]))
    assert_refuses(ValueError, "is PEFT's lora.layer.Conv2d", lambda: make_private(model, batch_size=2))


def test_regulated_noise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"regulate_noise works with adapters of inject_lora"):
        make_private(adapted(), batch_size=6, phases="B", regulate_noise=True)


def test_the_model_beneath_pefts_is_taken_too() -> None:
    model = adapted()
    assert_sums(model.base_model.model, ROWS)


def test_a_copy_is_to_be_made_private_itself() -> None:
    model = adapted()
    make_private(model, batch_size=6)
    twin = copy.deepcopy(model)
    assert_refuses(RuntimeError, "copy of a private model", lambda: losses_of(twin, stacked(ROWS)))
    assert PrivacyEngine().ledger.steps == 0
