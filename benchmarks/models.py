"""The models and batches that are timed: built from a configuration, at random, nothing downloaded."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 4
RANK = 8


@dataclass(frozen=True)
class Shape:
    """One row of the comparison.

    Attributes:
        family: "roberta" (adapters on query and value) or "vit" (adapters on every linear layer of the blocks).
        layers, width: of the transformer; heads are 64 wide (16 for "vit"), the MLP is four times as wide.
        examples, tokens: of a batch; a "vit" of T tokens sees an image of T - 1 patches.
    """

    family: str
    layers: int
    width: int
    examples: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.family}, {self.layers} layers, {self.width} wide, {self.examples} × {self.tokens}"


SHAPES = {
    "roberta-384-16x64": Shape("roberta", 6, 384, 16, 64),
    "roberta-384-32x128": Shape("roberta", 6, 384, 32, 128),
    "roberta-768-8x197": Shape("roberta", 4, 768, 8, 197),
    "vit-64-32x17": Shape("vit", 4, 64, 32, 17),
}
DEFAULT_SHAPES = ["roberta-384-16x64", "vit-64-32x17"]


def build(shape: Shape) -> nn.Module:
    """A fresh, fully frozen float32 model in training mode, without dropout."""
    torch.manual_seed(0)
    model = _roberta(shape) if shape.family == "roberta" else _vit(shape)
    return model.requires_grad_(False).train()


def _roberta(shape: Shape) -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(RobertaConfig(
        vocab_size=1000, hidden_size=shape.width, num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 64, intermediate_size=4 * shape.width,
        max_position_embeddings=shape.tokens + 2, type_vocab_size=1, pad_token_id=1, num_labels=CLASSES,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def _vit(shape: Shape) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    side = 2 * round((shape.tokens - 1) ** 0.5)
    return VisionTransformer(
        img_size=side, patch_size=2, in_chans=1, num_classes=CLASSES, embed_dim=shape.width, depth=shape.layers,
        num_heads=shape.width // 16)


def targets(shape: Shape) -> list[str]:
    """Name endings of the layers that get an adapter."""
    return ["query", "value"] if shape.family == "roberta" else ["qkv", "proj", "fc1", "fc2"]


def batch(shape: Shape) -> tuple[Tensor, Tensor]:
    """Random inputs, ids (N, T) or images (N, 1, H, W), and labels (N,)."""
    labels = torch.randint(CLASSES, (shape.examples,))
    if shape.family == "roberta":
        return torch.randint(2, 1000, (shape.examples, shape.tokens)), labels
    side = 2 * round((shape.tokens - 1) ** 0.5)
    return torch.randn(shape.examples, 1, side, side), labels


def loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the batch."""
    return F.cross_entropy(logits(model(inputs)), labels)


def logits(output: object) -> Tensor:
    """The logits (N, classes) of what a model returned."""
    found = getattr(output, "logits", output)
    assert isinstance(found, Tensor)
    return found
