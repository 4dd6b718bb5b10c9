"""The models and batches that are timed: built from a configuration, at random, nothing downloaded."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 4
RANK = 8
WORDS = 1000


@dataclass(frozen=True)
class Shape:
    """One row of the comparison.

    Attributes:
        family: "roberta" (adapters on query and value), "vit" (on every linear layer of the blocks), "swin" (on qkv
            and proj of the attention) or "llama" (on q_proj and v_proj).
        layers, width: of the transformer; heads are 64 wide (16 for "vit", 32 for "swin"), the MLP is four times as
            wide. "swin" starts with ``width``, doubles it three times, and has all but six layers in its third stage.
        examples, tokens: of a batch; a "vit" of T tokens sees an image of T - 1 patches, a "swin" one of T patches.
        device: "cpu", with weights in float32, or "cuda", in bfloat16.
    """

    family: str
    layers: int
    width: int
    examples: int
    tokens: int
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.family}, {self.layers} layers, {self.width} wide, {self.examples} × {self.tokens}"

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, adapters and images."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16


CPU_SHAPES = {
    "roberta-384-16x64": Shape("roberta", 6, 384, 16, 64),
    "roberta-384-32x128": Shape("roberta", 6, 384, 32, 128),
    "roberta-768-8x197": Shape("roberta", 4, 768, 8, 197),
    "vit-64-32x17": Shape("vit", 4, 64, 32, 17),
}
# RoBERTa-base, Swin-B on images of 224², and a Llama of a billion parameters.
GPU_SHAPES = {
    "roberta-base": Shape("roberta", 12, 768, 32, 128),
    "swin-b": Shape("swin", 24, 128, 32, 56 * 56),
    "llama-1b": Shape("llama", 16, 2048, 4, 1024),
}
SHAPES = CPU_SHAPES | GPU_SHAPES
DEFAULT_SHAPES = {"cpu": ["roberta-384-16x64", "vit-64-32x17"], "cuda": list(GPU_SHAPES)}


def build(shape: Shape) -> nn.Module:
    """A fresh, fully frozen model in training mode, without dropout."""
    torch.manual_seed(0)
    make = {"roberta": _roberta, "vit": _vit, "swin": _swin, "llama": _llama}[shape.family]
    # A billion weights are drawn fast only on the device.
    with torch.device(shape.device):
        model = make(shape)
    return model.to(shape.dtype).requires_grad_(False).train()


def _roberta(shape: Shape) -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=WORDS,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.width // 64,
            intermediate_size=4 * shape.width,
            max_position_embeddings=shape.tokens + 2,
            type_vocab_size=1,
            pad_token_id=1,
            num_labels=CLASSES,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def _llama(shape: Shape) -> nn.Module:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    heads = shape.width // 64
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 4,
            intermediate_size=4 * shape.width,
            max_position_embeddings=shape.tokens,
            pad_token_id=1,
            num_labels=CLASSES,
            use_cache=False,
        )
    )


def _swin(shape: Shape) -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=_side(shape),
        patch_size=4,
        num_classes=CLASSES,
        embed_dim=shape.width,
        depths=(2, 2, shape.layers - 6, 2),
        num_heads=tuple(shape.width // 32 * k for k in (1, 2, 4, 8)),
        window_size=7,
        drop_path_rate=0.0,
    )


def _vit(shape: Shape) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=_side(shape),
        patch_size=2,
        in_chans=1,
        num_classes=CLASSES,
        embed_dim=shape.width,
        depth=shape.layers,
        num_heads=shape.width // 16,
    )


def _side(shape: Shape) -> int:
    patches, size = (shape.tokens, 4) if shape.family == "swin" else (shape.tokens - 1, 2)
    return size * round(patches**0.5)


def targets(shape: Shape) -> list[str]:
    """Name endings of the layers that get an adapter."""
    return {
        "roberta": ["query", "value"],
        "vit": ["qkv", "proj", "fc1", "fc2"],
        "swin": ["attn.qkv", "attn.proj"],
        "llama": ["q_proj", "v_proj"],
    }[shape.family]


def batch(shape: Shape) -> tuple[Tensor, Tensor]:
    """Random inputs, ids (N, T) or images (N, channels, H, W), and labels (N,)."""
    labels = torch.randint(CLASSES, (shape.examples,), device=shape.device)
    if shape.family in ("roberta", "llama"):
        return torch.randint(2, WORDS, (shape.examples, shape.tokens), device=shape.device), labels
    channels, side = 3 if shape.family == "swin" else 1, _side(shape)
    return torch.randn(shape.examples, channels, side, side, device=shape.device, dtype=shape.dtype), labels


def loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the batch."""
    return F.cross_entropy(logits(model(inputs)), labels)


def logits(output: object) -> Tensor:
    """The logits (N, classes) of what a model returned."""
    found = getattr(output, "logits", output)
    assert isinstance(found, Tensor)
    return found
