"""What a run has trained, on the disk and back in a model."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn

from lora_dp.atomic_files import write_bytes_atomically
from lora_dp.fed.methods import MERGED, State
from lora_dp.lora.loading import load_adapter
from lora_dp.nn.lora_linear import DPLoRALinear

MERGED_FILE = "merged.safetensors"


def save_merged(state: State, folder: Path) -> None:
    """Writes what methods that merge have added to frozen weights: (d_out, d_in) by layer; else nothing."""
    merged = {name.removesuffix(MERGED): tensor.cpu() for name, tensor in state.items() if name.endswith(MERGED)}
    if merged:
        write_bytes_atomically(folder / MERGED_FILE, save(merged))


@torch.no_grad()
def load_result(model: nn.Module, folder: Path) -> nn.Module:
    """Loads the result of a run's folder into a plain model, or one with the same adapters; returns it.

    Where the run's method has merged updates into frozen weights, these are moved too; ``original_weight`` of such a
    layer is then its weight before.

    Raises:
        FileNotFoundError: the run has left no adapter.
        ValueError: it was made for another model.
    """
    load_adapter(model, folder / "adapter")
    if (folder / MERGED_FILE).exists():
        layers = {name: m for name, m in model.named_modules() if isinstance(m, DPLoRALinear)}
        for name, change in load_file(folder / MERGED_FILE).items():
            layer = layers.get(name)
            if layer is None or change.shape != (layer.out_features, layer.in_features):
                raise ValueError(f"{folder / MERGED_FILE} was made for another model: {name!r} does not fit.")
            original = layer.weight.detach().clone()
            layer.weight.copy_(original + (change.t() if layer.fan_in_fan_out else change).to(original))
            layer.original_weight = original
    return model
