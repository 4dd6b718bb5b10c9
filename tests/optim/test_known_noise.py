"""Which optimizers are told the noise: those that have the method, whatever their class."""

import torch

from lora_dp.optim.adam_bc import AdamBC
from lora_dp.optim.known_noise import noise_aware


class Told(torch.optim.SGD):
    def set_noise_std(self, stds):
        self.stds = stds


class Declines(torch.optim.SGD):
    set_noise_std = None


def test_whoever_has_the_method_is_told():
    weight = [torch.nn.Parameter(torch.zeros(1))]
    for optimizer in (Told(weight), AdamBC(weight)):
        assert noise_aware(optimizer) is optimizer
    for optimizer in (torch.optim.SGD(weight), Declines(weight)):
        assert noise_aware(optimizer) is None
