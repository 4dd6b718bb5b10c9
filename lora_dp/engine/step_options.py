"""How a private step is taken, beside its noise and its bound: one object from the engine to the optimizer."""

from dataclasses import dataclass
from typing import get_args

from lora_dp.argument_checks import check_count, check_flag, check_kind
from lora_dp.engine.phases import Phases
from lora_dp.isolation.loss_checks.graph import LossReduction
from lora_dp.nn.per_example import NormMethod
from lora_dp.privacy.adaptive_clipping import AdaptiveClipping
from lora_dp.privacy.clipping import ClippingName
from lora_dp.privacy.correlated_noise import BandedNoise
from lora_dp.privacy.filtering import Filter, check_filter
from lora_dp.privacy.shrinkage import Shrinkage, check_shrinkage


@dataclass(frozen=True)
class StepOptions:
    """What :meth:`lora_dp.PrivacyEngine.make_private` takes by these names, where each is explained.

    Raises:
        ValueError: a choice that is none, fewer views than one, or ``regulate_noise`` with phases "AB";
            or ``correlated_noise`` with what changes the noise from step to step.
        TypeError: a value of another type.
    """

    clipping: ClippingName | AdaptiveClipping = "flat"
    phases: Phases = "AB"
    loss_reduction: LossReduction = "mean"
    low_pass: Filter | None = None
    norm_method: NormMethod = "auto"
    regulate_noise: bool = False
    shrinkage: Shrinkage | None = None
    views: int = 1
    correlated_noise: BandedNoise | None = None

    def __post_init__(self) -> None:
        check_filter(self.low_pass)
        check_shrinkage(self.shrinkage)
        check_flag("regulate_noise", self.regulate_noise)
        check_count("views", self.views)
        for name, choices in (("loss_reduction", LossReduction), ("norm_method", NormMethod)):
            if (value := getattr(self, name)) not in (known := get_args(choices)):
                *others, last = map(repr, known)
                raise ValueError(f"Unknown {name} '{value}': choose {', '.join(others)} or {last}.")
        self._check_correlated()
        self.check_phases(self.phases)

    @property
    def groups(self) -> int:
        """Of examples, from which steps draw in turn; 1 for none."""
        return 1 if self.correlated_noise is None else self.correlated_noise.bands

    def _check_correlated(self) -> None:
        if self.correlated_noise is None:
            return
        check_kind("correlated_noise", self.correlated_noise, BandedNoise, "BandedNoise(bands=8) makes one")
        beside = {
            "AdaptiveClipping": isinstance(self.clipping, AdaptiveClipping),
            "regulate_noise": self.regulate_noise,
            "shrinkage": self.shrinkage is not None,
            "phases 'BA'": self.phases == "BA",
        }
        if clash := next((name for name, given in beside.items() if given), None):
            raise ValueError(
                f"Correlated noise takes back that of the last steps, and with {clash} it would be of another kind: "
                "leave out one of them."
            )

    def check_phases(self, phases: Phases) -> None:
        """Refuse phases that do not go with the other options.

        Raises:
            ValueError: noise that is regulated follows one trained factor beside a frozen one; noise that is correlated
                goes on from step to step.
        """
        if self.correlated_noise is not None and phases != self.phases:
            raise ValueError(
                f"Correlated noise takes back that of steps with phases '{self.phases}': call make_private again for "
                f"'{phases}'."
            )
        if self.regulate_noise and phases == "AB":
            raise ValueError("regulate_noise needs steps that train one factor beside a frozen one: not phases 'AB'.")
