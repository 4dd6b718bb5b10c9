"""Data encoded for the model at hand: images of its size, texts as its tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_dp.fed.data.completions import completion_examples
from lora_dp.fed.data.examples import Examples, ImageExamples, TextExamples, multiple_of_8, padded_rows
from lora_dp.fed.data.options import Task

Kind = Literal["image", "text"]
_AT_ONCE = 256
_FLAT = 0.02  # an image with less contrast than that is not blown up


@dataclass(frozen=True)
class ImageSpec:
    """The images a model takes: float32 (channels, height, width), (pixel / 255 - mean) / std.

    Attributes:
        usual: mean and deviation of the pixels, from 0 to 1, that it was trained on; None where these are mean and std.
        contrast: whether each image is given these.
    """

    height: int
    width: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    usual: tuple[float, float] | None = None
    contrast: bool = False

    def prepared(self, pixels: Tensor) -> Tensor:
        """Images uint8 (N, C, H, W), each with the usual mean and deviation where contrast is asked for."""
        if not self.contrast or not len(pixels):
            return pixels
        mean, std = self.usual or (sum(self.mean) / len(self.mean), sum(self.std) / len(self.std))
        parts = []
        for part in pixels.split(_AT_ONCE):
            values = part.float() / 255
            own, spread = values.mean((1, 2, 3), keepdim=True), values.std((1, 2, 3), keepdim=True)
            moved = (values - own) / spread.clamp(min=_FLAT) * std + mean
            parts.append((moved.clamp(0, 1) * 255).round().to(torch.uint8))
        return torch.cat(parts)


@dataclass(frozen=True)
class TextSpec:
    """The texts a model takes: a Transformers tokenizer with a padding token, and the most tokens."""

    tokenizer: Any
    max_length: int


InputSpec = ImageSpec | TextSpec


@dataclass(frozen=True)
class RawData:
    """A data set as opened: inputs are PIL images, strings or pairs of strings, for a language model (prompt,
    completion); labels int64 classes from 0, in a client's own data −1 where an example has none of them.

    Without classes, all labels are 0 and there are no names.
    """

    kind: Kind
    label_names: list[str]
    train_inputs: Sequence[Any]
    train_labels: np.ndarray
    validation_inputs: Sequence[Any]
    validation_labels: np.ndarray
    max_length: int
    task: Task = "classification"
    chat: bool = False

    @property
    def num_labels(self) -> int:
        return len(self.label_names)


@dataclass(frozen=True)
class Splits:
    """Encoded data: examples to partition over the clients, and examples to evaluate on."""

    train: Examples
    validation: Examples
    label_names: list[str]
    kind: Kind

    @property
    def num_labels(self) -> int:
        return len(self.label_names)


def check_data_kind(raw: RawData, spec: InputSpec) -> None:
    """Raises ValueError where the model takes another kind of input than the data have."""
    if isinstance(spec, ImageSpec) != (raw.kind == "image"):
        other = "image" if isinstance(spec, ImageSpec) else "text"
        raise ValueError(f"the data set holds {raw.kind}s but the model takes {other}s: choose another model")


def encode(raw: RawData, spec: InputSpec) -> Splits:
    """Encodes both splits for a model.

    Images are made grey or RGB and resized to the model's size (bilinear, antialiased; the whole image, its
    aspect ratio not kept); texts are cut to the shorter of the configured and the model's limit.

    Raises:
        ValueError: the model takes another kind of input than the data have; a missing text or image; an
            image of more than 8 bits a channel.
    """
    check_data_kind(raw, spec)

    def encode_split(inputs: Iterable[Any], labels: np.ndarray) -> Examples:
        targets = torch.as_tensor(labels, dtype=torch.long)
        if isinstance(spec, ImageSpec):
            return ImageExamples(spec.prepared(_image_tensor(inputs, spec)), targets, spec.mean, spec.std)
        if raw.task == "causal-lm":
            limit = min(raw.max_length, spec.max_length)
            return completion_examples(list(inputs), targets, spec.tokenizer, limit, chat=raw.chat)
        return text_examples(list(inputs), targets, spec, raw.max_length)

    train = encode_split(raw.train_inputs, raw.train_labels)
    return Splits(
        train=train,
        validation=encode_split(raw.validation_inputs, raw.validation_labels)
        if len(raw.validation_labels)
        else train.subset([]),
        label_names=raw.label_names,
        kind=raw.kind,
    )


def _image_tensor(images: Iterable[Image.Image | None], spec: ImageSpec) -> Tensor:
    """uint8 (N, C, H, W) of the model's size."""
    mode = "L" if spec.channels == 1 else "RGB"
    arrays = []
    for row, image in enumerate(images):
        if image is None:
            raise ValueError(f"row {row} has no image: remove such rows from the data set")
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"row {row} has more than 8 bits a channel: convert the images to 8 bits first")
        scaled = image.convert(mode).resize((spec.width, spec.height), Image.Resampling.BILINEAR)
        arrays.append(np.asarray(scaled).reshape(spec.height, spec.width, spec.channels))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def text_examples(texts: list[Any], labels: Tensor, spec: TextSpec, max_length: int) -> TextExamples:
    """Texts, or pairs of texts, as tokens, each cut to the shorter of ``max_length`` and the model's limit.

    Raises:
        ValueError: a missing text.
    """
    pairs = bool(texts) and isinstance(texts[0], tuple)
    for row, text in enumerate(texts):
        if not all(isinstance(part, str) for part in (text if pairs else (text,))):
            raise ValueError(f"row {row} has no text: remove such rows from the data set")
    limit = min(max_length, spec.max_length)
    pad_id = spec.tokenizer.pad_token_id
    first, second = ([text[0] for text in texts], [text[1] for text in texts]) if pairs else (texts, None)
    encoded = spec.tokenizer(first, second, truncation=True, max_length=limit, return_attention_mask=False)
    # a text without any token would leave attention nothing to look at
    rows = [ids or [pad_id] for ids in encoded["input_ids"]]
    lengths = torch.tensor([len(tokens) for tokens in rows])
    width = min(multiple_of_8(int(lengths.max())), limit)
    # Models of BERT's kind are told which text a token belongs to.
    marks = encoded.get("token_type_ids") if pairs else None
    segments = None if marks is None else padded_rows(marks, width, 0)
    return TextExamples(padded_rows(rows, width, pad_id), lengths, labels, pad_id, segments)
