"""What a private Trainer is told about privacy, beside ``TrainingArguments``."""

from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from lora_dp.argument_checks import check_flag, check_number
from lora_dp.engine.phases import Phases
from lora_dp.privacy.accounting import Accountant, check_delta, check_epsilon
from lora_dp.privacy.clipping import ClippingName


def _option(default: object, text: str) -> object:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class PrivacyArguments:
    """How private a run of :class:`lora_dp.PrivateTrainer` is. ``HfArgumentParser`` reads it from a command line.

    Args:
        target_epsilon: ε of the whole run; the noise is calibrated to it. Give this or ``noise_multiplier``.
        target_delta: δ, well below one over the number of training examples. It has to be given.
        noise_multiplier: σ, in units of ``clip_bound``, in place of a target ε.
        clip_bound: C, the most that one example's gradient may weigh in a step's sum, in the L2 norm.
        clipping: "flat", "per_layer" or "automatic", as of :meth:`lora_dp.PrivacyEngine.make_private`.
        phases: which of LoRA's factors each step trains: "AB" (both), "BA" (in turn), "B" or "A".
        unit: of privacy, what two neighbouring data sets differ by: "example", one of them.
        accountant: "pld" (tighter) or "rdp".
        reproducible_seed: sampling and noise follow this seed: for research only, since who guesses it sees through
            the noise.
        log_private_loss: log the loss of training batches, which no ε covers. It is left out otherwise.

    Raises:
        ValueError: not exactly one of ε and σ, no δ, or a value out of range.
        TypeError: a value of another type.

    >>> PrivacyArguments(target_epsilon=8, target_delta=1e-5).clip_bound
    1.0
    >>> PrivacyArguments(target_epsilon=8)
    Traceback (most recent call last):
    ValueError: Give target_delta, well below one over the number of training examples, such as 1e-5.
    """

    target_epsilon: float | None = _option(None, "ε of the whole run (this or --noise_multiplier).")  # type: ignore[assignment]
    target_delta: float | None = _option(None, "δ, well below one over the number of examples.")  # type: ignore[assignment]
    noise_multiplier: float | None = _option(None, "σ in units of --clip_bound (this or --target_epsilon).")  # type: ignore[assignment]
    clip_bound: float = _option(1.0, "C, the bound on the norm of each example's gradient.")  # type: ignore[assignment]
    clipping: ClippingName = _option("flat", "How gradients are clipped.")  # type: ignore[assignment]
    phases: Phases = _option("AB", "Which of LoRA's factors each step trains.")  # type: ignore[assignment]
    unit: Literal["example"] = _option("example", "The unit of privacy.")  # type: ignore[assignment]
    accountant: Accountant = _option("pld", "Which accountant computes ε.")  # type: ignore[assignment]
    reproducible_seed: int | None = _option(None, "Seed of sampling and noise: for research only.")  # type: ignore[assignment]
    log_private_loss: bool = _option(False, "Log the training loss, which no ε covers.")  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("Give either target_epsilon or noise_multiplier: one follows from the other.")
        if self.target_delta is None:
            raise ValueError("Give target_delta, well below one over the number of training examples, such as 1e-5.")
        for name in ("target_epsilon", "target_delta", "noise_multiplier", "clip_bound"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))
        if self.target_epsilon is not None:
            check_epsilon(self.target_epsilon)
        check_delta(self.target_delta)
        for name, kind in (("clipping", ClippingName), ("phases", Phases), ("accountant", Accountant)):
            if getattr(self, name) not in get_args(kind):
                choices = ", ".join(repr(choice) for choice in get_args(kind))
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        if self.unit != "example":
            raise ValueError(
                f"unit must be 'example', got {self.unit!r}: keep all data of a user in one row, or train each user as "
                "a client of lora_dp.fed with unit client."
            )
        check_flag("log_private_loss", self.log_private_loss)

    @property
    def delta(self) -> float:
        """``target_delta``, which there is.

        >>> PrivacyArguments(noise_multiplier=1.0, target_delta=1e-5).delta
        1e-05
        """
        assert self.target_delta is not None
        return self.target_delta

    def as_dict(self) -> dict[str, object]:
        """All settings by name, for files and reports.

        >>> PrivacyArguments(noise_multiplier=1.0, target_delta=1e-5).as_dict()["phases"]
        'AB'
        """
        return asdict(self)
