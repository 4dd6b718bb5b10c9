"""Tiny Transformers and timm classifiers built from configuration, without dropout, and an input for each."""

import torch
import transformers as tf
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

HEADS = {
    "roberta": "classifier",
    "gpt2": "score",
    "llama": "score",
    "vit": "classifier",
    "timm_vit": "head",
    "timm_swin": "head.fc",
}
TARGETS = {
    "roberta": ["query", "value"],
    "gpt2": ["c_attn", "c_proj"],
    "llama": ["q_proj", "down_proj"],
    "vit": ["q_proj", "fc1"],
    "timm_vit": ["qkv", "mlp.fc2"],
    "timm_swin": ["qkv", "reduction"],
}
KINDS = list(HEADS)
TEXT = {"vocab_size": 40, "num_labels": 3, "pad_token_id": 0}
IMAGES = ("vit", "timm_vit", "timm_swin")  # (1, 16, 16) each; the others read text


def build(kind: str) -> nn.Module:
    """A classifier with 3 classes and 2 blocks, in evaluation mode, with weights so large that all matter.

    Swin has two stages of 2 blocks, the first with shifted windows.
    """
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    if kind == "roberta":
        model: nn.Module = tf.RobertaForSequenceClassification(
            tf.RobertaConfig(
                max_position_embeddings=20, hidden_dropout_prob=0, attention_probs_dropout_prob=0, **small, **TEXT
            )
        )
    elif kind == "gpt2":
        model = tf.GPT2ForSequenceClassification(
            tf.GPT2Config(
                n_embd=16, n_layer=2, n_head=2, n_positions=20, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **TEXT
            )
        )
    elif kind == "llama":
        model = tf.LlamaForSequenceClassification(tf.LlamaConfig(num_key_value_heads=1, **small, **TEXT))
    elif kind == "vit":
        model = tf.ViTForImageClassification(
            tf.ViTConfig(image_size=16, patch_size=8, num_channels=1, num_labels=3, **small)
        )
    elif kind == "timm_vit":
        model = VisionTransformer(
            img_size=16, patch_size=8, in_chans=1, num_classes=3, embed_dim=16, depth=2, num_heads=2
        )
    else:
        model = SwinTransformer(
            img_size=16,
            patch_size=2,
            in_chans=1,
            num_classes=3,
            embed_dim=8,
            depths=(2, 2),
            num_heads=(2, 2),
            window_size=4,
            drop_path_rate=0.0,
        )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, kind: str) -> Tensor:
    """What the model says to one fixed input, (2, 3)."""
    generator = torch.Generator().manual_seed(1)
    if kind in IMAGES:
        out = model(torch.randn(2, 1, 16, 16, generator=generator))
    else:
        out = model(input_ids=torch.randint(1, 40, (2, 7), generator=generator))
    return getattr(out, "logits", out)


def randomise(model: nn.Module) -> nn.Module:
    """Every trainable parameter drawn anew: B no longer zero, heads and biases no longer the plain model's."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model
