"""The noise in the gradients of a private step, for optimizers that use it (:mod:`lora_dp.optim.known_noise`)."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_dp.engine.step_options import StepOptions
from lora_dp.engine.validation import PrivateParameter
from lora_dp.nn.regulator import Regulator
from lora_dp.optim.disk import DiSK
from lora_dp.optim.known_noise import NoiseStd, noise_aware
from lora_dp.privacy.filter_gain import filter_gain
from lora_dp.privacy.filtering import Filter
from lora_dp.privacy.mechanism import Mechanism


def check_noise_can_be_told(optimizer: torch.optim.Optimizer, options: StepOptions) -> None:
    """Refuse what an optimizer that uses the noise cannot be told.

    Raises:
        ValueError: noise that is correlated, or that shrinkage or a filter after a regulator would change; whatever the
            optimizer itself refuses, as a noise that it was given.
    """
    aware = noise_aware(optimizer)
    if options.correlated_noise is not None and (aware is not None or isinstance(optimizer, DiSK)):
        raise ValueError(
            f"{type(optimizer).__name__} takes noise for independent from step to step, which correlated_noise makes "
            "it not: leave out one of them."
        )
    if aware is None:
        return
    if options.shrinkage is not None:
        raise ValueError(
            f"{type(optimizer).__name__} must know the noise, and what {options.shrinkage} leaves of it depends on the "
            "gradient: leave out one of them."
        )
    if options.regulate_noise and options.low_pass is not None:
        raise ValueError(
            f"{type(optimizer).__name__} must know the noise of each entry, which regulate_noise and low_pass together "
            "leave uneven: leave out one of them."
        )
    aware.set_noise_std({})


def noise_of_batch(trained: Sequence[PrivateParameter], mechanism: Mechanism, expected_batch_size: int) -> float:
    """σC/L, the grid's rounding included: what every entry of the noised sum over L has."""
    return mechanism.noise_std(sum(p.parameter.numel() for p in trained)) / expected_batch_size


def noise_in_gradients(
    trained: Sequence[PrivateParameter], std: float, low_pass: Filter | None, regulators: Mapping[int, Regulator]
) -> dict[Tensor, NoiseStd]:
    """Standard deviation of the noise in what the wrapped optimizer finds in ``.grad``, by parameter.

    - A low-pass filter F leaves the share trace(FᵀF)/n of its energy. Near the ends of a
      :class:`lora_dp.GaussianFilter` a little more is left than elsewhere; this is the mean.
    - A regulator makes Z·M⁻¹ of it, whose column j has √(M⁻²)ⱼⱼ of the deviation, or M⁻¹·Z, with row i in its place.

    Args:
        trained: the parameters of this step.
        std: of the noise before the two, :func:`noise_of_batch`.
        low_pass: the filter on LoRA's factors.
        regulators: by ``id`` of the parameter; not together with a filter.

    Returns:
        A number, or (r,) for B and (r, 1) for A where there is a regulator.
    """
    stds: dict[Tensor, NoiseStd] = {}
    for p in trained:
        regulator = regulators.get(id(p.parameter))
        if regulator is not None:
            # M⁻¹ is symmetric: the squares of a row and of a column add up alike.
            lengths = regulator.inverse.double().norm(dim=1)
            stds[p.parameter] = std * (lengths if regulator.trained == "B" else lengths.unsqueeze(1))
        elif low_pass is not None and p.factor is not None:
            rows, columns = p.parameter.shape
            stds[p.parameter] = std * math.sqrt(filter_gain(low_pass, (rows, columns)))
        else:
            stds[p.parameter] = std
    return stds
