"""Models whose head is a linear one on features of unit length, built around a loaded backbone."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lora_dp.fed.data.encoding import ImageSpec, InputSpec, TextSpec
from lora_dp.fed.data.examples import Batch, ImageExamples
from lora_dp.fed.data.kept_activations import model_inputs
from lora_dp.fed.models.options import ModelConfig
from lora_dp.fed.models.pooling import TokenMeans, Whitening, random_fields
from lora_dp.isolation.trials import modes_kept
from lora_dp.nn.feature_head import BIAS_SHARE, FeatureHead

_IMAGES, _IMAGES_AT_ONCE = 3000, 256
_TEXTS, _TEXTS_AT_ONCE = 1000, 50
_FEWEST_TOKENS, _MOST_TOKENS = 4, 30
# Of whitening. Made-up texts have other correlations than written ones, so that they count for less.
_RIDGE_OF_IMAGES, _RIDGE_OF_TEXTS = 0.03, 3.0


def blank_batch(spec: InputSpec) -> Batch:
    """One example that holds nothing, such as a model takes."""
    if isinstance(spec, ImageSpec):
        return {"pixel_values": torch.zeros(1, spec.channels, spec.height, spec.width)}
    return {"input_ids": torch.zeros(1, 2, dtype=torch.long), "attention_mask": torch.ones(1, 2, dtype=torch.long)}


def vocabulary_of(model: nn.Module) -> int:
    """How many tokens a model knows; 2 where it takes none."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    return int(getattr(embedding, "num_embeddings", 2))


def put_feature_head(model: nn.Module, heads: list[str], name: str, keep_for: InputSpec | None = None) -> None:
    """In place of a model's linear head, one on the same features at unit length.

    Args:
        model: changed in place.
        heads: names of the modules that classify.
        name: of the model, for messages.
        keep_for: what the model takes, where the head is to go on from the weights that it has. They are multiplied by
            the features' usual length, which is measured on made-up inputs. None for a new head.

    Raises:
        ValueError: it has another kind of head.
    """
    head = model.get_submodule(heads[0])
    if len(heads) != 1 or not isinstance(head, nn.Linear):
        raise ValueError(f"The head of {name} is not one linear layer: choose features own, or mean for an encoder.")
    new = FeatureHead(head.in_features, head.out_features)
    if keep_for is not None:
        with torch.no_grad():
            length = _usual_length(model, head, keep_for)
            new.linear.get_parameter("weight").copy_(head.weight * length / new.logit_scale)
            if head.bias is not None:
                new.linear.get_parameter("bias").copy_(head.bias / BIAS_SHARE / new.logit_scale)
    parent, _, child = heads[0].rpartition(".")
    setattr(model.get_submodule(parent), child, new)


@torch.no_grad()
def _usual_length(model: nn.Module, head: nn.Module, spec: InputSpec) -> Tensor:
    """Mean length of what a head is given of made-up inputs."""
    lengths: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: lengths.append(args[0].norm(dim=-1).flatten()))
    try:
        with modes_kept(model):
            model.eval()
            for batch in made_up(spec, vocabulary_of(model)):
                _called(model, batch)
    finally:
        handle.remove()
    return torch.cat(lengths).mean()


def on_token_means(model: nn.Module, spec: InputSpec, config: ModelConfig, num_labels: int) -> TokenMeans:
    """A head on means over the tokens of a model, whose own head is left out.

    Args:
        model: timm's, or Transformers': one that classifies images, or an encoder of texts.
        spec: what it takes.
        config: with the blocks, and whether features are whitened.
        num_labels: number of classes.

    Raises:
        ValueError: the model does not tell its blocks, or has no such ones.
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
            width = _called(pooled, blank_batch(spec)).shape[1]
    except IndexError as error:
        raise ValueError(f"{config.name} has no blocks {config.feature_blocks}: correct feature_blocks.") from error
    except TypeError as error:
        raise ValueError(f"{config.name} does not tell its blocks: choose features unit or own.") from error
    if config.whitening == "made-up":
        ridge = _RIDGE_OF_IMAGES if isinstance(spec, ImageSpec) else _RIDGE_OF_TEXTS
        pooled.whitening = Whitening(_made_up_features(pooled, spec), ridge)
    pooled.head = FeatureHead(width, num_labels)
    return pooled


def _called(model: nn.Module, batch: Batch) -> Tensor:
    args, named = model_inputs(batch)
    found: Tensor = model(*args, **named)
    return found


def made_up(spec: InputSpec, vocabulary: int) -> Iterator[Batch]:
    """Made-up inputs in batches: random fields, prepared as private images are; or texts of random tokens.

    They hold nothing of anybody, and are the same in every call.

    Args:
        spec: what the model takes.
        vocabulary: number of tokens that it knows.
    """
    if not isinstance(spec, ImageSpec):
        yield from _made_up_texts(spec, vocabulary)
        return
    pixels = random_fields(_IMAGES, spec.height, spec.width, spec.channels)
    examples = ImageExamples(spec.prepared(pixels), torch.zeros(_IMAGES, dtype=torch.long), spec.mean, spec.std)
    for batch in examples.batches(_IMAGES_AT_ONCE):
        yield {"pixel_values": batch["pixel_values"]}


def _made_up_texts(spec: TextSpec, vocabulary: int) -> Iterator[Batch]:
    """Of 4 to 30 tokens, between those that the tokenizer puts around every text."""
    generator, tokenizer = torch.Generator().manual_seed(0), spec.tokenizer
    special = set(getattr(tokenizer, "all_special_ids", ()))
    words = torch.tensor([token for token in range(vocabulary) if token not in special] or [0])
    before, after = _around(tokenizer)
    longest = min(_MOST_TOKENS, max(spec.max_length - len(before) - len(after), 1))
    for _ in range(_TEXTS // _TEXTS_AT_ONCE):
        rows = []
        for _ in range(_TEXTS_AT_ONCE):
            length = int(torch.randint(min(_FEWEST_TOKENS, longest), longest + 1, (), generator=generator))
            drawn = words[torch.randint(len(words), (length,), generator=generator)]
            rows.append(torch.tensor([*before, *drawn.tolist(), *after]))
        padded = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(padded.shape[1]) < lengths.unsqueeze(1)).long()
        yield {"input_ids": padded, "attention_mask": mask}


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before and after every text: none where it does not tell."""
    whole, bare = (tokenizer(["a"], add_special_tokens=special)["input_ids"][0] for special in (True, False))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


@torch.no_grad()
def _made_up_features(pooled: TokenMeans, spec: InputSpec) -> Tensor:
    return torch.cat([_called(pooled, batch) for batch in made_up(spec, vocabulary_of(pooled))])
