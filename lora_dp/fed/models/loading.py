"""Models of the federation: the embedded default, timm's and Transformers', with adapters in place."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import transformers
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lora_dp.fed.data.encoding import ImageSpec, InputSpec, Kind, TextSpec
from lora_dp.fed.data.examples import Batch
from lora_dp.fed.data.kept_activations import model_inputs
from lora_dp.fed.hub import hub, reachable, unreachable
from lora_dp.fed.models.class_texts import start_from_texts
from lora_dp.fed.models.feature_models import on_token_means, put_feature_head
from lora_dp.fed.models.options import DEFAULT_WEIGHTS, Features, ModelConfig, Precision
from lora_dp.fed.models.pooling import blocks_of, is_list_of_blocks, says_mean, without_pooler
from lora_dp.lora.config import ALL_LINEAR, LoRAConfig
from lora_dp.lora.injection import inject_lora
from lora_dp.lora.targets import Modules, find_targets
from lora_dp.nn.adapter_start import Adapter

# Code that a repository brings along is never run, nor is anybody asked whether it should be.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}


@dataclass(frozen=True)
class LoadedModel:
    """A model with adapters in place and its head trainable, everything else frozen, in training mode."""

    model: nn.Module
    spec: InputSpec
    """What the model takes: encode the data with it."""
    heads: list[str]
    """Names of the modules trained in full."""
    config: ModelConfig
    """By which it was loaded, with features, contrast, whitening and adapt_last as the model decided."""
    head_is_new: bool
    """Whether the head knows nothing of these classes yet."""


def load_model(
    config: ModelConfig,
    num_labels: int,
    kind: Kind,
    *,
    seed: int = 0,
    adapter: Adapter = "lora",
    adapted: bool = True,
    adapts_last: int | None = None,
) -> LoadedModel:
    """Loads the backbone in float32, fits its head to ``num_labels`` and injects adapters.

    A stored head is kept if it has ``num_labels`` classes, else a new one takes its place. ``seed`` fixes the
    random start of adapters and head; the global random state is left as it was. ``adapter`` is as LoRAConfig's. A hub
    is contacted only when ``name`` is a hub's model or a pretrained timm model.

    Args:
        config: of the model.
        num_labels: number of classes.
        kind: of the data.
        seed: of what starts at random.
        adapter: "lora", or "xs".
        adapted: whether there are adapters; else the head alone is trained.
        adapts_last: ``adapt_last`` where ``config`` names neither that nor layers, and the model is a list of blocks.

    Raises:
        ValueError: unknown model, a model for another kind of data, no head found, wrong adapter settings, or features
            that the model does not have.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model, spec, heads, features, brings_head = _load(config, num_labels, kind)
        if config.features == "fitting" and features == "mean":
            config = replace(config, whitening="made-up")
            if isinstance(spec, ImageSpec):
                config = replace(config, contrast="model")
        elif config.features == "fitting":
            config = replace(config, feature_blocks=[-1])
        config = replace(config, features=features)
        if config.contrast == "model" and not isinstance(spec, ImageSpec):
            raise ValueError("contrast model is for images: leave it out for texts.")
        if isinstance(spec, ImageSpec):
            spec = replace(spec, contrast=config.contrast == "model")
        if features == "mean":
            model, heads = on_token_means(model, spec, config, num_labels), ["head"]
            if config.class_texts == "names":
                raise ValueError("class_texts are to be the data's names of classes, which a model does not know.")
            if config.class_texts is not None:
                start_from_texts(model, spec, config.class_texts)
        elif features == "unit":
            put_feature_head(model, heads, config.name, spec if brings_head else None)
        model, config = with_adapters(model, config, heads, adapter=adapter, adapted=adapted, adapts_last=adapts_last)
        return LoadedModel(model, spec, heads, config, not brings_head)


def with_adapters(
    model: nn.Module,
    config: ModelConfig,
    heads: list[str],
    *,
    adapter: Adapter = "lora",
    adapted: bool = True,
    adapts_last: int | None = None,
) -> tuple[nn.Module, ModelConfig]:
    """The model with adapters in place, in training mode, and its options with ``adapt_last`` as it was decided.

    Args:
        model: changed in place; torch's random state decides how its adapters start.
        config: its options.
        heads: names of the modules trained in full.
        adapter, adapted, adapts_last: as of :func:`load_model`.

    Raises:
        ValueError: more blocks than there are; wrong adapter settings.
    """
    if adapted and config.adapt_last is None and config.target_modules == ALL_LINEAR and is_list_of_blocks(model):
        config = replace(config, adapt_last=adapts_last)
    lora = LoRAConfig(
        r=config.r,
        alpha=config.alpha,
        target_modules=_layers_to_adapt(model, config, heads) if adapted else [],
        trainable_modules=heads,
        dropout=config.dropout,
        init_a=config.init_a,
        adapter=adapter,
    )
    return inject_lora(model, lora).train(), config


class _Loaded(NamedTuple):
    """A model as it was stored, and whether its head is one for these classes."""

    model: nn.Module
    spec: InputSpec
    heads: list[str]
    features: Features
    brings_head: bool


def _load(config: ModelConfig, num_labels: int, kind: Kind) -> _Loaded:
    name, path = config.name, Path(config.name).expanduser()
    if name == "default":
        model, spec, heads, brings = _load_default(num_labels, kind)
    elif path.exists() or name.startswith(("/", ".", "~")):
        if not (path / "config.json").is_file():
            raise ValueError(f"no config.json in {name}: give a folder written by save_pretrained")
        return _load_language_or_vision(str(path), num_labels, kind, config.features)
    elif timm.is_model(name):
        model, spec, heads, brings = _load_timm(name, config.pretrained, num_labels, kind)
    else:
        return _load_language_or_vision(name, num_labels, kind, config.features)
    return _Loaded(model, spec, heads, _resolved(config.features, brings), brings)


def _resolved(features: Features, brings_head: bool) -> Features:
    """Features of a model that does not say itself which fit it."""
    if features == "fitting":
        return "unit" if brings_head else "mean"
    return "own" if features == "auto" else features


def _layers_to_adapt(model: nn.Module, config: ModelConfig, heads: Sequence[str]) -> list[str] | str:
    """As LoRAConfig.target_modules."""
    if config.adapt_last is None:
        return config.target_modules
    blocks = blocks_of(model)
    if config.adapt_last > len(blocks):
        raise ValueError(f"adapt_last is {config.adapt_last}, but {config.name} has {len(blocks)} blocks: lower it.")
    modules = Modules.of(model)
    whole = modules.beneath(modules.names[root] for root in heads)
    last = tuple(f"{block}." for block in blocks[-config.adapt_last :])
    return [name for name in find_targets(model, modules, LoRAConfig(), whole) if name.startswith(last)]


def logits(model: nn.Module, batch: Batch, precision: Precision = "float32") -> Tensor:
    """Logits (N, classes) of an encoded batch, in float32 or float64; "labels" are not shown to the model.

    ``precision`` "bf16" runs the model under autocast; per-example norms and sums stay in float32.
    """
    with torch.autocast(next(iter(batch.values())).device.type, torch.bfloat16, enabled=precision == "bf16"):
        args, named = model_inputs(batch)
        output = model(*args, **named)
    scores: Tensor = getattr(output, "logits", output)
    return scores if scores.dtype == torch.float64 else scores.float()


def build_default(architecture: dict[str, Any], num_labels: int) -> VisionTransformer:
    """The embedded model's class with the arguments stored beside its weights, at random."""
    return VisionTransformer(**architecture, num_classes=num_labels)


def _load_default(num_labels: int, kind: Kind) -> tuple[nn.Module, InputSpec, list[str], bool]:
    if kind != "image":
        raise ValueError(
            "the default model takes images but the data set holds texts: give a language model by --model"
        )
    card = json.loads(DEFAULT_WEIGHTS.with_suffix(".json").read_text())
    architecture = card["architecture"]
    model = build_default(architecture, num_labels)
    state = {name: tensor.float() for name, tensor in load_file(DEFAULT_WEIGHTS).items()}
    brings_head = num_labels == card["num_labels"]
    if not brings_head:
        state |= {f"head.{name}": tensor for name, tensor in model.head.state_dict().items()}
    model.load_state_dict(state)
    size = architecture["img_size"]
    spec = ImageSpec(
        size, size, architecture["in_chans"], tuple(card["mean"]), tuple(card["std"]), tuple(card["pixels"])
    )
    return model, spec, ["head"], brings_head


def _load_timm(
    name: str, pretrained: bool, num_labels: int, kind: Kind
) -> tuple[nn.Module, InputSpec, list[str], bool]:
    if kind != "image":
        raise ValueError(f"{name} takes images but the data set holds texts: give a language model by --model")
    try:
        with hub(name) if pretrained else contextlib.nullcontext():
            model: Any = timm.create_model(name, pretrained=pretrained, num_classes=num_labels)
    except (OSError, RuntimeError) as error:
        why = _first_line(error) if reachable() else unreachable(name)
        raise ValueError(f"could not load {name}: check name and network ({why})") from error
    data = timm.data.resolve_model_data_config(model)
    channels, height, width = data["input_size"]
    found = model.get_classifier()
    classifiers = found if isinstance(found, tuple) else (found,)
    heads = [name for name, module in model.named_modules() if any(module is head for head in classifiers)]
    if not heads:
        raise ValueError(f"timm's {name} has no classifier to train: choose another model")
    brings_head = pretrained and model.pretrained_cfg.get("num_classes") == num_labels
    return model, ImageSpec(height, width, channels, tuple(data["mean"]), tuple(data["std"])), heads, brings_head


def _load_language_or_vision(name: str, num_labels: int, kind: Kind, features: Features) -> _Loaded:
    """A model of Transformers, with its own head or one on the mean over tokens."""
    if kind == "text" and (features == "mean" or features == "auto" and says_mean(name)):
        return _Loaded(*_load_encoder(name), [], "mean", brings_head=False)
    model, spec, heads, brings = _load_transformers(name, num_labels, kind)
    features = _resolved(features, brings)
    if kind == "text" and features == "mean":
        return _Loaded(*_load_encoder(name), [], "mean", brings_head=False)
    return _Loaded(model, spec, heads, features, brings)


def _load_encoder(name: str) -> tuple[nn.Module, InputSpec]:
    try:
        with hub(name), quiet_transformers():
            backbone = transformers.AutoModel.from_pretrained(name, dtype=torch.float32, **NO_CODE)
            spec = text_spec(name, backbone.config)
    except (OSError, ValueError) as error:
        raise _cannot_load(name, "an encoder of texts", error) from error
    if backbone.config.is_encoder_decoder:
        raise ValueError(f"{name} has a decoder, whose tokens are no features of a text: choose features own.")
    return without_pooler(backbone), spec


def _load_transformers(name: str, num_labels: int, kind: Kind) -> tuple[nn.Module, InputSpec, list[str], bool]:
    auto = (
        transformers.AutoModelForImageClassification
        if kind == "image"
        else transformers.AutoModelForSequenceClassification
    )
    try:
        with hub(name), quiet_transformers():
            model, found = auto.from_pretrained(
                name,
                num_labels=num_labels,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
                output_loading_info=True,
                **NO_CODE,
            )
            if getattr(model.config, "attention_type", None) == "block_sparse":
                # BigBird does so by itself at the first batch of short texts, and keeps it for all that come later.
                for module in model.modules():  # of BigBird-Pegasus, the encoder
                    if hasattr(module, "set_attention_type"):
                        module.set_attention_type("original_full")
            spec = _image_spec(name, model.config) if kind == "image" else text_spec(name, model.config)
    except (OSError, ValueError) as error:
        raise _cannot_load(name, f"a model that classifies {kind}s", error) from error
    # whatever stands beside the backbone was added for classification: classifier, score, pre_classifier, …
    heads = [
        child
        for child, module in model.named_children()
        if child != model.base_model_prefix and next(module.parameters(), None) is not None
    ]
    if not heads or not hasattr(model, model.base_model_prefix):
        raise ValueError(f"cannot tell the head of {name} from its backbone: choose another model")
    new = {*found["missing_keys"], *(key[0] if isinstance(key, tuple) else key for key in found["mismatched_keys"])}
    brings_head = len(heads) == 1 and not any(key.startswith(f"{heads[0]}.") for key in new)
    return model, spec, heads, brings_head


def _cannot_load(name: str, what: str, error: Exception) -> ValueError:
    kind = what.rpartition(" ")[2]
    return ValueError(
        f"could not load {name} as {what}: check that it is a timm name, or a Transformers hub name or folder made for "
        f"{kind} ({why_unloaded(name, error)})"
    )


def why_unloaded(name: str, error: Exception) -> str:
    """Why a model of Transformers could not be loaded: what the error says first, or that the hub is out of reach."""
    return _first_line(error) if Path(name).exists() or reachable() else unreachable(name)


def _image_spec(name: str, config: Any) -> ImageSpec:
    try:
        processor, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        processor = {}
    size = processor.get("crop_size") or processor.get("size") or config.image_size
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else size["shortest_edge"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(config, "num_channels", 3)
    mean = processor.get("image_mean") or [0.5] * channels
    std = processor.get("image_std") or [0.5] * channels
    return ImageSpec(height, width, channels, tuple(mean), tuple(std))


def text_spec(name: str, config: Any) -> TextSpec:
    """The tokenizer of a model with its limit, and in the model's configuration the token that pads.

    Args:
        name: of the model.
        config: Transformers', of the loaded model; it is changed.

    Raises:
        OSError, ValueError: there is no tokenizer, or none that can pad.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **NO_CODE)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError("its tokenizer has neither a padding nor an end token")
    # decoders find the last token of a text by this id
    config.pad_token_id = tokenizer.pad_token_id
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = tokenizer.pad_token_id  # T5's, which its plain configuration does not name
    positions = getattr(config, "max_position_embeddings", None) or 0
    if positions <= 0:  # XLNet's are without limit
        positions = tokenizer.model_max_length
    return TextSpec(tokenizer, min(tokenizer.model_max_length, positions))


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides the loading report: a new head is expected here, not worth a warning."""
    logging = transformers.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
