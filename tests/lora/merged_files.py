"""Models with adapters, and the ways to open what they wrote."""

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import nn

from lora_dp import LoRAConfig, inject_lora
from tests.tiny_models import HEADS, build, randomise


def adapted(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    settings = {"r": 2, "trainable_modules": [HEADS[kind]], "bias": "all"} | settings
    return randomise(inject_lora(build(kind).to(dtype), LoRAConfig(**settings)))


def opened(kind: str, folder: Path, **options: Any) -> nn.Module:
    auto = tf.AutoModelForImageClassification if kind == "vit" else tf.AutoModelForSequenceClassification
    return auto.from_pretrained(folder, **options).eval()
