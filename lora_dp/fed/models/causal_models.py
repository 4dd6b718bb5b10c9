"""Causal language models with adapters in place: what goes on from a prompt, and has no head of its own."""

from dataclasses import replace

import torch
import transformers
from torch import nn

from lora_dp.fed.hub import hub
from lora_dp.fed.models.feature_models import vocabulary_of
from lora_dp.fed.models.loading import NO_CODE, LoadedModel, quiet_transformers, text_spec, why_unloaded, with_adapters
from lora_dp.fed.models.options import ModelConfig
from lora_dp.isolation.trials import modes_kept
from lora_dp.nn.adapter_start import Adapter


def load_causal_model(
    config: ModelConfig, *, seed: int = 0, adapter: Adapter = "lora", adapts_last: int | None = None
) -> LoadedModel:
    """Loads a causal language model in float32, and injects adapters; all else is frozen.

    Its output layer stays as it is: most models share it with their embedding.

    Args:
        config: of the model, a hub name or a folder of Transformers.
        seed: of what starts at random; the global random state is left as it was.
        adapter: "lora", or "xs".
        adapts_last: ``adapt_last`` where ``config`` names neither that nor layers.

    Raises:
        ValueError: no such model, or one of another kind; wrong adapter settings.
    """
    name = config.name
    if name == "default":
        raise ValueError("the default model takes images, and is no language model: give one by --model")
    try:
        with hub(name), quiet_transformers():
            model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **NO_CODE)
            spec = text_spec(name, model.config)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"could not load {name} as a causal language model: give a Transformers hub name or folder of one "
            f"({why_unloaded(name, error)})"
        ) from error
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} has an encoder, and no prompt in front: choose a causal language model.")
    if not _is_causal(model):
        raise ValueError(f"{name} sees the whole text at each of its tokens: choose a causal language model.")
    model.config.use_cache = False  # what a cache keeps is of no use to a backward pass
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        own = replace(config, features="own")
        adapted, config = with_adapters(model, own, [], adapter=adapter, adapts_last=adapts_last)
    return LoadedModel(adapted, spec, [], config, head_is_new=False)


@torch.no_grad()
def _is_causal(model: nn.Module) -> bool:
    """Whether what a model says of a token is the same whatever comes behind it."""
    tokens = torch.arange(2, 10).unsqueeze(0) % vocabulary_of(model)
    other = tokens.clone()
    other[0, -1] = (tokens[0, -1] + 1) % vocabulary_of(model)
    with modes_kept(model):
        model.eval()
        before, after = (model(input_ids=ids).logits[:, :-1] for ids in (tokens, other))
    return torch.allclose(before, after, rtol=1e-3, atol=1e-4)
