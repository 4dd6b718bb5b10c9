"""Layers whose weight is read without calling them: known ones are not adapted, all others are spoken of."""

import linecache
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers as tf
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.swin_transformer_v2 import WindowAttention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformer, SwinTransformerBlockV2

from lora_dp import DPEmbedding, DPLinear, DPLoRALinear, LoRAConfig, inject_lora
from lora_dp.losses import classification_loss
from tests.support import make_private

SMALL = {"hidden_size": 16, "num_hidden_layers": 1}


def mamba() -> nn.Module:
    return tf.MambaForCausalLM(tf.MambaConfig(vocab_size=40, state_size=4, time_step_rank=4, **SMALL))


def falcon_mamba() -> nn.Module:
    return tf.FalconMambaForCausalLM(tf.FalconMambaConfig(vocab_size=40, state_size=4, time_step_rank=4, **SMALL))


def mamba2() -> nn.Module:
    return tf.Mamba2ForCausalLM(
        tf.Mamba2Config(vocab_size=40, state_size=4, num_heads=4, head_dim=8, n_groups=1, chunk_size=4, **SMALL)
    )


def wavlm() -> nn.Module:
    return tf.WavLMModel(
        tf.WavLMConfig(
            num_attention_heads=2,
            intermediate_size=20,
            conv_dim=(8, 8),
            conv_stride=(2, 2),
            conv_kernel=(3, 3),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            **SMALL,
        )
    )


def adapted(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, DPLoRALinear)}


@pytest.mark.parametrize(
    ("build", "left_alone", "kept"),
    [
        (mamba, {"dt_proj", "x_proj", "out_proj"}, {"in_proj"}),
        (falcon_mamba, {"dt_proj", "x_proj", "out_proj"}, {"in_proj"}),
        (mamba2, {"out_proj"}, {"in_proj"}),
        (wavlm, {"q_proj", "k_proj", "v_proj", "out_proj"}, {"projection", "intermediate_dense", "output_dense"}),
        (lambda: BeitAttention(16, num_heads=2, qkv_bias=True), {"qkv"}, {"proj"}),
        (lambda: BeitAttention(16, num_heads=2, qkv_bias=False), set(), {"qkv", "proj"}),
        (lambda: EvaAttention(16, num_heads=2, qkv_bias=True, norm_layer=nn.LayerNorm), {"qkv"}, {"proj"}),
        (lambda: WindowAttention(16, window_size=(4, 4), num_heads=2), {"qkv"}, {"proj"}),
        (
            lambda: nn.ModuleList([ShiftedWindowAttention(16, [4, 4], [0, 0], 2), nn.Linear(4, 4)]),
            {"qkv", "proj"},
            {"1"},
        ),
    ],
)
def test_all_linear_passes_over_what_is_known(build, left_alone, kept):
    found = adapted(inject_lora(build(), LoRAConfig(r=2)))
    assert kept <= found and not found & left_alone


@pytest.mark.parametrize(
    ("build", "name", "reason"),
    [
        (mamba, "dt_proj", "MambaMixer reads"),
        (wavlm, "v_proj", "WavLMAttention reads"),
        (lambda: BeitAttention(16, num_heads=2, qkv_bias=True), "qkv", "Attention reads"),
    ],
)
def test_named_ones_are_refused(build, name, reason):
    for settings in ({"target_modules": [name]}, {"trainable_modules": [name]}):
        with pytest.raises(ValueError, match=f"{name}' cannot .*{reason} its weight without calling it"):
            inject_lora(build(), LoRAConfig(r=2, **settings))


IMAGES = {"num_classes": 3, "img_size": 32}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}


def deberta(share: bool, relative: bool = True) -> nn.Module:
    return tf.DebertaV2ForSequenceClassification(
        tf.DebertaV2Config(
            vocab_size=40,
            num_attention_heads=2,
            intermediate_size=20,
            relative_attention=relative,
            position_buckets=8,
            pos_att_type=["p2c", "c2p"],
            share_att_key=share,
            position_biased_input=False,
            **SMALL,
        )
    )


def old_deberta() -> nn.Module:
    return tf.DebertaForSequenceClassification(
        tf.DebertaConfig(
            vocab_size=40,
            num_attention_heads=2,
            intermediate_size=20,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            max_relative_positions=8,
            position_biased_input=False,
            **SMALL,
        )
    )


BLOCKS = {"depths": (1, 1), "embed_dim": 16, "num_heads": (2, 2)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "left_alone", "kept"),
    [
        (lambda: timm.create_model("swinv2_tiny_window8_256", window_size=4, **IMAGES, **BLOCKS), {"0", "2"}, {"fc1"}),
        (
            lambda: timm.create_model("swinv2_cr_tiny_224", patch_size=2, window_size=4, **IMAGES, **BLOCKS),
            set(),
            {"qkv"},
        ),
        (lambda: tf.Swinv2ForImageClassification(tf.Swinv2Config(**SWIN)), {"0", "2"}, {"query", "key", "value"}),
        (
            lambda: SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=3, block=SwinTransformerBlockV2),
            {"qkv", "proj"},
            {"reduction"},
        ),
        (
            lambda: timm.create_model(
                "vit_relpos_small_patch16_rpn_224", patch_size=8, embed_dim=16, depth=1, num_heads=2, **IMAGES
            ),
            set(),
            {"qkv", "proj"},
        ),
        (lambda: deberta(True), {"query_proj", "key_proj"}, {"value_proj", "dense"}),
        (lambda: deberta(False), {"pos_key_proj", "pos_query_proj"}, {"query_proj", "key_proj", "value_proj"}),
        (lambda: deberta(True, relative=False), set(), {"query_proj", "key_proj", "value_proj"}),
        (old_deberta, {"pos_proj", "pos_q_proj"}, {"in_proj", "dense"}),
    ],
    ids=[
        "timm-swinv2",
        "timm-swinv2-cr",
        "swinv2",
        "torchvision",
        "timm-relpos",
        "deberta-v2",
        "deberta-v2-apart",
        "deberta-v2-plain",
        "deberta",
    ],
)
def test_what_runs_on_a_table_of_positions_is_left_out_and_the_rest_trains(build, left_alone, kept):
    """One private step: a layer whose rows belong to no example would stop it."""
    torch.manual_seed(0)
    plain = build()
    text = isinstance(getattr(plain, "config", None), tf.DebertaConfig | tf.DebertaV2Config)
    model = inject_lora(plain, LoRAConfig(r=2)).train()
    found = adapted(model)
    assert kept <= found and not found & left_alone
    optimizer = make_private(model, batch_size=3, lr=0.0)
    optimizer.batch.expect(3)
    x = torch.randint(1, 40, (3, 7)) if text else torch.randn(3, 3, 32, 32)
    output = model(x)
    logits = output if isinstance(output, Tensor) else output.logits
    optimizer.backward(classification_loss(logits, torch.tensor([0, 1, 0])))
    optimizer.step()


def module_of(origin: str, kind: str, child: str, **attributes: Any) -> nn.Module:
    """A class of that name, from that package, with a child of that name beside another."""
    made: nn.Module = type(kind, (nn.Module,), {"__module__": origin})()
    for name in (child, "beside"):
        setattr(made, name, nn.Linear(4, 4))
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("origin", "kind", "child", "attributes", "left_alone"),
    [
        ("timm.models.old", "Attention", "qkv", {"q_bias": 1.0}, True),
        ("timm.models.old", "Attention", "qkv", {"q_bias": 1.0, "qkv_bias_separate": True}, False),
        ("own.models", "Attention", "qkv", {"q_bias": 1.0}, False),
        ("transformers.models", "WavLMAttention", "q_proj", {}, True),
        ("own.models", "WavLMAttention", "q_proj", {}, False),
        ("transformers.models", "Attention", "key_proj", {"share_att_key": True, "relative_attention": True}, True),
        ("own.models", "Attention", "key_proj", {"share_att_key": True, "relative_attention": True}, False),
        ("transformers.models", "Attention", "key_proj", {"share_att_key": True}, False),
        ("transformers.models", "Attention", "key_proj", {"relative_attention": True}, False),
    ],
)
def test_what_is_known_of_a_packages_modules_is_not_said_of_others(origin, kind, child, attributes, left_alone):
    model = nn.ModuleList([module_of(origin, kind, child, **attributes)])
    assert adapted(inject_lora(model, LoRAConfig(r=2))) == {"beside"} | (set() if left_alone else {child})


def test_one_that_some_kernels_bypass_may_be_named():
    assert adapted(inject_lora(mamba(), LoRAConfig(r=2, target_modules=["out_proj", "x_proj"]))) == {
        "out_proj",
        "x_proj",
    }


@pytest.mark.parametrize("build", [mamba, mamba2, wavlm])
def test_every_adapter_that_is_placed_has_an_effect(build):
    torch.manual_seed(0)
    model = inject_lora(build().eval(), LoRAConfig(r=2))
    x = torch.randn(1, 200) if build is wavlm else torch.arange(1, 8)[None]
    plain = model(x)[0].detach()
    for name, layer in model.named_modules():
        if isinstance(layer, DPLoRALinear):
            nn.init.normal_(layer.lora_B)
            assert not torch.equal(model(x)[0], plain), name
            nn.init.zeros_(layer.lora_B)


class Reader(nn.Module):
    """Reads one layer's weight, calls the other, and a third on request."""

    def __init__(self, lookup: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read, self.called, self.late = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.use_late, self.run = True, lambda function, x: function(x)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.read.weight)
        x = self.run(self.called, x)
        return self.late(x) if self.use_late else x


def adapt(model: nn.Module, **options: Any) -> tuple[nn.Module, Any]:
    model = inject_lora(model, LoRAConfig(r=2)).train()
    return model, make_private(model, batch_size=3, lr=0.0, **options)


def step(model: nn.Module, optimizer: Any, n: int = 3) -> None:
    optimizer.batch.expect(n)
    model(torch.randn(n, 4, requires_grad=True)).square().sum(1).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("phases", ["AB", "A", "B", "BA"])
def test_one_that_is_not_known_is_spoken_of_once(phases):
    model, optimizer = adapt(Reader(), phases=phases)
    with pytest.warns(UserWarning, match="No gradient came to 'read' in the first private step") as found:
        step(model, optimizer)
        step(model, optimizer)
    assert len(found) == 1
    # It points at the caller's step.
    assert linecache.getline(found[0].filename, found[0].lineno).strip() == "optimizer.step()"
    assert found[0].filename == __file__


def test_an_empty_batch_says_nothing_yet():
    model, optimizer = adapt(Reader())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.batch.expect(0)
        model(torch.randn(0, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.warns(UserWarning, match="'read'"):
        step(model, optimizer)


@pytest.mark.parametrize(("number", "more"), [(3, ""), (4, " and 1 more"), (5, " and 2 more")])
def test_several_are_counted(number, more):
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(number + 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[number](x)

    model, optimizer = adapt(Many())
    with pytest.warns(UserWarning, match=rf"'layers\.0', 'layers\.1', 'layers\.2'{more} in"):
        step(model, optimizer)


def test_an_unused_embedding_and_head_too():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head, self.body = DPEmbedding(5, 4), DPLinear(4, 4), DPLinear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    model = Net().train()
    optimizer = make_private(model, batch_size=3, lr=0.0)
    with pytest.warns(UserWarning, match="'head', 'table' in"):
        step(model, optimizer)


def reentrant(function: Callable[..., Any], x: Tensor) -> Any:
    return checkpoint(function, x, use_reentrant=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", ["eager", "reentrant", "compiled", "ghost", "direct"])
def test_no_word_where_all_are_used(way):
    class Plain(Reader):
        def forward(self, x: Tensor) -> Tensor:
            return self.late(self.run(self.called, self.read(x))).tanh()

    plain = Plain()
    if way == "reentrant":
        plain.run = lambda f, x: f(x) if not torch.is_grad_enabled() else reentrant(f, x)
    model, optimizer = adapt(plain, norm_method=way if way in ("ghost", "direct") else "auto")
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if way == "compiled" else model
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        step(run, optimizer)
    torch._dynamo.reset()
    assert not [one for one in found if "No gradient came" in str(one.message)]
