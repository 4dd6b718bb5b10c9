"""Round trips with PEFT over architectures and settings, and PEFT's own custom models: the same outputs both ways."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_dp import DPLoRALinear, LoRAConfig, inject_lora, load_adapter, merge_adapters, save_adapter
from lora_dp.lora.adapters import adapter_state
from tests.tiny_models import build as build_classifier
from tests.tiny_models import randomise

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}


class Mlp(nn.Module):
    """PEFT's first custom model: layers in a list, with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.relu, self.drop = nn.Linear(10, 20), nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.layers = nn.ModuleList([nn.Linear(20, 20, bias=False), nn.Linear(20, 20)])
        self.norm, self.lin1 = nn.LayerNorm(20), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.relu(self.lin0(x)))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.lin1(self.norm(x))


class EmbConv1D(nn.Module):
    """An embedding before GPT-2's transposed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv1d, self.lin0 = nn.Embedding(100, 5), Conv1D(7, 5), nn.Linear(7, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lin0(torch.relu(self.conv1d(self.emb(ids)))).mean(1)


class ConvNet(nn.Module):
    """A convolution and a layer of the same name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.block = nn.ModuleDict({"conv": nn.Linear(4, 4), "lin": nn.Linear(4, 2)})

    def forward(self, x: Tensor) -> Tensor:
        return self.block["lin"](torch.tanh(self.block["conv"](self.conv(x).mean((2, 3)))))


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "bert":
        model: nn.Module = tf.BertForSequenceClassification(
            tf.BertConfig(vocab_size=40, max_position_embeddings=20, num_labels=3, **SMALL)
        )
    elif kind == "t5":
        model = tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=20, num_layers=2, num_heads=2, decoder_start_token_id=0)
        )
    elif kind == "llama_lm":
        model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=40, num_key_value_heads=1, **SMALL))
    elif kind in CUSTOM:
        model = CUSTOM[kind]()
    else:
        return build_classifier(kind)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


CUSTOM = {"mlp": Mlp, "emb_conv1d": EmbConv1D, "conv_net": ConvNet}
# Layers to adapt and a module to train whole.
PLACES: dict[str, tuple[list[str], str]] = {
    "llama": (["q_proj", "up_proj"], "score"),
    "llama_lm": (["v_proj", "down_proj"], "lm_head"),
    "gpt2": (["c_attn", "c_fc"], "score"),
    "bert": (["query", "dense"], "classifier"),
    "t5": (["q", "wo", "EncDecAttention.o"], "layer.0.SelfAttention.k"),
    "vit": (["q_proj", "fc2"], "classifier"),
    "mlp": (["lin0", "layers.1"], "lin1"),
    "emb_conv1d": (["conv1d"], "emb"),
    "conv_net": (["block.conv"], "lin"),
}


@torch.no_grad()
def outputs(model: nn.Module, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 40, (2, 7), generator=generator)
    if kind == "t5":
        return model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits
    if kind in ("vit", "conv_net", "mlp"):
        shape = {"vit": (2, 1, 16, 16), "conv_net": (2, 1, 5, 5), "mlp": (3, 10)}[kind]
        out = model(torch.randn(*shape, generator=generator))
    else:
        out = model(ids)
    return getattr(out, "logits", out)


def assert_same(actual: nn.Module, expected: nn.Module, kind: str) -> None:
    wanted = outputs(expected, kind)
    assert (wanted - outputs(build(kind), kind)).abs().max() > 1e-2, "the adapter does nothing"
    torch.testing.assert_close(outputs(actual, kind), wanted, rtol=1e-4, atol=1e-4)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"whole": True},
    {"alpha": 3, "rslora": True},
    {"bias": "lora_only"},
    {"bias": "all"},
    {"bias": "all", "whole": True, "alpha": 0.5, "dropout": 0.1},
    {"bias": "lora_only", "whole": True, "rslora": True},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s) or "plain")
@pytest.mark.parametrize("kind", PLACES)
def test_both_ways(kind, settings, tmp_path: Path):
    settings = dict(settings)
    targets, head = PLACES[kind]
    whole = [head] if settings.pop("whole", False) else []
    ours = randomise(
        inject_lora(build(kind), LoRAConfig(r=2, target_modules=targets, trainable_modules=whole, **settings))
    )
    save_adapter(ours, tmp_path / "ours")
    assert_same(peft.PeftModel.from_pretrained(build(kind), tmp_path / "ours").eval(), ours, kind)
    assert_same(load_adapter(build(kind), tmp_path / "ours"), ours, kind)

    theirs = randomise(
        peft.get_peft_model(
            build(kind),
            peft.LoraConfig(
                r=2,
                target_modules=targets,
                modules_to_save=whole or None,
                lora_alpha=settings.get("alpha", 2),
                lora_dropout=settings.get("dropout", 0.0),
                use_rslora=settings.get("rslora", False),
                bias=settings.get("bias", "none"),
            ),
        ).eval()
    )
    if kind == "conv_net" and settings.get("bias") == "all":
        assert theirs.base_model.model.conv.bias.requires_grad  # which we keep, frozen
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_adapter(build(kind), tmp_path / "theirs")
    assert_same(loaded, theirs, kind)
    # What was loaded and saved again is what PEFT had saved.
    save_adapter(loaded, tmp_path / "again")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "again"))
    assert after.keys() <= before.keys() and all(torch.equal(after[key], before[key]) for key in after)
    merge_adapters(loaded)
    assert_same(loaded, theirs, kind)


@pytest.mark.parametrize("kind", PLACES)
def test_a_state_round_trip(kind):
    """As a federation exchanges it: into a model with the same adapters, and nothing else moves."""
    targets, head = PLACES[kind]
    config = LoRAConfig(r=2, target_modules=targets, trainable_modules=[head], bias="all")
    source, target = randomise(inject_lora(build(kind), config)), inject_lora(build(kind), config)
    target.load_state_dict(source.state_dict())
    assert torch.equal(outputs(target, kind), outputs(source, kind))
    assert all(torch.equal(tensor, adapter_state(target)[name]) for name, tensor in adapter_state(source).items())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rank_pattern": {"q_proj": 1}}, "rank_pattern={'q_proj': 1}"),
        ({"alpha_pattern": {"q_proj": 9}}, "alpha_pattern={'q_proj': 9}"),
        ({"use_dora": True}, "use_dora=True"),
        ({"layers_to_transform": [0]}, r"layers_to_transform=\[0\]"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, "exclude_modules="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication="),
        ({"target_parameters": ["mlp.up_proj.weight"]}, "target_parameters="),
    ],
)
def test_what_peft_wrote_with_an_unknown_option_is_refused_by_its_name(settings, named, tmp_path):
    plain = build("llama")
    theirs = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(r=2, target_modules=["q_proj"], **settings))
    theirs.save_pretrained(tmp_path)
    names = list(plain.state_dict())
    with pytest.raises(ValueError, match=f"{named}.*is not supported"):
        load_adapter(plain, tmp_path)
    assert list(plain.state_dict()) == names


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_plain_initialisations(init, tmp_path):
    theirs = randomise(
        peft.get_peft_model(build("mlp"), peft.LoraConfig(r=2, target_modules=["lin0"], init_lora_weights=init)).eval()
    )
    theirs.save_pretrained(tmp_path)
    assert_same(load_adapter(build("mlp"), tmp_path), theirs, "mlp")


def test_an_adapted_convolution_is_refused_by_name(tmp_path):
    theirs = peft.get_peft_model(build("conv_net"), peft.LoraConfig(r=2, target_modules=["conv"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapters lack: 'base_model\.model\.conv\.lora_A\.weight'"):
        load_adapter(build("conv_net"), tmp_path)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", {"lin0", "layers.0", "layers.1", "lin1"}),
        (r"layers\.\d", {"layers.0", "layers.1"}),
        (r"(lin0|.*\.1)", {"lin0", "layers.1"}),
        (["0", "lin1"], {"layers.0", "lin1"}),
    ],
)
def test_ways_to_name_layers_are_pefts(targets, expected):
    ours = inject_lora(build("mlp"), LoRAConfig(r=2, target_modules=targets))
    theirs = peft.get_peft_model(build("mlp"), peft.LoraConfig(r=2, target_modules=targets))
    found = {name for name, module in ours.named_modules() if isinstance(module, DPLoRALinear)}
    assert (
        found
        == expected
        == {
            name.removeprefix("base_model.model.")
            for name, module in theirs.named_modules()
            if hasattr(module, "lora_A")
        }
    )
