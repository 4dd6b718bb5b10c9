"""y += s · h bᵀ in place: reads and writes y once, and makes no second tensor of its size."""

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
    on_device,
    padded,
    pick,
)

CONFIGS = {
    "square": Config.of(8, 1, BLOCK_M=64, BLOCK_N=128),
    "wide": Config.of(8, 2, BLOCK_M=32, BLOCK_N=256),
    "small": Config.of(4, 2, BLOCK_M=32, BLOCK_N=64),
}


@triton.jit
def low_rank_update_kernel(
    y,
    h,
    b,
    M,
    N,
    r,
    scaling,
    stride_ym,
    stride_yn,
    stride_hm,
    stride_hr,
    stride_bn,
    stride_br,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks_n = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) // blocks_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) % blocks_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = rows < M, columns < N
    y_tile = y + rows[:, None] * stride_ym + columns[None, :] * stride_yn
    y_block = tl.load(y_tile, mask=in_m[:, None] & in_n[None, :], other=0.0)
    update = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, r, BLOCK_R):
        ranks = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_R)
        in_r = ranks < r
        h_tile = h + rows[:, None] * stride_hm + ranks[None, :] * stride_hr
        b_tile = b + columns[None, :] * stride_bn + ranks[:, None] * stride_br
        h_block = tl.load(h_tile, mask=in_m[:, None] & in_r[None, :], other=0.0)
        b_block = tl.load(b_tile, mask=in_n[None, :] & in_r[:, None], other=0.0)
        update = tl.dot(h_block, b_block, update, input_precision=PRECISION)
    total = y_block.to(tl.float32) + scaling * update
    tl.store(y_tile, total.to(y.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


def add_low_rank_(y: Tensor, h: Tensor, b: Tensor, scaling: float, *, config: Config | None = None) -> None:
    """Add scaling · h bᵀ to ``y`` in place, in float32, rounded once.

    Args:
        y: (M, N) float32, bfloat16 or float16, any strides that give every element its own memory.
        h: (M, r) like ``y``, any strides. 1 ≤ r ≤ 256.
        b: (N, r) like ``y``, any strides.
        scaling: the factor s of the adapter.
        config: instead of the one measured or guessed best.

    Raises:
        TypeError: not tensors, or of other dtypes.
        ValueError: shapes that do not fit, a rank outside 1 … 256, an expanded ``y``, or another device.
    """
    check("add_low_rank_", "y", y, (None, None))
    M, N = y.shape
    check("add_low_rank_", "h", h, (M, None), like=y)
    check("add_low_rank_", "b", b, (N, h.shape[1]), like=y)
    r = h.shape[1]
    check_rank("add_low_rank_", r)
    if any(stride == 0 and size > 1 for size, stride in zip(y.shape, y.stride(), strict=True)):
        raise ValueError("add_low_rank_: y is expanded, so that its elements share memory: clone it.")
    if M == 0 or N == 0:
        return
    config = config or _choose(y, M, N, r)
    grid = (triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"]),)
    with on_device(y):
        low_rank_update_kernel[grid](
            y,
            h,
            b,
            M,
            N,
            r,
            scaling,
            *y.stride(),
            *h.stride(),
            *b.stride(),
            BLOCK_R=_block_r(y.dtype, r),
            PRECISION=dot_precision(y.dtype),
            **config.launch,
        )


def _block_r(dtype: torch.dtype, r: int) -> int:
    # float32 is multiplied from registers: a narrower step.
    return min(padded(r), 16 if dtype == torch.float32 else 64)


def _choose(y: Tensor, M: int, N: int, r: int) -> Config:
    return pick("low_rank_update", CONFIGS, "small" if N <= 64 else "square", y, M=M, N=N, r=r)


def builds() -> Iterator[Build]:
    """Every configuration, for the ranks that fill a step."""
    strides = {"stride_ym": "i32", "stride_hm": "i32", "stride_bn": "i32"}
    for name, config in CONFIGS.items():
        for dtype, r, precision in (
            (torch.bfloat16, 16, "ieee"),
            (torch.bfloat16, 256, "ieee"),
            (torch.float32, 256, "ieee"),
            (torch.float32, 256, "tf32"),
        ):
            pointers = dict.fromkeys(("y", "h", "b"), "*" + TRITON_NAMES[dtype])
            yield Build(
                f"{TRITON_NAMES[dtype]} {precision} r{r} {name}",
                low_rank_update_kernel,
                {**pointers, "M": "i32", "N": "i32", "r": "i32", "scaling": "fp32", **strides},
                {
                    "stride_yn": 1,
                    "stride_hr": 1,
                    "stride_br": 1,
                    "BLOCK_M": config["BLOCK_M"],
                    "BLOCK_N": config["BLOCK_N"],
                    "BLOCK_R": _block_r(dtype, r),
                    "PRECISION": precision,
                },
                config.num_warps,
                config.num_stages,
                (*pointers, *strides, "M", "N", "r"),
            )
