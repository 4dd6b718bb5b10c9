"""Clip coefficients cᵢ from norms, and Σᵢ cᵢGᵢ of every parameter, in one launch.

Each program sums one tile of one parameter over the examples in a fixed order, with coefficients that it works out
itself from the (P, N) norms: these are small and stay in cache, and a second launch would cost more. The last P
programs write the coefficients. Sums are in float64: no noise is matched to what a float32 sum rounds away.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_dp.kernels.clip_margin import MARGIN
from lora_dp.kernels.launching import Build, Config, check, multiprocessors, on_device, padded, pick
from lora_dp.kernels.tile_table import first_tiles, owner_of, send

CONFIGS = {
    "narrow": Config.of(4, 1, BLOCK_N=16, BLOCK_E=64),
    "medium": Config.of(4, 1, BLOCK_N=8, BLOCK_E=256),
    "wide": Config.of(8, 1, BLOCK_N=8, BLOCK_E=1024),
}

# Rows of norms read at once.
_BLOCK_P = 16


@triton.jit
def _power_of_two(exponent):
    """2 to that power, in float64, for exponents of normal numbers."""
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _exponent(x):
    """Of a float64 that is at least 0; 0 and subnormal numbers count as 2⁻¹⁰⁰⁰, the largest as 2¹⁰⁰⁰."""
    return tl.minimum(tl.maximum((x.to(tl.int64, bitcast=True) >> 52) - 1023, -1000), 1000)


@triton.jit
def _root(x):
    """√x to float32's precision in float64's range: float64 roots are calls, with a stack."""
    half = _exponent(x) >> 1
    return tl.sqrt_rn((x * _power_of_two(-2 * half)).to(tl.float32)).to(tl.float64) * _power_of_two(half)


@triton.jit
def _inverse(x):
    """1 / x, as :func:`_root`."""
    exponent = _exponent(x)
    near_one = (x * _power_of_two(-exponent)).to(tl.float32)
    return tl.div_rn(tl.full(near_one.shape, 1.0, tl.float32), near_one).to(tl.float64) * _power_of_two(-exponent)


@triton.jit
def _coefficients(
    sq_norms,
    norm_stride_p,
    norm_stride_n,
    layers,
    layer_stride,
    mask,
    mask_stride,
    row,
    examples,
    n,
    parameters,
    bound,
    gamma,
    scale,
    RULE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    inside = examples < n
    everything = tl.zeros((BLOCK_P, BLOCK_N), tl.float64)
    own_layer = tl.zeros((BLOCK_P, BLOCK_N), tl.float64)
    layer = tl.load(layers + row * layer_stride)
    for start in range(0, parameters, BLOCK_P):
        p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        squares = tl.load(
            sq_norms + p[:, None] * norm_stride_p + examples[None, :] * norm_stride_n,
            mask=(p < parameters)[:, None] & inside[None, :],
            other=0.0,
        )
        everything += squares
        if RULE == "per_layer":
            same = tl.load(layers + p * layer_stride, mask=p < parameters, other=0) == layer
            own_layer += tl.where(same[:, None], squares, 0.0)
    total = tl.sum(everything, 0)
    clipped = total
    if RULE == "per_layer":
        clipped = tl.sum(own_layer, 0)
    norm = _root(clipped) * scale
    coefficients = bound * _inverse(norm + gamma if RULE == "automatic" else norm)
    if RULE != "automatic":
        coefficients = tl.minimum(coefficients, 1.0)
    kept = inside & (tl.abs(total) < float("inf"))
    if mask is not None:
        kept = kept & (tl.load(mask + examples * mask_stride, mask=inside, other=0) != 0)
    return tl.where(kept, coefficients * scale, 0.0)


@triton.jit(do_not_specialize=["count", "tiles", "n", "parameters", "norm_stride_p", "layer_stride", "mask_stride"])
def _clip_sum_kernel(
    table,
    count,
    tiles,
    sq_norms,
    norm_stride_p,
    norm_stride_n,
    layers,
    layer_stride,
    mask,
    mask_stride,
    coefficients,
    sums,
    n,
    parameters,
    bound,
    gamma,
    scale,
    RULE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tile = tl.program_id(0)
    if tile < tiles:
        owner = owner_of(table + 5 * count, count, tile, PADDED)
        address = tl.load(table + owner)
        stride = tl.load(table + count + owner)
        row = tl.load(table + 2 * count + owner)
        start_of_tile = (tile - tl.load(table + 5 * count + owner)) * BLOCK_E
        # Inside a tile 32 bits are enough: wider offsets would take up registers.
        size = tl.minimum(tl.load(table + 3 * count + owner) - start_of_tile, BLOCK_E).to(tl.int32)
        gradient = address.to(tl.pointer_type(tl.float32)) + start_of_tile
        out = sums + tl.load(table + 4 * count + owner) + start_of_tile
        if ALIGNED:
            gradient = tl.multiple_of(gradient, 16)
            out = tl.multiple_of(out, 16)
            stride = tl.multiple_of(stride, 4)
            size = tl.multiple_of(size, 4)
        elements = tl.arange(0, BLOCK_E)
        total = tl.zeros((BLOCK_N, BLOCK_E), tl.float64)
        for start in range(0, n, BLOCK_N):
            examples = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
            # Excluded examples are read too: time must not tell who was excluded. Before the coefficients, to overlap.
            values = tl.load(
                gradient + examples[:, None] * stride + elements[None, :],
                mask=(examples < n)[:, None] & (elements < size)[None, :],
                other=0.0,
            )
            c = _coefficients(
                sq_norms,
                norm_stride_p,
                norm_stride_n,
                layers,
                layer_stride,
                mask,
                mask_stride,
                row,
                examples,
                n,
                parameters,
                bound,
                gamma,
                scale,
                RULE,
                BLOCK_P,
                BLOCK_N,
            )
            total += tl.where((c != 0)[:, None], values, 0.0).to(tl.float64) * c[:, None]
        tl.store(out + elements, tl.sum(total, 0), mask=elements < size)
    else:
        row = (tile - tiles).to(tl.int64)
        for start in range(0, n, BLOCK_N):
            examples = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
            c = _coefficients(
                sq_norms,
                norm_stride_p,
                norm_stride_n,
                layers,
                layer_stride,
                mask,
                mask_stride,
                row,
                examples,
                n,
                parameters,
                bound,
                gamma,
                scale,
                RULE,
                BLOCK_P,
                BLOCK_N,
            )
            tl.store(coefficients + row * n + examples, c, mask=examples < n)


def _check(
    gradients: Sequence[Tensor],
    rows: Sequence[int],
    sq_norms: Tensor,
    layers: Tensor,
    layer_count: int,
    rule: str,
    max_grad_norm: float,
    gamma: float,
    mask: Tensor | None,
    scale: float,
) -> None:
    op = "clip_sum"
    check(op, "sq_norms", sq_norms, (None, None), dtypes=(torch.float64,))
    parameters, n = sq_norms.shape
    check(op, "layers", layers, (parameters,), like=sq_norms, dtypes=(torch.int64, torch.int32))
    if mask is not None:
        check(op, "mask", mask, (n,), like=sq_norms, dtypes=(torch.bool,))
    if rule not in ("flat", "per_layer", "automatic"):
        raise ValueError(f"{op}: rule must be 'flat', 'per_layer' or 'automatic', got {rule!r}.")
    if not max_grad_norm > 0 or (math.isinf(max_grad_norm) and rule != "flat"):
        raise ValueError(f"{op}: max_grad_norm must be above 0, and finite but for 'flat', got {max_grad_norm}.")
    if rule == "automatic" and not gamma > 0:
        raise ValueError(f"{op}: gamma must be above 0, got {gamma}.")
    if not 0 < scale < math.inf:
        raise ValueError(f"{op}: scale must be finite and above 0, got {scale}.")
    if layer_count < 1:
        raise ValueError(f"{op}: layer_count must be at least 1, got {layer_count}.")
    if len(rows) != len(gradients) or not all(0 <= row < parameters for row in rows):
        raise ValueError(
            f"{op}: rows must name one of the {parameters} rows of sq_norms for each of the {len(gradients)} "
            f"gradients, got {list(rows)}."
        )
    for i, gradient in enumerate(gradients):
        check(
            op,
            f"gradients[{i}]",
            gradient,
            (n, *getattr(gradient, "shape", ())[1:]),
            like=sq_norms,
            dtypes=(torch.float32,),
        )
        if not gradient.is_contiguous() and not gradient[0].is_contiguous():
            raise ValueError(f"{op}: gradients[{i}] must be contiguous after its first dimension.")


def clip_sum(
    gradients: Sequence[Tensor],
    rows: Sequence[int],
    sq_norms: Tensor,
    layers: Tensor,
    layer_count: int,
    rule: Literal["flat", "per_layer", "automatic"],
    max_grad_norm: float,
    gamma: float,
    mask: Tensor | None,
    scale: float,
    *,
    config: Config | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Clip coefficients, and the clipped sum of every parameter.

    The rules are those of :mod:`lora_dp.privacy.clipping` (Abadi et al. 2016, arXiv 1607.00133; McMahan et al. 2018,
    arXiv 1710.06963; Bu et al. 2023, arXiv 2206.07136), with norms ``scale`` · √sq_norms.

    Args:
        gradients: of some parameters, each ``(N, *shape)`` float32, contiguous after the first dimension.
        rows: for each of ``gradients``, its parameter's row in ``sq_norms``.
        sq_norms: (P, N) float64, squared gradient norms by parameter and example.
        layers: (P,) int64 or int32, each parameter's layer.
        layer_count: how many layers share C under "per_layer".
        rule: clip rule.
        max_grad_norm: C; infinite for no clipping, with "flat".
        gamma: γ of "automatic".
        mask: (N,) bool; an example with False contributes nothing.
        scale: factor of every gradient: N where the loss is a mean.

    Returns:
        Coefficients (P, N) float64, mask and scale included, zero where any of an example's norms is not finite; and
        Σᵢ cᵢGᵢ of each of ``gradients``, float64, views of one buffer. An example with coefficient zero contributes
        nothing, whatever its gradients hold.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, device or layout, or is out of range.
    """
    _check(gradients, rows, sq_norms, layers, layer_count, rule, max_grad_norm, gamma, mask, scale)
    parameters, n = sq_norms.shape
    shapes = [gradient.shape[1:] for gradient in gradients]
    sizes = tuple(shape.numel() for shape in shapes)
    coefficients = torch.empty((parameters, n), dtype=torch.float64, device=sq_norms.device)
    sums = torch.empty(sum(sizes), dtype=torch.float64, device=sq_norms.device)
    views = [part.view(shape) for part, shape in zip(sums.split(sizes), shapes, strict=True)] if sizes else []
    if coefficients.numel() == 0:
        return coefficients, [view.zero_() for view in views]

    config = config or _pick(sq_norms, len(sizes), sum(sizes))
    firsts, tiles = first_tiles(sizes, config["BLOCK_E"])
    begins, _ = first_tiles(sizes, 1)
    addresses = [gradient.data_ptr() for gradient in gradients]
    strides = [gradient.stride(0) for gradient in gradients]
    aligned = not (any(a % 16 for a in addresses) or any(s % 4 for s in strides) or any(s % 4 for s in sizes))
    bound = max_grad_norm * MARGIN / (math.sqrt(layer_count) if rule == "per_layer" else 1.0)
    with on_device(sq_norms):
        table = send([*addresses, *strides, *rows, *sizes, *begins, *firsts], sq_norms.device)
        _clip_sum_kernel[(tiles + parameters,)](
            table,
            len(sizes),
            tiles,
            sq_norms,
            *sq_norms.stride(),
            layers,
            layers.stride(0),
            mask,
            mask.stride(0) if mask is not None else 0,
            coefficients,
            sums,
            n,
            parameters,
            bound,
            float(gamma),
            float(scale),
            RULE=rule,
            ALIGNED=aligned,
            PADDED=padded(len(sizes)),
            BLOCK_P=_BLOCK_P,
            **config.launch,
        )
    return coefficients, views


def _pick(sq_norms: Tensor, count: int, elements: int) -> Config:
    # The widest tile that still gives every multiprocessor a few programs.
    programs = 2 * multiprocessors(sq_norms.device)
    default = next((name for name in ("wide", "medium") if elements >= programs * CONFIGS[name]["BLOCK_E"]), "narrow")
    return pick("clip_sum", CONFIGS, default, sq_norms, n=sq_norms.shape[1], count=count, elements=elements)


def builds() -> Iterator[Build]:
    """Every configuration, and every rule in one of them, for ahead-of-time compiling."""
    signature = {
        "table": "*i64",
        "count": "i32",
        "tiles": "i32",
        "sq_norms": "*fp64",
        "norm_stride_p": "i32",
        "layers": "*i64",
        "layer_stride": "i32",
        "mask": "*i1",
        "mask_stride": "i32",
        "coefficients": "*fp64",
        "sums": "*fp64",
        "n": "i32",
        "parameters": "i32",
        "bound": "fp32",
        "gamma": "fp32",
        "scale": "fp32",
    }
    pointers = [name for name, kind in signature.items() if kind.startswith("*")]
    cases = [(name, "flat", True) for name in CONFIGS] + [(name, "per_layer", True) for name in CONFIGS]
    for name, rule, aligned in [*cases, ("medium", "automatic", True), ("medium", "flat", False)]:
        constexprs = {"norm_stride_n": 1, "RULE": rule, "ALIGNED": aligned, "PADDED": 256, "BLOCK_P": _BLOCK_P}
        config = CONFIGS[name]
        yield Build(
            f"fp32 {rule} {name} {'aligned' if aligned else 'any address'}",
            _clip_sum_kernel,
            signature,
            {**constexprs, **dict(config.blocks)},
            config.num_warps,
            config.num_stages,
            pointers,
        )
