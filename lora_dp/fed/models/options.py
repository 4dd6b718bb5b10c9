"""Options of the model and its adapters, and of how the embedded model is made."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lora_dp.fed.option_types import check_types
from lora_dp.lora.config import LoRAConfig
from lora_dp.nn.adapter_start import InitA

Precision = Literal["float32", "bf16"]
Features = Literal["auto", "own", "unit", "mean", "fitting"]
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
    adapt_last: int | None = None
    """Adapt the last N blocks alone; what lies before them is computed once for each example and kept in memory."""
    init_a: InitA = "kaiming"
    """How A starts, and how rac-lora and flora draw it anew: kaiming (uniform), or orthonormal (rows at right angles,
    of the same mean square)."""
    precision: Precision = "float32"
    """float32, or bf16: products in half precision (autocast), norms, sums and weights in float32."""
    features: Features = "auto"
    """What the head is given: own: the model's own head as it is; unit: what that head is given, at unit length; mean:
    means over tokens after feature_blocks; auto: mean where the model says so, else own; fitting: unit where the model
    brings a head for these classes, else mean with whitening made-up and, for images, contrast model."""
    feature_blocks: list[int] = field(default_factory=lambda: [-1])
    """With features mean: after which blocks, from 1, or from the last as in -1; several are put side by side."""
    contrast: Literal["as-is", "model"] = "as-is"
    """For images: as they are, or each with the mean and deviation of those that the model was trained on."""
    whitening: Literal["none", "made-up"] = "none"
    """With features mean: turn and scale features by those of made-up images or texts, which are public."""
    class_texts: list[str] | Literal["names"] | None = None
    """With features mean, for texts: a new head begins with a public text about each class, in the order of the labels,
    as in --class-texts "[a bad film, a good film]"; names: the data's own names of classes."""
    pretrained: bool = True
    """Load a timm model's published weights (a download); false starts it at random."""

    def __post_init__(self) -> None:
        check_types(self, {"name": "model"})
        if self.adapt_last is not None and (self.adapt_last < 1 or self.target_modules != "all-linear"):
            raise ValueError(
                f"adapt_last is a number of blocks from 1, whose linear layers are all adapted, not {self.adapt_last} "
                f"with target_modules {self.target_modules}: leave one of them out."
            )
        if not self.feature_blocks or 0 in self.feature_blocks:
            raise ValueError(
                f"feature_blocks must name blocks from 1, or from the last as in -1, not {self.feature_blocks}."
            )
        if self.features in ("own", "unit") and (self.feature_blocks != [-1] or self.whitening != "none"):
            raise ValueError("feature_blocks and whitening have no effect without features mean: leave them out.")
        if self.class_texts is not None and self.features in ("own", "unit"):
            raise ValueError(
                f"class_texts start a new head on features mean, not {self.features}: leave them out, or choose these."
            )
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
