"""A private update to be solved: parameters, gradients, states of optimizers, in any dtype and layout."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_dp.kernels.optimizer_rows import adam_row, sgd_row
from lora_dp.ops.native import native
from lora_dp.ops.private_update import ExampleSum, private_update_

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIMIZERS = ["sgd", "momentum", "nesterov", "adam", "adamw"]
# Tiles have 4096 elements on a CPU and 1024 on a GPU.
SHAPES = [(), (1,), (7,), (5, 3), (3, 5), (1, 4), (0, 4), (4097,), (16, 700), (1100, 8), (4096,), (1500, 3), (900, 5)]
KEY = native.key_from(bytes(range(32)))
STEP = 2.0**-31


class Problem:
    """Random parameters, sums and states; ``take`` runs one update, ``tensors`` is all that it may change."""

    def __init__(
        self,
        optimizer: str,
        dtype: torch.dtype,
        shapes: Sequence[Sequence[int]] = SHAPES,
        *,
        examples: int = 0,
        noisy: bool = True,
        strength: float = 0.0,
        device: str = "cpu",
        sum_dtype: torch.dtype | None = None,
    ):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

        wide = sum_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
        self.parameters = [draw(*shape) for shape in shapes]
        self.sums: list[Any] = [draw(*shape, dtype=wide) for shape in shapes]
        if examples:
            weights = torch.rand(examples, generator=generator, dtype=torch.float64).to(device)
            weights[0] = 0
            gradients = [draw(examples, *shape, dtype=wide) for shape in shapes]
            for gradient in gradients:
                gradient[0] = math.nan  # an excluded example may hold anything
            self.sums = [ExampleSum(gradient, weights.clone()) for gradient in gradients]
        self.kind = {"nesterov": "momentum"}.get(optimizer, optimizer)
        states = {"sgd": 0, "momentum": 1}.get(self.kind, 2)
        self.first = [draw(*shape) for shape in shapes] if states else []
        self.second = [draw(*shape).square() for shape in shapes] if states > 1 else []
        self.gradients = [draw(*shape) for shape in shapes]
        if self.kind in ("adam", "adamw"):
            self.hyper = [adam_row(0.03, step=3, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-3)] * len(shapes)
        else:
            self.hyper = [
                sgd_row(
                    0.1,
                    weight_decay=0.05,
                    momentum=0.9,
                    dampening=0.2,
                    nesterov=optimizer == "nesterov",
                    first_step=p % 2 == 0,
                )
                for p in range(len(shapes))
            ]
        self.options = {
            "scale": 1.3 * 2**32 if noisy else 0.0,
            "step": STEP,
            "expected_batch_size": 7.0,
            "key": KEY,
            "draw": 5,
            "filtered": [len(shape) == 2 and bool(strength) for shape in shapes],
            "filter_strength": strength,
        }

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.parameters, *self.first, *self.second, *self.gradients]

    def take(self, **changes: Any) -> list[Tensor]:
        private_update_(
            self.parameters,
            self.sums,
            self.first,
            self.second,
            self.gradients,
            self.hyper,
            optimizer=self.kind,
            **{**self.options, **changes},
        )
        return self.tensors


def same_bits(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(
        torch.equal(
            a.cpu().view(torch.uint8) if a.dim() else a.cpu(), b.cpu().view(torch.uint8) if b.dim() else b.cpu()
        )
        for a, b in zip(left, right, strict=True)
    )


def plain_sgd(
    theta: Tensor, total: Any, *, gradients: Sequence[Tensor] = (), lr: float = 1.0, scale: float = 0.0
) -> None:
    """θ ← θ − lr · (total, noised at this scale)."""
    private_update_(
        [theta],
        [total],
        [],
        [],
        gradients,
        [sgd_row(lr)],
        optimizer="sgd",
        key=KEY,
        draw=0,
        scale=scale,
        step=STEP,
        expected_batch_size=1.0,
        filtered=[False],
        filter_strength=0.0,
    )
