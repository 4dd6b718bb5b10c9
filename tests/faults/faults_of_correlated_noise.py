"""Faults of correlated noise and of its groups: what plants each, and what catches it."""

from typing import Any

import torch
from torch import Tensor

from lora_dp.engine.cycle import Cycle
from lora_dp.privacy.correlated_noise import BandedSource, CorrelatedMechanism
from lora_dp.privacy.cyclic_sampling import CyclicSampler
from tests.faults.planting import Fault, Planting

_PRIVACY, _ENGINE = "tests/privacy/test_correlated_noise.py", "tests/engine/test_cycle.py"
_NEW_NOISE = (
    f"{_PRIVACY}::test_every_release_has_new_noise_of_the_stated_deviation[4]",
    f"{_ENGINE}::test_what_the_optimizer_gets_has_new_noise_in_each_step[native]",
)


def no_new_noise(planting: Planting) -> None:
    def planted(draw: Any) -> Any:
        def later(self: BandedSource, *rest: Any) -> list[Tensor]:
            noise: list[Tensor] = draw(self, *rest)
            if len(self._past) > 1:
                for place, value in enumerate(noise):
                    past = list(self._past)[1:]
                    sums = sum(c * step[place] for c, step in zip(self._whole, past, strict=False))
                    value.copy_(-torch.as_tensor(sums) >> 16)
            return noise

        return later

    planting.replace(BandedSource, "rounded_gaussians", planted)


def a_turn_moves_more_than_its_noise_is_for(planting: Planting) -> None:
    planting.replace(
        CorrelatedMechanism,
        "noise_std",
        lambda std: lambda self, size: std(self, size) / 1.2247,  # ‖c‖ of four bands
    )


def groups_not_kept(planting: Planting) -> None:
    def planted(self: CyclicSampler) -> list[int]:
        drawn: list[int] = torch.nonzero(self.source.uniform(self.size) < self.sample_rate).flatten().tolist()
        return drawn

    planting.replace(CyclicSampler, "draw", lambda _: planted)


def turns_out_of_step(planting: Planting) -> None:
    planting.replace(Cycle, "check", lambda _: lambda self, step: None)


CORRELATED_NOISE = [
    Fault(
        "correlated noise without any that is new",
        "later steps take earlier noise back and add none: their sums can be solved for.",
        no_new_noise,
        _NEW_NOISE,
    ),
    Fault(
        "correlated noise for one step of a turn",
        "an example moves the releases of b steps, and the noise is made for one.",
        a_turn_moves_more_than_its_noise_is_for,
        (*_NEW_NOISE, f"{_PRIVACY}::test_noise_is_for_all_that_a_turn_moves[2-0.7]"),
    ),
    Fault(
        "groups that are not kept",
        "an example takes part in steps that share noise, and in more than are counted.",
        groups_not_kept,
        (
            "tests/privacy/test_cyclic_sampling.py::test_an_example_is_drawn_in_the_turns_of_its_group_alone_at_the_rate",
            f"{_ENGINE}::test_each_example_takes_part_in_turns_of_its_group_alone",
        ),
    ),
    Fault(
        "a step by hand that shifts the groups' turns",
        "two turns of an example come nearer than the bands of the noise.",
        turns_out_of_step,
        (f"{_ENGINE}::test_a_step_beside_the_loaders_is_noticed",),
    ),
]
