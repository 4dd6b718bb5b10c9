"""The kernels at the shapes where they matter: fresh inputs, our ways and torch's, and the bytes that must move."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lora_dp import GaussianFilter
from lora_dp.kernels import (
    adapted_product,
    clip_sum,
    example_grad,
    gram,
    lora_product,
    low_rank_update,
    noise_update,
    skinny_product,
)
from lora_dp.kernels.optimizer_rows import adam_row
from lora_dp.ops.lora_forward import lora_forward
from lora_dp.ops.per_example_grad import per_example_grad, per_example_grad_and_u
from lora_dp.ops.per_example_norm import ghost_sq_norm
from lora_dp.ops.private_update import private_update_
from lora_dp.ops.registry import reference_only
from lora_dp.privacy.noise import grid_step
from lora_dp.privacy.randomness import SecureSource

SCALE = 0.5
RANK = 8
DTYPES = (torch.bfloat16, torch.float32)

# Rows, d_in, d_out of the adapted layers of RoBERTa-base (32 × 128 tokens), Swin-B's four stages (32 images of 224²)
# and a Llama of a billion parameters (4 × 1024 tokens).
PRODUCTS = [
    (4096, 768, 768),
    (100352, 128, 384),
    (25088, 256, 768),
    (6272, 512, 1536),
    (6272, 512, 512),
    (1568, 1024, 3072),
    (4096, 2048, 2048),
    (4096, 2048, 512),
    (4096, 2048, 8192),
    (4096, 8192, 2048),
]
# Examples, tokens, width of the wide factor: g in the B phase, x in the A phase.
GRADIENTS = [
    (32, 128, 768),
    (32, 128, 3072),
    (32, 3136, 384),
    (32, 3136, 128),
    (32, 784, 768),
    (32, 784, 256),
    (32, 196, 1536),
    (32, 196, 512),
    (32, 49, 3072),
    (32, 49, 1024),
    (4, 1024, 2048),
    (4, 1024, 512),
    (4, 1024, 8192),
]
# Examples, tokens, both widths, of layers that are trained whole.
GRAMS = [(32, 1, 768, 768), (32, 49, 1024, 1024), (32, 128, 768, 768), (4, 1024, 2048, 2048)]
# Adapter matrices, their shape, examples: 24 adapted layers of 768 features at rank 16.
ADAPTERS = (48, (768, 16), 32)

Adapters = tuple[int, tuple[int, ...], int]


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Attributes:
        kernel: its name; "example_grad_u" is example_grad with u, as in the B phase.
        size: the shape, for people.
        dims: the shape.
        dtype: of the inputs.
        bytes_moved: the least traffic: every input read once, every output written once.
        inputs: draws fresh inputs on a device.
        ways: functions of the inputs by name. The first is the launcher, which also takes ``config``; the last is
            torch's, which gives the same outputs (more exactly for float64 inputs) unless ``checked`` is False.
        module: where the launcher is.
        graphed: whether a CUDA graph can hold the calls; not where tables go from the host to the device.
    """

    kernel: str
    size: str
    dims: tuple[int, ...]
    dtype: torch.dtype
    bytes_moved: int
    inputs: Callable[[torch.device], tuple[Any, ...]]
    ways: dict[str, Callable[..., tuple[Any, ...]]]
    module: ModuleType
    checked: bool = True
    graphed: bool = True

    def __str__(self) -> str:
        return f"{self.kernel}, {self.size}, {str(self.dtype).removeprefix('torch.')}"


def _drawn(dtype: torch.dtype, *shapes: tuple[int, ...]) -> Callable[[torch.device], tuple[Tensor, ...]]:
    """Standard normal tensors, divided by √(last size) so that products neither grow nor vanish."""

    def draw(device: torch.device) -> tuple[Tensor, ...]:
        return tuple(torch.randn(shape, device=device).div_(math.sqrt(shape[-1])).to(dtype) for shape in shapes)

    return draw


def _bytes(dtype: torch.dtype, *shapes: tuple[int, ...]) -> int:
    return dtype.itemsize * sum(math.prod(shape) for shape in shapes)


def skinny_case(M: int, K: int, r: int, dtype: torch.dtype) -> Case:
    """h = x aᵀ."""
    shapes = (M, K), (r, K)
    return Case(
        "skinny_product",
        f"{M} × {K}, r {r}",
        (M, K, r),
        dtype,
        _bytes(dtype, *shapes, (M, r)),
        _drawn(dtype, *shapes),
        {
            "triton": lambda x, a, **options: (skinny_product.skinny_product(x, a, **options),),
            "torch": lambda x, a: (x @ a.t(),),
        },
        skinny_product,
    )


def update_case(M: int, N: int, r: int, dtype: torch.dtype) -> Case:
    """y += s · h bᵀ."""

    def ours(y: Tensor, h: Tensor, b: Tensor, **options: Any) -> tuple[Tensor]:
        low_rank_update.add_low_rank_(y, h, b, SCALE, **options)
        return (y,)

    shapes = (M, N), (M, r), (N, r)
    return Case(
        "add_low_rank_",
        f"{M} × {N}, r {r}",
        (M, N, r),
        dtype,
        _bytes(dtype, *shapes, (M, N)),
        _drawn(dtype, *shapes),
        {"triton": ours, "torch": lambda y, h, b: (y.addmm_(h, b.t(), alpha=SCALE),)},
        low_rank_update,
    )


def product_case(M: int, K: int, N: int, r: int, dtype: torch.dtype) -> Case:
    """y = x Wᵀ + b + s · (x aᵀ) bᵀ, and h."""

    def reference(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        with reference_only():
            return lora_forward(x, weight, bias, a, b, SCALE)

    shapes = (M, K), (N, K), (N,), (r, K), (N, r)
    return Case(
        "lora_product",
        f"{M} × {K} → {N}, r {r}",
        (M, K, N, r),
        dtype,
        _bytes(dtype, *shapes, (M, N), (M, r)),
        _drawn(dtype, *shapes),
        {
            "fused": lambda *tensors, **options: lora_product.lora_product(*tensors, SCALE, **options),
            "two_step": lambda *tensors: adapted_product.two_step_product(*tensors, SCALE),
            "torch": reference,
        },
        lora_product,
    )


def gradient_case(n: int, tokens: int, width: int, r: int, b_phase: bool, dtype: torch.dtype) -> Case:
    """Gᵢ, ‖Gᵢ‖² and, in the B phase, u."""

    def ours(wide: Tensor, skinny: Tensor, *factor: Tensor, **options: Any) -> tuple[Any, ...]:
        return example_grad.example_grad(
            wide, skinny, SCALE, factor=factor[0] if factor else None, wide_first=b_phase, **options
        )

    def reference(wide: Tensor, skinny: Tensor, *factor: Tensor) -> tuple[Any, ...]:
        with reference_only():
            if not b_phase:
                gradients, norms = per_example_grad(skinny, wide, SCALE)
                return gradients, norms.square(), None
            gradients, norms, u = per_example_grad_and_u(wide, skinny, factor[0], SCALE)
            return gradients, norms.square(), u

    shapes: tuple[tuple[int, ...], ...] = ((n, tokens, width), (n, tokens, r))
    written = dtype.itemsize * n * tokens * r if b_phase else 0
    if b_phase:
        shapes += ((width, r),)
    return Case(
        "example_grad_u" if b_phase else "example_grad",
        f"{n} × {tokens} × {width}, r {r}",
        (n, tokens, width, r),
        dtype,
        _bytes(dtype, *shapes) + written + _bytes(torch.float32, (n, width, r), (n,)),
        _drawn(dtype, *shapes),
        {"triton": ours, "torch": reference},
        example_grad,
    )


def gram_case(n: int, tokens: int, p: int, q: int, dtype: torch.dtype) -> Case:
    """‖Σₜ leftₜ ⊗ rightₜ‖² from Gram matrices."""

    def reference(left: Tensor, right: Tensor) -> tuple[Tensor]:
        with reference_only():
            return (ghost_sq_norm(left, right, SCALE),)

    shapes = (n, tokens, p), (n, tokens, q)
    return Case(
        "gram_sq_norm",
        f"{n} × {tokens} × {p} and {q}",
        (n, tokens, p, q),
        dtype,
        _bytes(dtype, *shapes) + 4 * n,
        _drawn(dtype, *shapes),
        {
            "triton": lambda left, right, **options: (gram.gram_sq_norm(left, right, SCALE, **options),),
            "torch": reference,
        },
        gram,
    )


def _adapters(adapters: Adapters) -> tuple[str, tuple[int, ...]]:
    count, shape, n = adapters
    return f"{count} adapters of {' × '.join(map(str, shape))}, N = {n}", (count, *shape, n)


def _clip(gradients: list[Tensor], sq_norms: Tensor, layers: Tensor, **options: Any) -> tuple[Any, ...]:
    return clip_sum.clip_sum(
        gradients, range(len(gradients)), sq_norms, layers, len(gradients), "flat", 1.0, 0.01, None, 1.0, **options
    )


def _torch_clip(gradients: list[Tensor], sq_norms: Tensor, layers: Tensor) -> tuple[Any, ...]:
    c = (1 / sq_norms.sum(0).sqrt()).clamp(max=1)
    return c.expand_as(sq_norms), [(c @ each.flatten(1)).view(each.shape[1:]) for each in gradients]


def clip_case(adapters: Adapters) -> Case:
    """cᵢ and Σᵢ cᵢGᵢ of every adapter."""
    count, shape, n = adapters

    def draw(device: torch.device) -> tuple[Any, ...]:
        gradients = [torch.randn((n, *shape), device=device) for _ in range(count)]
        sq_norms = torch.stack([each.flatten(1).square().sum(1) for each in gradients])
        return gradients, sq_norms, torch.arange(count, device=device)

    return Case(
        "clip_sum",
        *_adapters(adapters),
        torch.float32,
        4 * (count * math.prod(shape) * (n + 2) + 2 * count * n),
        draw,
        {"triton": _clip, "torch": _torch_clip},
        clip_sum,
        graphed=False,
    )


def _noise(
    sums: list[Tensor],
    parameters: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    hyper: Tensor,
    rng: Tensor,
    optimizer: Any,
    **options: Any,
) -> tuple[()]:
    noise_update.noise_update(
        parameters,
        sums,
        first,
        second,
        hyper,
        rng,
        std=1.0,
        expected_batch_size=32.0,
        filter_strength=1.0,
        filtered=[True] * len(sums),
        optimizer="adamw",
        **options,
    )
    return ()


def _torch_noise(
    sums: list[Tensor], parameters: list[Tensor], first: Any, second: Any, hyper: Any, rng: Any, optimizer: Any
) -> tuple[()]:
    low_pass = GaussianFilter(1.0)
    for parameter, total in zip(optimizer.param_groups[0]["params"], sums, strict=True):
        parameter.grad = low_pass((total + torch.randn_like(total)) / 32.0).to(parameter.dtype)
    optimizer.step()
    return ()


def _drawn_states(adapters: Adapters, dtype: torch.dtype, device: torch.device) -> Any:
    count, shape, _ = adapters
    sums, first, second = ([torch.randn(shape, device=device) for _ in range(count)] for _ in range(3))
    parameters = [torch.randn(shape, device=device, dtype=dtype) for _ in range(count)]
    hyper = torch.tensor([adam_row(1e-4, weight_decay=0.01, step=3)] * count, device=device)
    optimizer = torch.optim.AdamW([parameter.requires_grad_() for parameter in parameters], lr=1e-4)
    return (
        sums,
        [parameter.detach() for parameter in parameters],
        first,
        [each.square() for each in second],
        hyper,
        torch.tensor([1, 2], device=device),
        optimizer,
    )


def noise_case(adapters: Adapters, dtype: torch.dtype) -> Case:
    """Noise, low-pass filter and AdamW on every adapter."""
    elements = adapters[0] * math.prod(adapters[1])
    return Case(
        "noise_update",
        *_adapters(adapters),
        dtype,
        elements * (4 + 2 * (dtype.itemsize + 4 + 4)),
        lambda device: _drawn_states(adapters, dtype, device),
        {"triton": _noise, "torch": _torch_noise},
        noise_update,
        checked=False,
        graphed=False,
    )


def _native(
    sums: list[Tensor],
    parameters: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    source: SecureSource,
    optimizer: Any,
) -> tuple[()]:
    step, draw = grid_step(1.0, 1.0), source.next_draw()
    private_update_(
        parameters,
        sums,
        first,
        second,
        [],
        [adam_row(1e-4, weight_decay=0.01, step=3)] * len(sums),
        optimizer="adamw",
        key=draw.key,
        draw=draw.number,
        scale=1.0 / step,
        step=step,
        expected_batch_size=32.0,
        filtered=[True] * len(sums),
        filter_strength=1.0,
    )
    return ()


def _torch_native(
    sums: list[Tensor], parameters: list[Tensor], first: Any, second: Any, source: Any, optimizer: Any
) -> tuple[()]:
    return _torch_noise(sums, parameters, first, second, None, None, optimizer)


def native_case(adapters: Adapters, dtype: torch.dtype) -> Case:
    """Cryptographic noise, low-pass filter and AdamW on every adapter, whose states have its dtype."""

    def draw(device: torch.device) -> tuple[Any, ...]:
        sums, parameters, first, second, _, _, optimizer = _drawn_states(adapters, dtype, device)
        return (
            sums,
            parameters,
            [each.to(dtype) for each in first],
            [each.to(dtype) for each in second],
            SecureSource(),
            optimizer,
        )

    elements = adapters[0] * math.prod(adapters[1])
    return Case(
        "private_update",
        *_adapters(adapters),
        dtype,
        elements * (4 + 6 * dtype.itemsize),
        draw,
        {"native": _native, "torch": _torch_native},
        noise_update,
        checked=False,
        graphed=False,
    )


def whole_update_case(adapters: Adapters, noise: Case) -> Case:
    """Clip and sum, then the noise, filter and AdamW of ``noise``: what follows the backward."""
    clip = clip_case(adapters)

    def draw(device: torch.device) -> tuple[Any, ...]:
        return (*clip.inputs(device), *noise.inputs(device)[1:])

    def joined(clip_way: Callable[..., Any], noise_way: Callable[..., Any]) -> Callable[..., tuple[()]]:
        def run(gradients: list[Tensor], sq_norms: Tensor, layers: Tensor, *states: Any) -> tuple[()]:
            return noise_way(clip_way(gradients, sq_norms, layers)[1], *states)

        return run

    return Case(
        f"clip_sum and {noise.kernel}",
        *_adapters(adapters),
        noise.dtype,
        clip.bytes_moved + noise.bytes_moved,
        draw,
        {way: joined(_torch_clip if way == "torch" else _clip, run) for way, run in noise.ways.items()},
        noise_update,
        checked=False,
        graphed=False,
    )


def single_kernels(rank: int = RANK) -> Iterator[Case]:
    """Every kernel that is tuned by itself, in every dtype and at every shape."""
    for dtype in DTYPES:
        for M, K in dict.fromkeys((M, width) for M, d_in, d_out in PRODUCTS for width in (d_in, d_out)):
            yield skinny_case(M, K, rank, dtype)
        for M, N in dict.fromkeys((M, width) for M, d_in, d_out in PRODUCTS for width in (d_out, d_in)):
            yield update_case(M, N, rank, dtype)
        for n, tokens, width in GRADIENTS:
            for b_phase in (True, False):
                yield gradient_case(n, tokens, width, rank, b_phase, dtype)
        for shape in GRAMS:
            yield gram_case(*shape, dtype)
        yield noise_case(ADAPTERS, dtype)
    yield clip_case(ADAPTERS)


def products(rank: int = RANK) -> Iterator[Case]:
    """Forward products, and those of the backward, whose d_in and d_out are exchanged."""
    for dtype in DTYPES:
        both = [(M, *pair) for M, d_in, d_out in PRODUCTS for pair in ((d_in, d_out), (d_out, d_in))]
        for shape in dict.fromkeys(both):
            yield product_case(*shape, rank, dtype)
