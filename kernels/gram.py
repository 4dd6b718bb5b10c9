"""Ghost norms: ‖Gᵢ‖² = scale² Σₜₜ' (leftₜ·leftₜ')(rightₜ·rightₜ') without forming Gᵢ, and without a T × T matrix.

The formula is that of Li et al., "Large language models can be strong differentially private learners" (ICLR 2022),
§4. Its terms cancel: rounded to float32, a norm could come out far below the true one, and too little would be clipped.
So dots and sums run in float64, in which products of the inputs are exact.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_dp.kernels.launching import Build, Config, check, on_device, pick

# Blocks of 64 tokens: Triton 3.6 takes them for a product that Blackwell's tensor memory can hold, and fails.
CONFIGS = {
    "tokens_16": Config.of(4, 2, BLOCK_T=16, BLOCK_K=64),
    "tokens_32": Config.of(4, 2, BLOCK_T=32, BLOCK_K=32),
    "tokens_32_deep": Config.of(4, 2, BLOCK_T=32, BLOCK_K=64),
}

# Elements that one program without a dot takes at once.
_BLOCK = 1024


@triton.jit
def _gram(rows, stride_t, stride_k, i, j, tokens, size, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """Dots of one block of rows with another, (BLOCK_T, BLOCK_T)."""
    k = tl.arange(0, BLOCK_K)
    first = i * BLOCK_T + tl.arange(0, BLOCK_T)
    second = j * BLOCK_T + tl.arange(0, BLOCK_T)
    a_tile = rows + first[:, None].to(tl.int64) * stride_t + k[None, :].to(tl.int64) * stride_k
    b_tile = rows + second[:, None].to(tl.int64) * stride_t + k[None, :].to(tl.int64) * stride_k
    step = tl.full((), BLOCK_K, tl.int64)
    dots = tl.zeros((BLOCK_T, BLOCK_T), tl.float64)
    # Loaded one step ahead. Were the loads in the same step, Triton 3.6 would fail on a float64 dot of half precision.
    a = tl.load(a_tile, mask=(first < tokens)[:, None] & (k < size)[None, :], other=0.0)
    b = tl.load(b_tile, mask=(second < tokens)[:, None] & (k < size)[None, :], other=0.0)
    for start in range(BLOCK_K, size + BLOCK_K, BLOCK_K):
        x, y = a.to(tl.float64), b.to(tl.float64)
        a_tile += step * stride_k
        b_tile += step * stride_k
        a = tl.load(a_tile, mask=(first < tokens)[:, None] & (k < size - start)[None, :], other=0.0)
        b = tl.load(b_tile, mask=(second < tokens)[:, None] & (k < size - start)[None, :], other=0.0)
        dots = tl.dot(x, tl.trans(y), dots, out_dtype=tl.float64)
    return dots


@triton.jit
def _squares(values, stride, size, BLOCK: tl.constexpr):
    """The sum of squares of one row."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(values + k.to(tl.int64) * stride, mask=k < size, other=0.0).to(tl.float64)
        total += x * x
    return tl.sum(total, 0)


@triton.jit
def _finished(total):
    # Rounding may leave a small negative number where all terms cancel. NaN is not below zero and stays.
    return tl.where(total < 0, 0.0, total)


@triton.jit
def _token_kernel(
    left, right, sq_norms, p, q, left_stride_n, left_stride_k, right_stride_n, right_stride_k, BLOCK: tl.constexpr
):
    example = tl.program_id(0).to(tl.int64)
    total = _squares(left + example * left_stride_n, left_stride_k, p, BLOCK)
    total *= _squares(right + example * right_stride_n, right_stride_k, q, BLOCK)
    tl.store(sq_norms + example, _finished(total))


# A size of 1 as a constant would unroll the loop of _gram, and what it is written to avoid would happen.
@triton.jit(do_not_specialize=["p", "q"])
def _pair_kernel(
    left,
    right,
    sums,
    tokens,
    p,
    q,
    blocks,
    pairs,
    left_stride_n,
    left_stride_t,
    left_stride_k,
    right_stride_n,
    right_stride_t,
    right_stride_k,
    ONE_PAIR: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Multiples of 8 can be loaded 16 bytes at a time.
    p = p // ALIGN * ALIGN
    q = q // ALIGN * ALIGN
    example = (tl.program_id(0) // pairs).to(tl.int64)
    pair = tl.program_id(0) % pairs
    # Blocks on a circle: each pair of blocks at most half of it apart comes exactly once.
    distance = pair // blocks
    i = pair % blocks
    j = (i + distance) % blocks
    dots = _gram(left + example * left_stride_n, left_stride_t, left_stride_k, i, j, tokens, p, BLOCK_T, BLOCK_K)
    dots *= _gram(right + example * right_stride_n, right_stride_t, right_stride_k, i, j, tokens, q, BLOCK_T, BLOCK_K)
    total = tl.sum(tl.sum(dots, 1), 0)
    if ONE_PAIR:
        tl.store(sums + example, _finished(total))
    else:
        tl.store(sums + tl.program_id(0), tl.where(distance == 0, total, 2 * total))


@triton.jit
def _add_pairs_kernel(sums, sq_norms, pairs, BLOCK: tl.constexpr):
    example = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, pairs, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.load(sums + example * pairs + offsets, mask=offsets < pairs, other=0.0)
    tl.store(sq_norms + example, _finished(tl.sum(total, 0)))


def _default(tokens: int) -> str:
    return "tokens_16" if tokens <= 16 else "tokens_32"


def gram_sq_norm(left: Tensor, right: Tensor, scale: float, *, config: Config | None = None) -> Tensor:
    """‖scale · Σₜ leftᵢₜ ⊗ rightᵢₜ‖² of every example, from the Gram matrices of its tokens.

    Args:
        left: (N, T, p), float32, bfloat16 or float16, any strides.
        right: (N, T, q), same dtype.
        scale: factor of the gradient.
        config: blocks and warps; by default those measured fastest for the nearest shape.

    Returns:
        (N,), float64, at least 0, or NaN for an example that is not finite.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """
    check("gram_sq_norm", "left", left, (None, None, None))
    n, tokens, p = left.shape
    check("gram_sq_norm", "right", right, (n, tokens, None), like=left)
    q = right.shape[2]
    if left.numel() == 0 or right.numel() == 0:
        return left.new_zeros(n, dtype=torch.float64)
    sq_norms = left.new_empty(n, dtype=torch.float64)
    if tokens == 1:
        with on_device(left):
            _token_kernel[(n,)](
                left,
                right,
                sq_norms,
                p,
                q,
                left.stride(0),
                left.stride(2),
                right.stride(0),
                right.stride(2),
                BLOCK=_BLOCK,
            )
        return _scaled(sq_norms, scale)
    config = config or pick("gram_sq_norm", CONFIGS, _default(tokens), left, n=n, tokens=tokens, p=p, q=q)
    blocks = triton.cdiv(tokens, config["BLOCK_T"])
    pairs = blocks * (blocks + 1) // 2
    sums = sq_norms if pairs == 1 else left.new_empty((n, pairs), dtype=torch.float64)
    with on_device(left):
        _pair_kernel[(n * pairs,)](
            left,
            right,
            sums,
            tokens,
            p,
            q,
            blocks,
            pairs,
            *left.stride(),
            *right.stride(),
            ONE_PAIR=pairs == 1,
            ALIGN=8 if p % 8 == q % 8 == 0 else 1,
            **config.launch,
        )
        if pairs > 1:
            _add_pairs_kernel[(n,)](sums, sq_norms, pairs, BLOCK=_BLOCK)
    return _scaled(sq_norms, scale)


def _scaled(sq_norms: Tensor, scale: float) -> Tensor:
    # Not in the kernel, which would take the factor as float32, with that format's range.
    return sq_norms if scale == 1 else sq_norms.mul_(scale * scale)


def builds() -> Iterator[Build]:
    """Every configuration and the kernels without one, in bfloat16 and float32."""
    for dtype in ("bf16", "fp32"):
        pointers = {"left": f"*{dtype}", "right": f"*{dtype}"}
        for name, config in CONFIGS.items():
            sizes = (
                "tokens",
                "p",
                "q",
                "blocks",
                "pairs",
                "left_stride_n",
                "left_stride_t",
                "right_stride_n",
                "right_stride_t",
            )
            yield Build(
                f"{name} {dtype}",
                _pair_kernel,
                {**pointers, "sums": "*fp64", **dict.fromkeys(sizes, "i32")},
                {"left_stride_k": 1, "right_stride_k": 1, "ONE_PAIR": False, "ALIGN": 8, **dict(config.blocks)},
                config.num_warps,
                config.num_stages,
                ("left", "right", "sums", "left_stride_n", "left_stride_t", "right_stride_n", "right_stride_t"),
            )
        yield Build(
            f"one token {dtype}",
            _token_kernel,
            {**pointers, "sq_norms": "*fp64", **dict.fromkeys(("p", "q", "left_stride_n", "right_stride_n"), "i32")},
            {"left_stride_k": 1, "right_stride_k": 1, "BLOCK": _BLOCK},
            divisible_by_16=("left", "right", "sq_norms", "p", "q", "left_stride_n", "right_stride_n"),
        )
    yield Build(
        "add pairs",
        _add_pairs_kernel,
        {"sums": "*fp64", "sq_norms": "*fp64", "pairs": "i32"},
        {"BLOCK": _BLOCK},
        divisible_by_16=("sums", "sq_norms"),
    )
