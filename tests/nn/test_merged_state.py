"""The state of merged layers: that of plain ones, and never loaded where an adapter would count twice."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from lora_dp import DPLoRALinear, LoRAConfig, inject_lora, merge_adapters, unmerge_adapters
from tests.lora.merged_files import adapted, opened
from tests.tiny_models import KINDS, build, logits

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


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


def test_a_merged_layer_saves_what_a_plain_one_would():
    """Its weight with the adapter in it, and no factors beside: nowhere may the adapter count twice."""
    torch.manual_seed(0)
    layer, plain = DPLoRALinear(6, 5, r=2).double(), nn.Linear(6, 5).double()
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = layer(x)
    layer.merge()
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(plain(x), expected)
    layer.load_state_dict(layer.state_dict())
    assert layer.merged
    torch.testing.assert_close(layer(x), expected)
