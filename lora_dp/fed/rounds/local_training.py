"""How clients train between two exchanges."""

from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lora_dp.engine.phases import Phases
from lora_dp.fed.data.augmentation import Views
from lora_dp.fed.data.examples import Batch
from lora_dp.fed.methods import factor
from lora_dp.fed.models.loading import logits
from lora_dp.fed.models.options import Precision
from lora_dp.fed.models.task_losses import task_losses
from lora_dp.fed.server_options import Averaging, ServerOptimizerName
from lora_dp.losses import classification_loss, feature_sums_loss
from lora_dp.nn.feature_head import FeatureHead, feature_head_of
from lora_dp.nn.feature_sums import FeatureSums, SumWeights
from lora_dp.privacy.accounting import PoissonGaussian
from lora_dp.privacy.adaptive_clipping import AdaptiveClipping
from lora_dp.privacy.clipping import ClippingName
from lora_dp.privacy.filtering import Filter, FilterName

SUM_WEIGHTS = SumWeights()
Kind: TypeAlias = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
MakeOptimizer: TypeAlias = Callable[[Kind, list[dict[str, Any]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class LocalTraining:
    """How clients train: alike for all of them.

    Attributes:
        learning_rate: of A and the head; B's is this times `lr_ratio`.
        balanced, warm_start: what the released feature sums are used for, beside centring and scaling.
        server_optimizer, server_learning_rate, averaging: what the server does with the mean of a round.
        views: of each image in a step.
    """

    optimizer: Literal["sgd", "adamw"]
    learning_rate: float
    lr_ratio: float
    low_pass: FilterName | None
    low_pass_strength: float
    batch_size: int
    local_steps: int
    precision: Precision = "float32"
    server_optimizer: ServerOptimizerName = "average"
    server_learning_rate: float = 1.0
    averaging: Averaging = "none"
    balanced: bool = False
    warm_start: bool = False
    views: Views = Views()

    def make_optimizer(self, model: nn.Module, make: MakeOptimizer | None = None) -> torch.optim.Optimizer:
        """A fresh optimizer over the model's trainable parameters, B's with its own learning rate.

        Args:
            model: with the parameters.
            make: makes it, of a kind or another, from groups of parameters; by default that kind itself does.
        """
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in trainable if factor(name) != "B"], "lr": self.learning_rate},
            {"params": [p for name, p in trainable if factor(name) == "B"], "lr": self.learning_rate * self.lr_ratio},
        ]
        kind: Kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[self.optimizer]
        return kind(groups) if make is None else make(kind, groups)


@dataclass(frozen=True)
class LocalSteps:
    """The private steps of one turn.

    Attributes:
        event: each of them; without noise where no example is protected.
        batch_size: expected.
        rows: of a batch that the model is given at once, about.
        count: how many steps.
        first: number of the first one in the run.
        bound, clipping, phases, low_pass, regulate_noise: as the engine takes them.
        optimizer: makes one over what is trained.
        sums: whether the model's outputs are scores of feature sums.
        views: of each example.
    """

    event: PoissonGaussian
    batch_size: int
    rows: int
    count: int
    first: int
    bound: float
    clipping: ClippingName | AdaptiveClipping
    phases: Phases
    low_pass: Filter | None
    regulate_noise: bool
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    sums: bool = False
    views: Views = Views()

    @classmethod
    def of_sums(cls, event: PoissonGaussian, sums: FeatureSums, rows: int, examples: Sized) -> "LocalSteps":
        """One step on all examples, which from zero releases their feature sums."""
        return cls(
            event=event,
            batch_size=len(examples),
            rows=rows,
            count=1,
            first=0,
            bound=sums.sensitivity if event.noise_multiplier else float("inf"),
            clipping="flat",
            phases="AB",
            low_pass=None,
            regulate_noise=False,
            optimizer=lambda _: torch.optim.SGD(sums.parameters(), lr=1.0),
            sums=True,
        )

    def losses(self, model: nn.Module, batch: Batch, precision: Precision, *, made_up: bool = False) -> Tensor:
        """Of each example of a batch, (N,).

        Args:
            model: that is trained.
            batch: encoded, with "labels".
            precision: in which the model runs.
            made_up: the labels of classes are any numbers, of which the remainder counts.
        """
        if not (self.sums or made_up) or batch["labels"].dim() == 2:
            return task_losses(model, batch, precision)
        scores, labels = logits(model, batch, precision), batch["labels"]
        labels = labels % (scores.shape[1] - self.sums) if made_up else labels
        return feature_sums_loss(scores, labels) if self.sums else classification_loss(scores, labels)


@contextmanager
def summing(model: nn.Module) -> Iterator[FeatureSums]:
    """Inside, the model returns scores of feature sums, which alone are trained; dropout is off in front of its head.

    Raises:
        ValueError: the model has no feature head.
    """
    name, head = summed_head(model)
    frozen = [p for p in model.parameters() if p.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    with head.summing(SUM_WEIGHTS) as sums:
        model.train()
        for inside, module in model.named_modules():
            if module is not model and not f"{name}.".startswith(f"{inside}."):
                module.training = False
        head.train()
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield sums
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
            for module, mode in modes:
                module.training = mode


def summed_head(model: nn.Module) -> tuple[str, FeatureHead]:
    """The name and the module of the head whose features are summed.

    Raises:
        ValueError: the model has no feature head.
    """
    found = feature_head_of(model)
    if found is None:
        raise ValueError("Feature sums need a head on features of unit length: choose features unit or mean.")
    return found
