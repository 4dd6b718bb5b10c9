"""Per-example gradients, their norms and u = wide · factor, in one pass over the wide factor.

Gᵢ = scale · Σₜ wideᵢₜ ⊗ skinnyᵢₜ serves both phases: (wide, skinny) is (g, h) in the B phase, where factor is B, and
(x, u) in the A phase. Here h = x Aᵀ, g is the gradient of the layer's output, and u = g B.

A program owns one example's block of the width, gives each of its warps a chunk of it, and walks over the tokens: Gᵢ
stays in registers, and the tile of wide that is on chip also gives u. Several blocks of the width,
or several spans of tokens where examples are few, leave float32 partial results that a second launch adds in a fixed
order.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_dp.kernels.launching import (
    Build,
    Config,
    check,
    check_rank,
    dot_precision,
    multiprocessors,
    on_device,
    padded,
    pick,
)

# From wide to narrow. A block of the width is one CHUNK for each warp; SPAN is the fewest tokens that are worth a
# partial gradient. A tile is two loads of 16 bytes or more for each thread along the tokens (BLOCK_T · CHUNK at least
# 2048 for 4 warps): from fewer, Triton 3.9 lays it out in shared memory with eightfold bank conflicts.
_HALF_CONFIGS = {
    "half_512": Config.of(4, 4, CHUNK=128, BLOCK_T=16, BLOCK_R=16, SPAN=256),
    "half_256": Config.of(4, 4, CHUNK=64, BLOCK_T=32, BLOCK_R=32, SPAN=256),
    "half_128": Config.of(4, 4, CHUNK=32, BLOCK_T=64, BLOCK_R=16, SPAN=256),
}
# Products of float32 run outside the tensor cores and hold their operands in registers: smaller tiles.
_SINGLE_CONFIGS = {
    "single_128": Config.of(8, 4, CHUNK=16, BLOCK_T=16, BLOCK_R=32, SPAN=256),
    "single_64": Config.of(4, 4, CHUNK=16, BLOCK_T=16, BLOCK_R=32, SPAN=256),
}
CONFIGS = _HALF_CONFIGS | _SINGLE_CONFIGS

# What one program can read about as fast as a second launch takes to start.
_SMALL_BYTES = 128 * 1024
# Elements that one program of the second launches adds up.
_BLOCK = 1024


class ExampleGrad(NamedTuple):
    """What :func:`example_grad` returns: ``gradients`` where kept, ``sq_norms``, and ``u`` where asked for."""

    gradients: Tensor | None
    sq_norms: Tensor
    u: Tensor | None


@triton.jit
def _grad_kernel(
    wide,
    skinny,
    factor,
    gradients,
    sq_norms,
    u,
    scale,
    tokens,
    width,
    r,
    span,
    wide_stride_n,
    wide_stride_t,
    wide_stride_w,
    skinny_stride_n,
    skinny_stride_t,
    skinny_stride_r,
    factor_stride_w,
    factor_stride_r,
    WIDE_FIRST: tl.constexpr,
    STORE: tl.constexpr,
    NORM: tl.constexpr,
    WITH_U: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Triton itself looks for multiples of 16 only: rank 8 would be read and written one element at a time.
    r = r // ALIGN * ALIGN
    factor_stride_w = factor_stride_w // ALIGN * ALIGN
    # Blocks of the rank come next to each other: they read the same part of wide.
    rank_blocks = tl.cdiv(r, BLOCK_R)
    example = (tl.program_id(0) // rank_blocks).to(tl.int64)
    rank_block = tl.program_id(0) % rank_blocks
    width_block = tl.program_id(1)
    split = tl.program_id(2)

    # A batched dot gives each warp one chunk, so that the sum over the width for u is split among the warps too.
    columns = tl.arange(0, CHUNKS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    ranks = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    first_column = width_block * (CHUNKS * CHUNK)
    in_width = columns < width - first_column
    in_rank = ranks < r
    begin = split * span
    end = tl.minimum(begin + span, tokens)

    rows = tl.arange(0, BLOCK_T)
    step = tl.full((), BLOCK_T, tl.int64)
    wide += example * wide_stride_n + first_column.to(tl.int64) * wide_stride_w + begin.to(tl.int64) * wide_stride_t
    skinny += example * skinny_stride_n + begin.to(tl.int64) * skinny_stride_t
    wide_tile = (
        wide + columns[:, None, :].to(tl.int64) * wide_stride_w + (rows[None, :, None].to(tl.int64) * wide_stride_t)
    )
    skinny_tile = skinny + ranks[None, :].to(tl.int64) * skinny_stride_r + rows[:, None].to(tl.int64) * skinny_stride_t
    if WITH_U:
        examples = tl.num_programs(0) // rank_blocks
        u += ((width_block.to(tl.int64) * examples + example) * tokens + begin) * r
        factor += first_column.to(tl.int64) * factor_stride_w
        f = tl.load(
            factor
            + columns[:, :, None].to(tl.int64) * factor_stride_w
            + ranks[None, None, :].to(tl.int64) * factor_stride_r,
            mask=in_width[:, :, None] & in_rank[None, None, :],
            other=0.0,
        )

    gradient = tl.zeros((CHUNKS, BLOCK_R, CHUNK), tl.float32)
    later = tl.load(skinny_tile, mask=(rows < end - begin)[:, None] & in_rank[None, :], other=0.0)
    for start in range(begin, end, BLOCK_T):
        left = end - start
        w = tl.load(wide_tile, mask=(rows < left)[None, :, None] & in_width[:, None, :], other=0.0)
        wide_tile += step * wide_stride_t
        # The compiler overlaps the loads of wide with the products, but not loads as narrow as these.
        s = tl.broadcast_to(tl.trans(later)[None, :, :], (CHUNKS, BLOCK_R, BLOCK_T))
        skinny_tile += step * skinny_stride_t
        later = tl.load(skinny_tile, mask=(rows < left - BLOCK_T)[:, None] & in_rank[None, :], other=0.0)
        if WITH_U:
            part = tl.sum(tl.dot(w, f, input_precision=PRECISION), 0)
            tl.store(
                u + rows[:, None] * r + ranks[None, :],
                part.to(u.dtype.element_ty),
                mask=(rows < left)[:, None] & in_rank[None, :],
            )
            u += BLOCK_T * r
        gradient = tl.dot(s, w, gradient, input_precision=PRECISION)

    inside = in_rank[None, :, None] & in_width[:, None, :]
    gradient = tl.where(inside, gradient * scale, 0.0)
    if STORE:
        gradients += (example * tl.num_programs(2) + split) * width * r
        if WIDE_FIRST:
            gradients += first_column.to(tl.int64) * r
            tl.store(gradients + columns[:, None, :] * r + ranks[None, :, None], gradient, mask=inside)
        else:
            gradients += first_column
            tl.store(gradients + ranks[None, :, None].to(tl.int64) * width + columns[:, None, :], gradient, mask=inside)
    if NORM:
        block = (example * tl.num_programs(1) + width_block) * rank_blocks + rank_block
        # In float64 a square of a float32 neither vanishes nor overflows: lora_dp.privacy.clipping rests on that.
        exact = gradient.to(tl.float64)
        tl.store(sq_norms + block, tl.sum(exact * exact))


@triton.jit
def _add_splits_kernel(partials, gradients, sq_norms, size, splits, STORE: tl.constexpr, BLOCK: tl.constexpr):
    example = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    gradient = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        gradient += tl.load(partials + (example * splits + split) * size + offsets, mask=inside, other=0.0)
    if STORE:
        tl.store(gradients + example * size + offsets, gradient, mask=inside)
    exact = gradient.to(tl.float64)
    tl.store(sq_norms + example * tl.num_programs(1) + tl.program_id(1), tl.sum(exact * exact, 0))


@triton.jit
def _finish_kernel(
    norm_parts, sq_norms, u_parts, u, parts, width_blocks, u_size, blocks, WITH_U: tl.constexpr, BLOCK: tl.constexpr
):
    example = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    if block == 0:
        squares = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, parts, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            squares += tl.load(norm_parts + example * parts + offsets, mask=offsets < parts, other=0.0)
        tl.store(sq_norms + example, tl.sum(squares, 0))
    if WITH_U:
        examples = (tl.num_programs(0) // blocks).to(tl.int64)
        offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for width_block in range(0, width_blocks):
            total += tl.load(
                u_parts + (width_block * examples + example) * u_size + offsets, mask=offsets < u_size, other=0.0
            )
        tl.store(u + example * u_size + offsets, total.to(u.dtype.element_ty), mask=offsets < u_size)


def _blocks(config: Config, width: int, r: int) -> tuple[int, int]:
    """How many blocks the width and the rank fall into."""
    return triton.cdiv(width, config.num_warps * config["CHUNK"]), triton.cdiv(r, config["BLOCK_R"])


def _default(configs: Mapping[str, Config], wide: Tensor, r: int) -> str:
    """The widest block that gives every multiprocessor a program, or the whole width where that is little."""
    n, tokens, width = wide.shape
    blocks = {name: _blocks(config, width, r) for name, config in configs.items()}
    # Every block of the rank reads wide again.
    fewest = min(rank_blocks for _, rank_blocks in blocks.values())
    fitting = [name for name, (_, rank_blocks) in blocks.items() if rank_blocks == fewest]
    enough = multiprocessors(wide.device)
    whole = [name for name in fitting if blocks[name][0] == 1]
    if whole and (n >= enough or tokens * width * wide.element_size() <= _SMALL_BYTES):
        return whole[-1]
    return next((name for name in fitting if n * math.prod(blocks[name]) >= enough), fitting[-1])


def _split(config: Config, programs: int, wide: Tensor) -> tuple[int, int]:
    """Spans of tokens, and the tokens in each: more than one where programs would leave multiprocessors idle."""
    tokens = wide.shape[1]
    most = min(multiprocessors(wide.device) // programs, triton.cdiv(tokens, config["SPAN"]))
    span = triton.cdiv(triton.cdiv(tokens, max(most, 1)), config["BLOCK_T"]) * config["BLOCK_T"]
    return triton.cdiv(tokens, span), span


def example_grad(
    wide: Tensor,
    skinny: Tensor,
    scale: float,
    *,
    factor: Tensor | None = None,
    keep: bool = True,
    wide_first: bool = True,
    config: Config | None = None,
) -> ExampleGrad:
    """Gᵢ = scale · Σₜ wideᵢₜ ⊗ skinnyᵢₜ, its squared norm, and u = wide · factor.

    Args:
        wide: (N, T, w), float32, bfloat16 or float16, any strides.
        skinny: (N, T, r) with r from 1 to 256, same dtype.
        scale: factor of the whole gradient (LoRA's alpha / r).
        factor: (w, r) or None, same dtype.
        keep: whether the gradients are stored; without, they stay on chip.
        wide_first: whether a gradient is (w, r) or (r, w).
        config: blocks and warps; by default those measured fastest for the nearest shape.

    Returns:
        A named tuple of

        - ``gradients``: float32, (N, w, r) or (N, r, w), contiguous; None without ``keep``;
        - ``sq_norms``: (N,), float64, of the float32 values of the gradients;
        - ``u``: (N, T, r), contiguous, in the dtype of ``wide``; None without ``factor``.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """
    check("example_grad", "wide", wide, (None, None, None))
    n, tokens, width = wide.shape
    check("example_grad", "skinny", skinny, (n, tokens, None), like=wide)
    r = skinny.shape[2]
    check_rank("example_grad", r)
    if factor is not None:
        check("example_grad", "factor", factor, (width, r), like=wide)

    shape = (n, width, r) if wide_first else (n, r, width)
    if wide.numel() == 0:
        zeros = wide.new_zeros(shape, dtype=torch.float32)
        u = None if factor is None else wide.new_zeros((n, tokens, r))
        return ExampleGrad(zeros if keep else None, wide.new_zeros(n, dtype=torch.float64), u)
    if config is None:
        configs = _SINGLE_CONFIGS if wide.dtype == torch.float32 else _HALF_CONFIGS
        name = "example_grad" if factor is None else "example_grad_u"
        config = pick(name, configs, _default(configs, wide, r), wide, n=n, tokens=tokens, width=width, r=r)
    width_blocks, rank_blocks = _blocks(config, width, r)
    splits, span = _split(config, n * width_blocks * rank_blocks, wide)
    norm_blocks = width_blocks * rank_blocks if splits == 1 else triton.cdiv(width * r, _BLOCK)
    u_in_parts = factor is not None and width_blocks > 1
    finish = norm_blocks > 1 or u_in_parts
    align = 8 if r % 8 == 0 and (factor is None or factor.stride(0) % 8 == 0) else 1

    scratch = functools.partial(torch.empty, dtype=torch.float32, device=wide.device)
    gradients = scratch(shape) if keep else None
    sq_norms = scratch(n, dtype=torch.float64)
    u = None if factor is None else wide.new_empty((n, tokens, r))
    partials = gradients if splits == 1 else scratch((n, splits, width * r))
    norm_parts = scratch((n, norm_blocks), dtype=torch.float64) if finish else sq_norms
    u_parts = scratch((width_blocks, n, tokens, r)) if u_in_parts else u
    with on_device(wide):
        _grad_kernel[(n * rank_blocks, width_blocks, splits)](
            wide,
            skinny,
            factor,
            partials,
            norm_parts if splits == 1 else None,
            u_parts,
            scale,
            tokens,
            width,
            r,
            span,
            *wide.stride(),
            *skinny.stride(),
            *((0, 0) if factor is None else factor.stride()),
            WIDE_FIRST=wide_first,
            STORE=partials is not None,
            NORM=splits == 1,
            WITH_U=factor is not None,
            CHUNKS=config.num_warps,
            CHUNK=config["CHUNK"],
            BLOCK_T=config["BLOCK_T"],
            BLOCK_R=min(padded(r), config["BLOCK_R"]),
            ALIGN=align,
            PRECISION=dot_precision(wide.dtype),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if splits > 1:
            _add_splits_kernel[(n, norm_blocks)](
                partials, gradients, norm_parts, width * r, splits, STORE=keep, BLOCK=_BLOCK
            )
        if finish:
            blocks = triton.cdiv(tokens * r, _BLOCK) if u_in_parts else 1
            _finish_kernel[(n * blocks,)](
                norm_parts,
                sq_norms,
                u_parts,
                u,
                norm_blocks,
                width_blocks,
                tokens * r,
                blocks,
                WITH_U=u_in_parts,
                BLOCK=_BLOCK,
            )
    return ExampleGrad(gradients, sq_norms, u)


def builds() -> Iterator[Build]:
    """Every configuration in the B phase, which needs most registers; the A phase; tf32; and the second launches."""
    for name, config in CONFIGS.items():
        yield _build(name, config["BLOCK_R"])
    for name in ("half_256", "single_128", "single_64"):
        yield _build(name, 16)
    for name in ("half_512", "single_128"):
        yield _build(name, 16, b_phase=False)
    yield _build("half_512", 16, align=1)
    yield _build("single_128", 16, precision="tf32")
    yield Build(
        "add_splits",
        _add_splits_kernel,
        {"partials": "*fp32", "gradients": "*fp32", "sq_norms": "*fp64", "size": "i32", "splits": "i32"},
        {"STORE": True, "BLOCK": _BLOCK},
        divisible_by_16=("partials", "gradients", "sq_norms", "size"),
    )
    yield Build(
        "finish bf16",
        _finish_kernel,
        {
            "norm_parts": "*fp64",
            "sq_norms": "*fp64",
            "u_parts": "*fp32",
            "u": "*bf16",
            "parts": "i32",
            "width_blocks": "i32",
            "u_size": "i32",
            "blocks": "i32",
        },
        {"WITH_U": True, "BLOCK": _BLOCK},
        divisible_by_16=("norm_parts", "sq_norms", "u_parts", "u", "u_size"),
    )


def _build(name: str, block_r: int, *, b_phase: bool = True, align: int = 8, precision: str = "ieee") -> Build:
    config = CONFIGS[name]
    pointer = "*fp32" if name in _SINGLE_CONFIGS else "*bf16"
    pointers = {
        "wide": pointer,
        "skinny": pointer,
        "factor": pointer,
        "gradients": "*fp32",
        "sq_norms": "*fp64",
        "u": pointer,
    }
    sizes = (
        "tokens",
        "width",
        "r",
        "span",
        "wide_stride_n",
        "wide_stride_t",
        "skinny_stride_n",
        "skinny_stride_t",
        "factor_stride_w",
    )
    phase = "B" if b_phase else "A"
    return Build(
        f"{name} {pointer[1:]} {precision} r{block_r} align{align} {phase}",
        _grad_kernel,
        {**pointers, "scale": "fp32", **dict.fromkeys(sizes, "i32")},
        {
            "wide_stride_w": 1,
            "skinny_stride_r": 1,
            "factor_stride_r": 1,
            "WIDE_FIRST": b_phase,
            "STORE": True,
            "NORM": True,
            "WITH_U": b_phase,
            "CHUNKS": config.num_warps,
            "CHUNK": config["CHUNK"],
            "BLOCK_T": config["BLOCK_T"],
            "BLOCK_R": block_r,
            "ALIGN": align,
            "PRECISION": precision,
        },
        config.num_warps,
        config.num_stages,
        (*pointers, "width", "wide_stride_n", "wide_stride_t"),
    )
