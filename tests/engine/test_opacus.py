"""The private gradient without noise equals Opacus's wherever Opacus can run, and ours runs where it stops."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import DPLoRALinear, LoRAConfig, inject_lora
from tests.support import assert_close, make_private, private_gradients

opacus = pytest.importorskip("opacus")

# Opacus's hooks see no gradient at the inputs of the first layers and say so in every step.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

N = 5
# Between the gradient norms of each model's examples, so that some are clipped and some are not; large beside the 1e-6
# that Opacus adds to each norm.
BOUNDS = {"vit": 0.5, "roberta": 2.5, "swin": 0.5}


class PlainLoRA(nn.Module):
    """LoRA written as two ``nn.Linear``, the kind of layer that Opacus knows."""

    def __init__(self, ours: DPLoRALinear):
        super().__init__()
        self.base = nn.Linear(ours.in_features, ours.out_features, bias=ours.bias is not None)
        self.base.weight, self.base.bias = copy.deepcopy(ours.weight), copy.deepcopy(ours.bias)
        self.lora_A = nn.Linear(ours.in_features, ours.r, bias=False)
        self.lora_B = nn.Linear(ours.r, ours.out_features, bias=False)
        self.lora_A.weight, self.lora_B.weight = copy.deepcopy(ours.lora_A), copy.deepcopy(ours.lora_B)
        self.scaling = ours.scaling

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * self.lora_B(self.lora_A(x))


def vit() -> tuple[nn.Module, Tensor]:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=3, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2
    )
    return model, torch.randn(N, 1, 8, 8)


def roberta() -> tuple[nn.Module, Tensor]:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    model = RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=20,
            max_position_embeddings=20,
            type_vocab_size=1,
            pad_token_id=1,
            num_labels=3,
            hidden_dropout_prob=0,
            attention_probs_dropout_prob=0,
            initializer_range=0.3,
        )
    )
    return model, torch.randint(2, 40, (N, 7))


def swin() -> tuple[nn.Module, Tensor]:
    from timm.models.swin_transformer import SwinTransformer

    model = SwinTransformer(
        img_size=16,
        patch_size=2,
        in_chans=1,
        num_classes=3,
        embed_dim=8,
        depths=(2, 2),
        num_heads=(2, 2),
        window_size=4,
    )
    return model, torch.randn(N, 1, 16, 16)


MODELS = {"vit": vit, "roberta": roberta, "swin": swin}


def make(
    kind: str, phases: str, targets: list[str] | str = "all-linear"
) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Our model, the same model for Opacus, inputs and labels. Adapters alone are trained."""
    torch.manual_seed(0)
    model, inputs = MODELS[kind]()
    ours = inject_lora(model, LoRAConfig(r=2, alpha=4, target_modules=targets)).train()
    for module in ours.modules():
        if isinstance(module, DPLoRALinear):
            # B starts at zero, which would make every gradient of A zero.
            nn.init.normal_(module.lora_B, std=0.2)
    theirs = copy.deepcopy(ours)
    for name, module in list(theirs.named_modules()):
        if isinstance(module, DPLoRALinear):
            parent, _, leaf = name.rpartition(".")
            setattr(theirs.get_submodule(parent), leaf, PlainLoRA(module))
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(any(f"lora_{factor}" in name for factor in phases))
    return ours, theirs, inputs, torch.randint(3, (N,))


def logits(output: Any) -> Tensor:
    found = getattr(output, "logits", output)
    assert isinstance(found, Tensor)
    return found


def our_gradients(
    model: nn.Module, inputs: Tensor, labels: Tensor, phases: str, clipping: str, bound: float
) -> dict[str, Tensor]:
    optimizer = make_private(model, batch_size=N, max_grad_norm=bound, lr=0.0, phases=phases, clipping=clipping)
    optimizer.batch.expect(N)
    F.cross_entropy(logits(model(inputs)), labels).backward()
    optimizer.step()
    return private_gradients(model)


def opacus_gradients(
    model: nn.Module, inputs: Tensor, labels: Tensor, mode: str, clipping: str, bound: float
) -> dict[str, Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    # Opacus's per-layer bounds are one per parameter; ours are C / √layers per layer, here with one parameter each.
    limit: Any = [bound / len(trained) ** 0.5] * len(trained) if clipping == "per_layer" else bound
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(N)), batch_size=N)
    criterion = nn.CrossEntropyLoss()
    made = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(trained, lr=0.0),
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=limit,
        poisson_sampling=False,
        clipping=clipping,
        grad_sample_mode=mode,
        **({"criterion": criterion} if mode == "ghost" else {}),
    )
    wrapped, optimizer = made[0], made[1]
    loss = made[2] if mode == "ghost" else criterion
    loss(logits(wrapped(inputs)), labels).backward()
    optimizer.step()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.requires_grad}


def joined(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


CASES = [
    ("hooks", "flat", "B"),
    ("hooks", "flat", "AB"),
    ("ghost", "flat", "B"),
    ("ghost", "flat", "AB"),
    ("hooks", "per_layer", "B"),
]


@pytest.mark.slow
@pytest.mark.parametrize("mode, clipping, phases", CASES)
@pytest.mark.parametrize("kind", ["vit", "roberta"])
def test_same_gradient(kind, mode, clipping, phases):
    ours, theirs, inputs, labels = make(kind, phases)
    actual = our_gradients(ours, inputs, labels, phases, clipping, BOUNDS[kind])
    expected = opacus_gradients(theirs, inputs, labels, mode, clipping, BOUNDS[kind])
    assert {f"{name}.weight" for name in actual} == set(expected)
    assert_close(joined(actual), joined(expected))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_opacus_stops_on_swin_where_ours_runs(mode):
    """Swin folds windows into the first dimension of qkv, which Opacus takes for the examples (fc1 has N of them)."""
    ours, theirs, inputs, labels = make("swin", "B", ["qkv", "fc1"])
    gradients = our_gradients(ours, inputs, labels, "B", "flat", BOUNDS["swin"])
    assert gradients and all(gradient.any() for gradient in gradients.values())
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        opacus_gradients(theirs, inputs, labels, mode, "flat", BOUNDS["swin"])
