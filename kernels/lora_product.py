"""y = x Wᵀ + bias + s · (x aᵀ) bᵀ and h = x aᵀ in one product: x is read once, and y is written once.

The loop over K accumulates x Wᵀ and x aᵀ from the same tile of x; the epilogue adds the update strip by strip, so that
no second accumulator of the tile's size is held. Every block of columns repeats the narrow product x aᵀ, which costs
r / BLOCK_N of the wide one: small ranks only.
"""

from collections.abc import Iterator

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
from lora_dp.kernels.skinny_product import skinny_product

MAX_FUSED_RANK = 64

# STRIP: columns of the update in registers at a time. The deep tiles leave no registers for ranks above 32 on sm_80.
_DEEP_CONFIGS = {
    "square": Config.of(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, STRIP=32),
    "wide": Config.of(4, 4, BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, STRIP=32),
}
_HALF_CONFIGS = {
    "square_k32": Config.of(8, 4, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, STRIP=32),
    "small": Config.of(4, 4, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, STRIP=32),
}
# By precision of the product: "ieee" runs outside the tensor cores and holds its operands in registers.
_SINGLE_CONFIGS = {
    "tf32": Config.of(8, 4, BLOCK_M=64, BLOCK_N=128, BLOCK_K=32, STRIP=32),
    "ieee": Config.of(8, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, STRIP=16),
}
CONFIGS = _DEEP_CONFIGS | _HALF_CONFIGS | _SINGLE_CONFIGS

# Blocks of rows that share a pass over the columns, so that their tiles of x stay in the L2 cache.
GROUP_M = 8


@triton.jit
def _finish(
    acc,
    h_block,
    bias,
    b,
    y_rows,
    in_m,
    first,
    N,
    r,
    scaling,
    stride_bias,
    stride_bn,
    stride_br,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STRIP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the update and the bias to COLUMNS columns of the tile and store them; halved down to strips."""
    if COLUMNS > STRIP:
        HALF: tl.constexpr = COLUMNS // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        _finish(
            left,
            h_block,
            bias,
            b,
            y_rows,
            in_m,
            first,
            N,
            r,
            scaling,
            stride_bias,
            stride_bn,
            stride_br,
            BLOCK_M,
            HALF,
            BLOCK_R,
            STRIP,
            PRECISION,
        )
        _finish(
            right,
            h_block,
            bias,
            b,
            y_rows,
            in_m,
            first + HALF,
            N,
            r,
            scaling,
            stride_bias,
            stride_bn,
            stride_br,
            BLOCK_M,
            HALF,
            BLOCK_R,
            STRIP,
            PRECISION,
        )
    else:
        columns = first + tl.arange(0, COLUMNS)
        ranks = tl.arange(0, BLOCK_R).to(tl.int64)
        in_n = columns < N
        b_tile = b + columns[None, :] * stride_bn + ranks[:, None] * stride_br
        b_block = tl.load(b_tile, mask=in_n[None, :] & (ranks < r)[:, None], other=0.0)
        acc += scaling * tl.dot(h_block, b_block, input_precision=PRECISION)
        if bias is not None:
            acc += tl.load(bias + columns * stride_bias, mask=in_n, other=0.0).to(tl.float32)[None, :]
        tl.store(y_rows + columns[None, :], acc.to(y_rows.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@triton.jit
def lora_product_kernel(
    x,
    weight,
    bias,
    a,
    b,
    y,
    h,
    M,
    N,
    K,
    r,
    scaling,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bias,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STRIP: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks_n = tl.cdiv(N, BLOCK_N)
    first_m = tl.program_id(0) // (GROUP_M * blocks_n) * GROUP_M
    group_m = tl.minimum(tl.cdiv(M, BLOCK_M) - first_m, GROUP_M)
    in_group = tl.program_id(0) % (GROUP_M * blocks_n)
    block_n = in_group // group_m

    rows = (first_m + in_group % group_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_n = block_n.to(tl.int64) * BLOCK_N
    columns = first_n + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    in_m, in_n, in_r = rows < M, columns < N, ranks < r
    x_tile = x + rows[:, None] * stride_xm + ks[None, :] * stride_xk
    w_tile = weight + columns[None, :] * stride_wn + ks[:, None] * stride_wk
    a_tile = a + ranks[None, :] * stride_ar + ks[:, None] * stride_ak
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_h = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        in_k = ks < K - k
        x_block = tl.load(x_tile, mask=in_m[:, None] & in_k[None, :], other=0.0)
        w_block = tl.load(w_tile, mask=in_n[None, :] & in_k[:, None], other=0.0)
        a_block = tl.load(a_tile, mask=in_r[None, :] & in_k[:, None], other=0.0)
        acc = tl.dot(x_block, w_block, acc, input_precision=PRECISION)
        acc_h = tl.dot(x_block, a_block, acc_h, input_precision=PRECISION)
        x_tile += BLOCK_K * tl.cast(stride_xk, tl.int64)
        w_tile += BLOCK_K * tl.cast(stride_wk, tl.int64)
        a_tile += BLOCK_K * tl.cast(stride_ak, tl.int64)

    # An infinite x makes NaN of the padding's zeros: keep it out of the update.
    h_block = tl.where(in_r[None, :], acc_h, 0.0).to(h.dtype.element_ty)
    if block_n == 0:
        tl.store(h + rows[:, None] * r + ranks[None, :], h_block, mask=in_m[:, None] & in_r[None, :])
    _finish(
        acc,
        h_block,
        bias,
        b,
        y + rows[:, None] * N,
        in_m,
        first_n,
        N,
        r,
        scaling,
        stride_bias,
        stride_bn,
        stride_br,
        BLOCK_M,
        BLOCK_N,
        BLOCK_R,
        STRIP,
        PRECISION,
    )


def lora_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """LoRA's forward in one kernel; ``lora_product(g, W.t(), None, B.t(), A.t(), s)`` is its backward to the input.

    Sums are in float32; h is rounded to the dtype of ``x`` before it meets ``b``, and y is rounded once.

    Args:
        x: (M, K) float32, bfloat16 or float16; like all others of any strides.
        weight: (N, K) like ``x``.
        bias: (N,) like ``x``, or None.
        a: (r, K) like ``x``, 1 ≤ r ≤ 64.
        b: (N, r) like ``x``.
        scaling: the factor s of the adapter.
        config: instead of the one measured or guessed best.

    Returns:
        y (M, N) and h = x aᵀ (M, r), contiguous, in the dtype of ``x``.

    Raises:
        TypeError: not tensors, or of other dtypes.
        ValueError: shapes that do not fit, a rank whose power of two is above ``MAX_FUSED_RANK``, or another device.
    """
    check("lora_product", "x", x, (None, None))
    M, K = x.shape
    check("lora_product", "weight", weight, (None, K), like=x)
    N = weight.shape[0]
    if bias is not None:
        check("lora_product", "bias", bias, (N,), like=x)
    check("lora_product", "a", a, (None, K), like=x)
    r = a.shape[0]
    check("lora_product", "b", b, (N, r), like=x)
    check_rank("lora_product", r)
    if r > MAX_FUSED_RANK:
        raise ValueError(
            f"lora_product: the rank must be at most {MAX_FUSED_RANK}, got {r}: use the two-step path "
            "(skinny_product, then add_low_rank_)."
        )
    y = x.new_empty((M, N))
    if M == 0 or N == 0:
        return y, skinny_product(x, a)
    h = x.new_empty((M, r))
    config = config or _choose(x, M, K, N, r)
    grid = (triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"]),)
    with on_device(x):
        lora_product_kernel[grid](
            x,
            weight,
            bias,
            a,
            b,
            y,
            h,
            M,
            N,
            K,
            r,
            scaling,
            *x.stride(),
            *weight.stride(),
            1 if bias is None else bias.stride(0),
            *a.stride(),
            *b.stride(),
            BLOCK_R=padded(r),
            GROUP_M=GROUP_M,
            PRECISION=dot_precision(x.dtype),
            **config.launch,
        )
    return y, h


def _choose(x: Tensor, M: int, K: int, N: int, r: int) -> Config:
    if x.dtype == torch.float32:
        return _SINGLE_CONFIGS[dot_precision(x.dtype)]
    deep = padded(r) <= 32
    if triton.cdiv(M, 128) * triton.cdiv(N, 128) >= 2 * multiprocessors(x.device):
        default = "square" if deep else "square_k32"
    else:
        enough = triton.cdiv(M, 64) * triton.cdiv(N, 128) >= multiprocessors(x.device)
        default = "wide" if deep and enough else "small"
    candidates = _DEEP_CONFIGS | _HALF_CONFIGS if deep else _HALF_CONFIGS
    return pick("lora_product", candidates, default, x, M=M, K=K, N=N, r=r)


def builds() -> Iterator[Build]:
    """Every configuration: the forward at the narrowest padded rank, the backward to the input at the widest."""
    forward = ("stride_xk", "stride_wk", "stride_bias", "stride_ak", "stride_br")
    backward = ("stride_xk", "stride_wn", "stride_ar", "stride_bn")
    for name, config in CONFIGS.items():
        dtype, precision = ("fp32", name) if name in _SINGLE_CONFIGS else ("bf16", "ieee")
        widest = 32 if name in _DEEP_CONFIGS else 64
        for way, contiguous, r in (("forward", forward, 16), ("backward", backward, widest)):
            constexprs = {
                **dict.fromkeys(contiguous, 1),
                **dict(config.blocks),
                "BLOCK_R": r,
                "GROUP_M": GROUP_M,
                "PRECISION": precision,
            }
            if way == "backward":
                constexprs |= {"bias": None, "stride_bias": 1}
            signature = {
                **dict.fromkeys(("x", "weight", "bias", "a", "b", "y", "h"), f"*{dtype}"),
                **dict.fromkeys(("M", "N", "K", "r"), "i32"),
                "scaling": "fp32",
                **dict.fromkeys((n for n in lora_product_kernel.arg_names if n.startswith("stride_")), "i32"),
            }
            signature = {n: kind for n, kind in signature.items() if n not in constexprs}
            yield Build(
                f"{dtype} {precision} r{r} {name} {way}",
                lora_product_kernel,
                signature,
                constexprs,
                config.num_warps,
                config.num_stages,
                [n for n in signature if n != "scaling"],
            )
