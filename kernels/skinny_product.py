"""h = x aᵀ with few columns: one pass over x (design: h = xAᵀ of the forward, u = gB of the backward).

Each program holds a block of rows and all columns that fit on chip, and walks along K. Where the rows are too few to
fill the device, K is split, and a second kernel adds the float32 partial sums in a fixed order.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_dp.kernels.launching import (
    TRITON_NAMES,
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

_HALF_CONFIGS = {
    "tall": Config.of(8, 4, BLOCK_M=128, BLOCK_K=64, SPLIT_K=1),
    "rows": Config.of(8, 3, BLOCK_M=64, BLOCK_K=64, SPLIT_K=1),
    "short": Config.of(8, 3, BLOCK_M=32, BLOCK_K=128, SPLIT_K=1),
    "split": Config.of(8, 3, BLOCK_M=16, BLOCK_K=128, SPLIT_K=8),
}
CONFIGS = _HALF_CONFIGS | {"float32": Config.of(8, 4, BLOCK_M=64, BLOCK_K=32, SPLIT_K=1)}
SUM_BLOCK = 1024


@triton.jit
def skinny_product_kernel(
    x,
    a,
    out,
    M,
    K,
    r,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2).to(tl.int64)
    share = tl.cdiv(K, SPLIT_K * BLOCK_K) * BLOCK_K
    first = split * share
    ks = first + tl.arange(0, BLOCK_K)
    x_tile = x + rows[:, None] * stride_xm + ks[None, :] * stride_xk
    a_tile = a + ranks[None, :] * stride_ar + ks[:, None] * stride_ak
    in_m, in_r = rows < M, ranks < r
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, share, BLOCK_K):
        in_k = ks < K - k
        x_block = tl.load(x_tile, mask=in_m[:, None] & in_k[None, :], other=0.0)
        a_block = tl.load(a_tile, mask=in_r[None, :] & in_k[:, None], other=0.0)
        acc = tl.dot(x_block, a_block, acc, input_precision=PRECISION)
        x_tile += BLOCK_K * tl.cast(stride_xk, tl.int64)
        a_tile += BLOCK_K * tl.cast(stride_ak, tl.int64)
    out_tile = out + (split * M + rows[:, None]) * r + ranks[None, :]
    tl.store(out_tile, acc.to(out.dtype.element_ty), mask=in_m[:, None] & in_r[None, :])


@triton.jit
def sum_splits_kernel(partial, out, size, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr):
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = elements < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(SPLIT_K):
        total += tl.load(partial + tl.cast(split, tl.int64) * size + elements, mask=inside, other=0.0)
    tl.store(out + elements, total.to(out.dtype.element_ty), mask=inside)


def skinny_product(x: Tensor, a: Tensor, *, config: Config | None = None) -> Tensor:
    """h = x aᵀ, accumulated in float32.

    Args:
        x: (M, K) float32, bfloat16 or float16, any strides.
        a: (r, K) like ``x``, any strides: u = g B is ``skinny_product(g, B.t())``. 1 ≤ r ≤ 256.
        config: instead of the one measured or guessed best.

    Returns:
        h (M, r), contiguous, in the dtype of ``x``.

    Raises:
        TypeError: not tensors, or of other dtypes.
        ValueError: shapes that do not fit, a rank outside 1 … 256, or another device.
    """
    check("skinny_product", "x", x, (None, None))
    check("skinny_product", "a", a, (None, x.shape[1]), like=x)
    check_rank("skinny_product", a.shape[0])
    M, K = x.shape
    r = a.shape[0]
    h = x.new_empty((M, r))
    if M == 0:
        return h
    config = config or _choose(x, M, K, r)
    splits = config["SPLIT_K"]
    out = h if splits == 1 else x.new_empty((splits, M, r), dtype=torch.float32)
    block_r = _block_r(x.dtype, r)
    grid = (triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(r, block_r), splits)
    with on_device(x):
        skinny_product_kernel[grid](
            x,
            a,
            out,
            M,
            K,
            r,
            *x.stride(),
            *a.stride(),
            BLOCK_R=block_r,
            PRECISION=dot_precision(x.dtype),
            **config.launch,
        )
        if splits > 1:
            sum_splits_kernel[(triton.cdiv(M * r, SUM_BLOCK),)](out, h, M * r, SPLIT_K=splits, BLOCK=SUM_BLOCK)
    return h


def _block_r(dtype: torch.dtype, r: int) -> int:
    # float32 is multiplied from registers, which hold no more than 64 columns; x then comes again from the cache.
    return min(padded(r), 64 if dtype == torch.float32 else 256)


def _choose(x: Tensor, M: int, K: int, r: int) -> Config:
    if x.dtype == torch.float32:
        return CONFIGS["float32"]
    rows = M / multiprocessors(x.device)
    if rows < 16 and K >= 2048:
        default = "split"
    elif rows < 64:
        default = "short"
    else:
        default = "rows" if rows < 256 else "tall"
    return pick("skinny_product", _HALF_CONFIGS, default, x, M=M, K=K, r=r)


def builds() -> Iterator[Build]:
    """Every configuration: h = x aᵀ at the narrowest block of columns; u = g B, with B transposed, at the widest."""
    for name, config in CONFIGS.items():
        half = name in _HALF_CONFIGS
        dtype = torch.bfloat16 if half else torch.float32
        for precision in ("ieee",) if half else ("ieee", "tf32"):
            for r, contiguous, other in ((16, "stride_ak", "stride_ar"), (256, "stride_ar", "stride_ak")):
                kind = TRITON_NAMES[dtype]
                signature = {
                    "x": f"*{kind}",
                    "a": f"*{kind}",
                    "out": f"*{kind}" if config["SPLIT_K"] == 1 else "*fp32",
                    **dict.fromkeys(("M", "K", "r", "stride_xm", other), "i32"),
                }
                constexprs = {
                    "stride_xk": 1,
                    contiguous: 1,
                    **dict(config.blocks),
                    "BLOCK_R": _block_r(dtype, r),
                    "PRECISION": precision,
                }
                yield Build(
                    f"{kind} {precision} r{r} {name}",
                    skinny_product_kernel,
                    signature,
                    constexprs,
                    config.num_warps,
                    config.num_stages,
                    list(signature),
                )
    signature = {"partial": "*fp32", "out": "*bf16", "size": "i32"}
    constexprs = {"SPLIT_K": CONFIGS["split"]["SPLIT_K"], "BLOCK": SUM_BLOCK}
    yield Build("bf16 sum of splits", sum_splits_kernel, signature, constexprs, 4, 2, list(signature))
