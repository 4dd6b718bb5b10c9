"""Options of the model and its adapters, and of how the embedded model is made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_dp.fed.option_types import check_types
from lora_dp.lora.config import LoRAConfig
from lora_dp.nn.adapter_start import InitA

Precision = Literal["float32", "bf16"]
DEFAULT_WEIGHTS = Path(__file__).parent / "weights" / "digits_vit.safetensors"


@dataclass
class ModelConfig:
    """The backbone and its adapters."""

    name: str = "default"
    """"default" (embedded vision transformer), a timm name, or a Transformers hub name or local folder."""
    r: int = 4
    """Rank of the adapters."""
    alpha: float | None = None
    """LoRA's alpha: the adapters' output is scaled by alpha / r; alpha = r when left out."""
    dropout: float = 0.0
    """Dropout on the adapters' input."""
    target_modules: list[str] | str = "all-linear"
    """Layers to adapt: "all-linear", a list of name endings, or a regular expression."""
    init_a: InitA = "kaiming"
    """How A starts, and how rac-lora and flora draw it anew: kaiming (uniform), or orthonormal (rows at right angles,
    of the same mean square)."""
    precision: Precision = "float32"
    """float32, or bf16: products in half precision (autocast), norms, sums and weights in float32."""
    pretrained: bool = True
    """Load a timm model's published weights (a download); false starts it at random."""

    def __post_init__(self) -> None:
        check_types(self, {"name": "model"})
        LoRAConfig(r=self.r, alpha=self.alpha, dropout=self.dropout)  # refuses what is out of range


@dataclass
class PretrainConfig:
    """How the embedded weights are made; the defaults are how they were made, up to the data set's name."""

    dataset: str = "ylecun/mnist"
    """Public images of digits: a hub name or a local folder that datasets.load_dataset opens."""
    output: Path = DEFAULT_WEIGHTS
    """Weights file to write (safetensors); its description goes beside it (json)."""
    epochs: int = 80
    """Passes over the training images."""
    batch_size: int = 128
    """Images a step."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW; a tenth of the steps warms up, the rest decays on a cosine."""
    weight_decay: float = 0.05
    """AdamW's weight decay."""
    label_smoothing: float = 0.05
    """Probability spread over the other classes."""
    seed: int = 0
    """Seed of initialisation, shuffling and augmentation."""
