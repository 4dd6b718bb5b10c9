"""Features that a head can use: means over tokens after some blocks, each at unit length, whitened by public inputs."""

import json
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lora_dp.fed.hub import hub
from lora_dp.lora.targets import is_linear
from lora_dp.nn.feature_sums import unit_length
from lora_dp.nn.lora_linear import DPLoRALinear

POOLING = "1_Pooling/config.json"  # where sentence-transformers says how tokens are pooled


class TokenMeans(nn.Module):
    """A head on the means over an example's tokens after some blocks of a frozen backbone, side by side.

    Each mean is divided by its length, so that no block drowns another. Early blocks often know more of data that are
    far from those of pretraining.

    Args:
        backbone: one of timm's, or a Transformers encoder.
        head: takes (N, d · number of blocks).
        blocks: after which blocks, from 1; from the last by negative numbers, as −1 for the last.

    Attributes:
        whitening: applied in front of the head; None for none.

    Raises:
        IndexError: in the forward pass, of a block that the backbone does not have.
        TypeError: there, of a backbone whose blocks do not give (N, tokens, d).

    >>> import timm
    >>> backbone = timm.create_model("test_vit", num_classes=0)
    >>> TokenMeans(backbone, nn.Linear(128, 3), blocks=[1, -1])(torch.randn(2, 3, 160, 160)).shape
    torch.Size([2, 3])
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, blocks: Sequence[int]):
        super().__init__()
        self.backbone, self.head, self.blocks = backbone, head, list(blocks)
        self.whitening: Whitening | None = None
        self.config: Any = getattr(backbone, "config", None)

    def get_input_embeddings(self) -> nn.Module | None:
        """The backbone's."""
        getter = getattr(self.backbone, "get_input_embeddings", None)
        return None if getter is None else getter()

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        """What the head says of :meth:`features`."""
        logits: Tensor = self.head(self.features(*args, **named))
        return logits

    def features(self, *args: Tensor, **named: Tensor) -> Tensor:
        """What the head is given, (N, d · number of blocks), of whatever the backbone takes."""
        pooled = torch.cat([unit_length(mean) for mean in self._means(*args, **named)], 1)
        return pooled if self.whitening is None else self.whitening(pooled)

    def _means(self, *args: Tensor, **named: Tensor) -> list[Tensor]:
        backbone: Any = self.backbone
        if hasattr(backbone, "forward_intermediates"):
            wanted = [_place(block, len(backbone.feature_info)) for block in self.blocks]
            maps = backbone.forward_intermediates(
                *args, indices=sorted(set(wanted)), intermediates_only=True, output_fmt="NCHW", norm=False
            )
            by_place = dict(zip(sorted(set(wanted)), maps, strict=True))
            return [by_place[place].mean((2, 3)) for place in wanted]
        output = self.backbone(*args, **named, output_hidden_states=True)
        # After the last block comes what the model returns, its last normalisation included; the first are embeddings.
        states = [*output.hidden_states[1:-1], output.last_hidden_state]
        chosen = [states[_place(block, len(states))] for block in self.blocks]
        if any(state.dim() != 3 for state in chosen):
            raise TypeError(f"The blocks of {type(backbone).__name__} give no tokens.")
        mask = named.get("attention_mask")
        if mask is None:
            return [state.mean(1) for state in chosen]
        own = mask.unsqueeze(-1).to(chosen[0].dtype)
        return [(state * own).sum(1) / own.sum(1).clamp(min=1) for state in chosen]


def _place(block: int, count: int) -> int:
    """Where in a list of ``count`` a block is that is counted from 1, or from the last as −1."""
    place = block - 1 if block > 0 else count + block
    if not 0 <= place < count:
        raise IndexError(f"There is no block {block} of {count}.")
    return place


class Whitening(nn.Module):
    """Features turned and scaled so that those of public inputs have no correlation and equal variance.

    z = (f − m)·U·(Λ + ridge·λ̄)^(−½), with m and UΛUᵀ the mean and the covariance of the public inputs' features, λ̄ the
    mean of Λ. A head that is trained by few noisy steps learns directions of small variance too.

    Args:
        features: of the public inputs, (N, d).
        ridge: keeps directions of next to no variance from being blown up.

    >>> public = torch.randn(1000, 2) @ torch.tensor([[5.0, 0.0], [4.0, 0.1]])
    >>> torch.cov(Whitening(public, ridge=1e-6)(public).t()).round(decimals=1).abs()
    tensor([[1., 0.],
            [0., 1.]])
    """

    centre: Tensor
    matrix: Tensor

    def __init__(self, features: Tensor, ridge: float = 0.03):
        super().__init__()
        centred = features.double() - features.double().mean(0)
        values, vectors = torch.linalg.eigh(centred.t() @ centred / len(centred))
        values = values.clamp(min=0)
        self.register_buffer("centre", features.mean(0))
        self.register_buffer("matrix", (vectors / (values + ridge * values.mean()).sqrt()).to(features.dtype))

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, d), turned and scaled."""
        return (features - self.centre) @ self.matrix


def says_mean(name: str) -> bool:
    """Whether a model's folder, or its repository on the hub, says that its embedding is the mean over tokens."""
    try:
        with hub(name):
            path = transformers.utils.cached_file(
                name,
                POOLING,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
    except OSError:  # there is no such model, which is told where it is loaded
        return False
    if path is None:
        return False
    with open(path, encoding="utf-8") as file:
        return json.load(file).get("pooling_mode_mean_tokens") is True


def without_pooler(backbone: nn.Module) -> nn.Module:
    """The encoder without its pooler, which nothing reads here; a frozen one would be adapted for nothing."""
    if isinstance(getattr(backbone, "pooler", None), nn.Module):
        backbone.pooler = None  # type: ignore[assignment]
    return backbone


def random_fields(count: int, height: int, width: int, channels: int, seed: int = 0) -> Tensor:
    """Made-up images, uint8 (count, channels, height, width): random fields with amplitudes f^(−a), a from 1 to 3.

    Natural images have amplitudes of about f^(−1) (Field 1987, doi 10.1364/JOSAA.4.002379), smooth ones a larger a.
    They hold nothing of anybody.

    >>> random_fields(3, height=16, width=12, channels=1).shape
    torch.Size([3, 1, 16, 12])
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    frequency = (rows.square() + columns.square()).sqrt()
    frequency[0, 0] = 1 / max(height, width)
    slopes = 1 + 2 * torch.rand(count, 1, 1, 1, generator=generator)
    white = torch.randn(count, channels, height, width, generator=generator)
    smooth = torch.fft.irfft2(torch.fft.rfft2(white) * frequency**-slopes, s=(height, width))
    smooth = (smooth - smooth.mean((2, 3), keepdim=True)) / smooth.std((2, 3), keepdim=True)
    return (smooth * 64 + 128).clamp(0, 255).to(torch.uint8)


def is_list_of_blocks(model: nn.Module) -> bool:
    """Whether :func:`blocks_of` finds any.

    >>> is_list_of_blocks(nn.Linear(2, 2))
    False
    """
    return bool(_blocks(model))


def blocks_of(model: nn.Module) -> list[str]:
    """Names of a model's blocks, in order: the longest list of modules of one class with linear layers in them.

    Raises:
        ValueError: there is none.

    >>> blocks_of(nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])))
    ['1.0', '1.1']
    """
    if not (found := _blocks(model)):
        raise ValueError("adapt_last needs a model that is a list of blocks, and this one is none: leave it out.")
    return found


def _blocks(model: nn.Module) -> list[str]:
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len({type(child) for child in module}) != 1:
            continue
        adaptable = any(is_linear(part) or isinstance(part, DPLoRALinear) for part in module[0].modules())
        if adaptable and len(module) > max(len(found), 1):
            found = [f"{name}.{place}" if name else str(place) for place in range(len(module))]
    return found
