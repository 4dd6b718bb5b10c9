"""Models whose head is a linear one on features of unit length, built around a loaded backbone."""

from typing import Any

import torch
from torch import Tensor, nn

from lora_dp.fed.data.encoding import ImageSpec, InputSpec
from lora_dp.fed.data.examples import Batch, ImageExamples
from lora_dp.fed.models.options import ModelConfig
from lora_dp.fed.models.pooling import TokenMeans, Whitening, random_fields
from lora_dp.nn.feature_head import FeatureHead

_MADE_UP = 3000
_AT_ONCE = 256


def blank_batch(spec: InputSpec) -> Batch:
    """One example that holds nothing, such as a model takes."""
    if isinstance(spec, ImageSpec):
        return {"pixel_values": torch.zeros(1, spec.channels, spec.height, spec.width)}
    return {"input_ids": torch.zeros(1, 2, dtype=torch.long), "attention_mask": torch.ones(1, 2, dtype=torch.long)}


def put_feature_head(model: nn.Module, heads: list[str], name: str) -> None:
    """In place of a model's linear head, one on the same features at unit length.

    Args:
        model: changed in place.
        heads: names of the modules that classify.
        name: of the model, for messages.

    Raises:
        ValueError: it has another kind of head.
    """
    head = model.get_submodule(heads[0])
    if len(heads) != 1 or not isinstance(head, nn.Linear):
        raise ValueError(f"The head of {name} is not one linear layer: choose features own, or mean for an encoder.")
    parent, _, child = heads[0].rpartition(".")
    setattr(model.get_submodule(parent), child, FeatureHead(head.in_features, head.out_features))


def on_token_means(model: nn.Module, spec: InputSpec, config: ModelConfig, num_labels: int) -> TokenMeans:
    """A head on means over the tokens of a model, whose own head is left out.

    Args:
        model: timm's, or Transformers': one that classifies images, or an encoder of texts.
        spec: what it takes.
        config: with the blocks, and whether features are whitened.
        num_labels: number of classes.

    Raises:
        ValueError: the model does not tell its blocks, or has no such ones; whitening for texts.
    """
    backbone: Any = model
    if hasattr(model, "forward_intermediates"):
        backbone.reset_classifier(0)
    elif isinstance(spec, ImageSpec):
        backbone = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if backbone is None:
        raise ValueError(f"{config.name} does not tell its blocks: choose features unit or own.")
    pooled = TokenMeans(backbone, nn.Identity(), config.feature_blocks).eval()
    try:
        with torch.no_grad():
            width = _features(pooled, blank_batch(spec)).shape[1]
    except IndexError as error:
        raise ValueError(f"{config.name} has no blocks {config.feature_blocks}: correct feature_blocks.") from error
    except TypeError as error:
        raise ValueError(f"{config.name} does not tell its blocks: choose features unit or own.") from error
    if config.whitening == "made-up":
        if not isinstance(spec, ImageSpec):
            raise ValueError("whitening made-up is for images: leave it out for texts.")
        pooled.whitening = Whitening(_made_up_features(pooled, spec))
    pooled.head = FeatureHead(width, num_labels)
    return pooled


def _features(pooled: TokenMeans, batch: Batch) -> Tensor:
    if "pixel_values" in batch:
        features: Tensor = pooled(batch["pixel_values"])
        return features
    named: Tensor = pooled(**batch)
    return named


@torch.no_grad()
def _made_up_features(pooled: TokenMeans, spec: ImageSpec) -> Tensor:
    """Features of made-up images, prepared as private ones are."""
    pixels = random_fields(_MADE_UP, spec.height, spec.width, spec.channels)
    examples = ImageExamples(spec.prepared(pixels), torch.zeros(_MADE_UP, dtype=torch.long), spec.mean, spec.std)
    return torch.cat([_features(pooled, {"pixel_values": b["pixel_values"]}) for b in examples.batches(_AT_ONCE)])
