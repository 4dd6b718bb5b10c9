"""Makes the embedded default model: a tiny vision transformer pretrained on public handwritten digits.

The augmentation imitates how digits are collected elsewhere (tight crops, slant, thick and thin strokes,
coarse scans, ink of any contrast), so that the features carry over to other sets of digits.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_dp.fed.data.encoding import ImageSpec, RawData, encode
from lora_dp.fed.data.opening import open_data
from lora_dp.fed.data.options import DataConfig
from lora_dp.fed.models.loading import build_default, logits
from lora_dp.fed.models.options import PretrainConfig

ARCHITECTURE: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "class_token": False,
    "global_pool": "avg",
}
MEAN, STD = 0.5, 0.5
CANVAS = 28
COARSE = 8


def pretrain(config: PretrainConfig) -> Path:
    """Trains the default model, writes weights (float16) and their description, returns the weights' path.

    Raises:
        ValueError: the data set cannot be opened or does not hold images with labels; settings below 1.
    """
    if config.epochs < 1 or config.batch_size < 1:
        raise ValueError(f"epochs {config.epochs} and batch_size {config.batch_size} must be at least 1")
    raw = open_data(DataConfig(dataset=config.dataset))
    train = encode(raw, ImageSpec(CANVAS, CANVAS, ARCHITECTURE["in_chans"], (0.0,), (1.0,))).train
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(config.seed)
        model = build_default(ARCHITECTURE, raw.num_labels)
    steps = config.epochs * -(-len(train) // config.batch_size)
    rate, decay = config.learning_rate, config.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    columns = (TextColumn("pretraining, loss {task.fields[loss]:.3f}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        bar = progress.add_task("pretraining", total=steps, loss=float("nan"))
        for _ in range(config.epochs):
            for rows in torch.randperm(len(train), generator=generator).split(config.batch_size):
                batch = train.batch(rows)
                images = augment(batch["pixel_values"], ARCHITECTURE["img_size"], generator)
                predicted = model((images - MEAN) / STD)
                loss = F.cross_entropy(predicted, batch["labels"], label_smoothing=config.label_smoothing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update(bar, advance=1, loss=loss.item())
    return _save(model, raw, config)


def _resize(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def augment(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Random variants (N, 1, size, size) of white-on-black images (N, 1, H, W) in [0, 1]."""
    n, _, height, width = images.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    def chosen(probability: float) -> Tensor:
        return (torch.rand(n, generator=generator) < probability).view(n, 1, 1, 1)

    def per_image(values: Tensor) -> Tensor:
        return values.view(n, 1, 1, 1)

    # zoom below 1 crops tightly; then slant, turn, shift and bend
    angle, slant, zoom_y = uniform(-0.3, 0.3), uniform(-0.3, 0.3), uniform(0.62, 1.05)
    zoom_x = zoom_y * uniform(-0.25, 0.25).exp()
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([zoom_x * cos, zoom_x * (slant * cos - sin), uniform(-0.12, 0.12)], 1)
    row_y = torch.stack([zoom_y * sin, zoom_y * (slant * sin + cos), uniform(-0.12, 0.12)], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), [n, 1, height, width], align_corners=False)
    bend = F.interpolate(torch.randn(n, 2, 5, 5, generator=generator), size=(height, width), mode="bicubic")
    grid = grid + bend.permute(0, 2, 3, 1) * per_image(uniform(0.0, 0.075))
    images = F.grid_sample(images, grid, align_corners=False)

    # pens: a quarter of the images thicker, a quarter thinner
    pen = per_image(uniform(0.0, 1.0))
    thick, thin = F.max_pool2d(images, 3, 1, 1), -F.max_pool2d(-images, 3, 1, 1)
    thicker = images + per_image(uniform(0.2, 1.0)) * (thick - images)
    thinner = images + 0.6 * per_image(uniform(0.2, 1.0)) * (thin - images)
    images = torch.where(pen < 0.25, thicker, torch.where(pen < 0.5, thinner, images))

    # scans: some of few pixels; then contrast and grain
    images = _resize(images, size)
    coarse = _resize(_resize(images, COARSE), size)
    images = torch.where(chosen(0.4), coarse, images)
    images = (images * per_image(uniform(0.7, 1.15))).clamp(0, 1).pow(per_image(uniform(-0.5, 0.5).exp()))
    grain = torch.randn(images.shape, generator=generator) * per_image(uniform(0.0, 0.08))
    return (images + grain).clamp(0, 1)


@torch.no_grad()
def _save(model: nn.Module, raw: RawData, config: PretrainConfig) -> Path:
    """Writes weights and description; the accuracy is that of the float16 weights as users load them."""
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    model.eval()
    size = ARCHITECTURE["img_size"]
    splits = encode(raw, ImageSpec(size, size, ARCHITECTURE["in_chans"], (MEAN,), (STD,)))
    validation, pixels = splits.validation, splits.train.content()["pixels"].float() / 255
    hits = [(logits(model, batch).argmax(1) == batch["labels"]).sum() for batch in validation.batches(500)]
    folder = Path(config.dataset).expanduser()
    dataset = folder.resolve().name if folder.exists() else config.dataset
    card = {
        "architecture": ARCHITECTURE,
        "num_labels": raw.num_labels,
        "mean": [MEAN],
        "std": [STD],
        "pixels": [round(float(pixels.mean()), 4), round(float(pixels.std((1, 2, 3)).mean()), 4)],
        "dataset": dataset,
        "training_images": len(raw.train_labels),
        "validation_images": len(validation),
        "validation_accuracy": round(float(sum(hits)) / len(validation), 4),
        "settings": {name: value for name, value in asdict(config).items() if name not in ("dataset", "output")},
        "command": f"lora-dp pretrain --dataset {dataset}",
    }
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, output)
    output.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")
    return output
