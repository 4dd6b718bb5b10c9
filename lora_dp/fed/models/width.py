"""How many numbers a model has for each token, found without loading its weights."""

import json
from typing import Any

import timm
import transformers

from lora_dp.fed.hub import hub
from lora_dp.fed.models.options import DEFAULT_WEIGHTS


def width_of(name: str) -> int:
    """Width of the embedded model ("default"), of timm's, or of a Transformers folder or hub name.

    Raises:
        ValueError: there is no such model, or it does not tell.

    >>> width_of("default"), width_of("test_vit")
    (64, 64)
    """
    if name == "default":
        return int(json.loads(DEFAULT_WEIGHTS.with_suffix(".json").read_text())["architecture"]["embed_dim"])
    if timm.is_model(name):
        model: Any = timm.create_model(name, pretrained=False)
        return int(model.num_features)
    try:
        with hub(name):
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"There is no model {name}: give a timm name, or a Transformers name or folder.") from error
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(f"{name} does not tell its width: give another model of the same width.")
    return width
