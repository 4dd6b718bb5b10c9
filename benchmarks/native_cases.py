"""The native ops and their rivals: bytes of ChaCha20 beside OpenSSL's, the private update beside torch's optimizers."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lora_dp.kernels.optimizer_rows import adam_row
from lora_dp.ops.native import native
from lora_dp.ops.private_update import ExampleSum, private_update_
from lora_dp.privacy.noise import grid_step
from lora_dp.privacy.randomness import SecureSource

BYTES = 1 << 26
EXPECTED = 32.0
STRENGTH = 0.5
Call = Callable[[], object]


@dataclass(frozen=True)
class Adapters:
    """As many matrices of one shape, and the examples whose gradients a step sums."""

    name: str
    count: int
    shape: tuple[int, int]
    examples: int


ADAPTERS = [Adapters("48 adapters of 768 × 16", 48, (768, 16), 32), Adapters("16 adapters of 64 × 4", 16, (64, 4), 32)]


def keystreams() -> dict[str, Call]:
    """Ways to 64 MiB of ChaCha20, by name; the first is the yardstick."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    key, nonce, zeros, out = bytes(range(32)), bytes(16), bytes(BYTES), np.empty(BYTES + 64, np.uint8)
    buffer = memoryview(out)

    def openssl() -> None:
        Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor().update_into(zeros, buffer)

    def ours(instructions: str) -> Call:
        return lambda: native.keystream(key, nonce[:12], 0, out.ctypes.data, BYTES, instructions)

    ways: dict[str, Call] = {"OpenSSL (cryptography)": openssl}
    for instructions in ("avx512", "avx2", "portable"):
        try:
            native.keystream(key, nonce[:12], 0, 0, 0, instructions)
        except ValueError:
            continue
        ways[f"lora-dp, {instructions}"] = ours(instructions)
    return ways


def _adamw(parameters: list[Tensor], **options: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW([p.requires_grad_() for p in parameters], lr=1e-4, **options)  # type: ignore[arg-type]


def updates(adapters: Adapters, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """Ways from clipped sums to new parameters by AdamW, by name; the first is the yardstick.

    Without a filter, since torch's optimizers have none; the last two ways of ours add one, and the sum over examples.
    """

    def draw(*more: int) -> list[Tensor]:
        return [torch.randn((*more, *adapters.shape), device=device) for _ in range(adapters.count)]

    def torchs(noise: Callable[[Tensor], Tensor], **options: bool) -> Call:
        parameters, sums = [p.to(dtype) for p in draw()], draw()
        optimizer = _adamw(parameters, **options)

        def step() -> None:
            for parameter, total in zip(parameters, sums, strict=True):
                parameter.grad = noise(total).div_(EXPECTED).to(dtype)
            optimizer.step()

        return step

    def ours(*, strength: float = 0.0, summed: bool = True, noisy: bool = True) -> Call:
        parameters, first, second = ([p.to(dtype) for p in draw()] for _ in range(3))
        second = [each.square() for each in second]
        sums: list[Tensor | ExampleSum] = list(draw())
        if not summed:
            weights = torch.rand(adapters.examples, dtype=torch.float64, device=device)
            sums = [ExampleSum(each, weights) for each in draw(adapters.examples)]
        source, step, count = SecureSource(), grid_step(1.0, 1.0), itertools.count(1)

        def update() -> None:
            draw_ = source.next_draw()
            rows = [adam_row(1e-4, weight_decay=0.01, step=next(count))] * adapters.count
            private_update_(
                parameters,
                sums,
                first,
                second,
                [],
                rows,
                optimizer="adamw",
                key=draw_.key,
                draw=draw_.number,
                scale=1.0 / step if noisy else 0.0,
                step=step,
                expected_batch_size=EXPECTED,
                filtered=[strength > 0] * adapters.count,
                filter_strength=strength,
            )

        return update

    def generator_noise(total: Tensor) -> Tensor:
        return total + torch.randn_like(total)

    return {
        "torch.randn, AdamW foreach": torchs(generator_noise, foreach=True),
        "torch.randn, AdamW fused": torchs(generator_noise, fused=True),
        "torch.randn in float64, AdamW foreach": torchs(
            lambda total: total + torch.randn(total.shape, dtype=torch.float64, device=device).to(total.dtype),
            foreach=True,
        ),
        "lora-dp": ours(),
        "lora-dp without noise": ours(noisy=False),
        "lora-dp with a low-pass filter": ours(strength=STRENGTH),
        f"lora-dp with filter and the sum over {adapters.examples} examples": ours(strength=STRENGTH, summed=False),
    }
