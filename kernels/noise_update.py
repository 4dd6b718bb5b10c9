"""Noise, low-pass filter and optimizer step of every parameter, in one launch: the reproducible path.

A filtered gradient needs its neighbours' noise too. Each program works that out again from the counter instead of
waiting for another program: Philox is far cheaper than memory or a second launch.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_dp.kernels.gaussian_filter import filter_reach, filtered_places
from lora_dp.kernels.launching import DTYPES, Build, Config, check, multiprocessors, on_device, padded, pick
from lora_dp.kernels.philox import standard_normal
from lora_dp.kernels.tile_table import first_tiles, owner_of, send

CONFIGS = {
    "narrow": Config.of(4, 1, BLOCK=256),
    "medium": Config.of(4, 1, BLOCK=512),
    "wide": Config.of(8, 1, BLOCK=1024),
}

OptimizerName = Literal["sgd", "adam", "adamw"]

# Columns of ``hyper``, filled by optimizer_rows: the first two are every optimizer's.
LEARNING_RATE = tl.constexpr(0)
WEIGHT_DECAY = tl.constexpr(1)
MOMENTUM = tl.constexpr(2)
GRADIENT_WEIGHT = tl.constexpr(3)
NESTEROV = tl.constexpr(4)
FIRST_STEP = tl.constexpr(5)
ONE_MINUS_BETA1 = tl.constexpr(2)
BETA2 = tl.constexpr(3)
ONE_MINUS_BETA2 = tl.constexpr(4)
EPS = tl.constexpr(5)
STEP_SIZE = tl.constexpr(6)
ROOT_CORRECTION2 = tl.constexpr(7)
COLUMNS = {"sgd": 6, "adam": 8, "adamw": 8}

# Below this, a Gaussian's neighbouring weight is 0 in any format; 1 / strength must stay finite.
_LEAST_STRENGTH = 1e-3


@triton.jit
def _sgd(theta, gradient, first, hyper, offsets, inside, STATE: tl.constexpr):
    gradient += tl.load(hyper + WEIGHT_DECAY) * theta
    if STATE:
        momentum = tl.load(hyper + MOMENTUM)
        pointers = first.to(tl.pointer_type(tl.float32)) + offsets
        buffer = momentum * tl.load(pointers, mask=inside, other=0.0) + tl.load(hyper + GRADIENT_WEIGHT) * gradient
        buffer = tl.where(tl.load(hyper + FIRST_STEP) != 0, gradient, buffer)
        tl.store(pointers, buffer, mask=inside)
        gradient = tl.where(tl.load(hyper + NESTEROV) != 0, gradient + momentum * buffer, buffer)
    return theta - tl.load(hyper + LEARNING_RATE) * gradient


@triton.jit
def _adam(theta, gradient, first, second, hyper, offsets, inside, DECOUPLED: tl.constexpr):
    decay = tl.load(hyper + WEIGHT_DECAY)
    if DECOUPLED:
        theta *= 1 - tl.load(hyper + LEARNING_RATE) * decay
    else:
        gradient += decay * theta
    firsts = first.to(tl.pointer_type(tl.float32)) + offsets
    seconds = second.to(tl.pointer_type(tl.float32)) + offsets
    mean = tl.load(firsts, mask=inside, other=0.0)
    mean += tl.load(hyper + ONE_MINUS_BETA1) * (gradient - mean)
    square = tl.load(hyper + BETA2) * tl.load(seconds, mask=inside, other=0.0)
    square += tl.load(hyper + ONE_MINUS_BETA2) * gradient * gradient
    tl.store(firsts, mean, mask=inside)
    tl.store(seconds, square, mask=inside)
    denominator = tl.div_rn(tl.sqrt_rn(square), tl.load(hyper + ROOT_CORRECTION2)) + tl.load(hyper + EPS)
    return theta - tl.load(hyper + STEP_SIZE) * tl.div_rn(mean, denominator)


@triton.jit
def _update(
    address,
    gradient,
    first,
    second,
    hyper,
    offsets,
    inside,
    DTYPE: tl.constexpr,
    OPTIMIZER: tl.constexpr,
    STATE: tl.constexpr,
):
    pointers = address.to(tl.pointer_type(DTYPE)) + offsets
    theta = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    gradient = gradient.to(DTYPE).to(tl.float32)
    if OPTIMIZER == "sgd":
        theta = _sgd(theta, gradient, first, hyper, offsets, inside, STATE)
    else:
        theta = _adam(theta, gradient, first, second, hyper, offsets, inside, OPTIMIZER == "adamw")
    tl.store(pointers, theta.to(DTYPE), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _noise_update_kernel(
    table,
    count,
    hyper,
    rng,
    std,
    expected_batch_size,
    inverse_strength,
    WIDE: tl.constexpr,
    NOISE: tl.constexpr,
    OPTIMIZER: tl.constexpr,
    STATE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0)
    p = owner_of(table + 9 * count, count, tile, PADDED)
    entry = table + p
    size = tl.load(entry + 4 * count)
    dtype = tl.load(entry + 5 * count)
    stride = tl.load(entry + 6 * count)
    length = tl.load(entry + 7 * count)
    reach = tl.load(entry + 8 * count).to(tl.int32)
    offsets = (tile - tl.load(entry + 9 * count)) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size

    sums = tl.load(entry + count).to(tl.pointer_type(tl.float64 if WIDE else tl.float32))
    seed = tl.load(rng)
    step = tl.load(rng + 1)
    position = offsets // stride % length
    gradient = tl.zeros((BLOCK,), tl.float32)
    weights = 0.0
    for k in range(-reach, reach + 1):
        nearest = tl.minimum(tl.maximum(position + k, 0), length - 1)
        element = offsets + (nearest - position) * stride
        value = tl.load(sums + element, mask=inside, other=0.0).to(tl.float32)
        if NOISE:
            value += std * standard_normal(seed, element, p, step)
        weight = tl.exp(-0.5 * (k * inverse_strength) * (k * inverse_strength))
        gradient += weight * value
        weights += weight
    gradient = tl.div_rn(gradient, weights * expected_batch_size)

    address = tl.load(entry)
    first = tl.load(entry + 2 * count)
    second = tl.load(entry + 3 * count)
    hyper += p * COLUMNS
    if dtype == 0:
        _update(address, gradient, first, second, hyper, offsets, inside, tl.float32, OPTIMIZER, STATE)
    elif dtype == 1:
        _update(address, gradient, first, second, hyper, offsets, inside, tl.bfloat16, OPTIMIZER, STATE)
    else:
        _update(address, gradient, first, second, hyper, offsets, inside, tl.float16, OPTIMIZER, STATE)


@functools.lru_cache(maxsize=64)
def _filter_columns(shapes: tuple[torch.Size, ...], filtered: tuple[bool, ...], radius: int) -> list[int]:
    """Of each parameter: stride and length of the filtered dimension, and how far the filter reaches (0: not)."""
    strides, lengths, reaches = [], [], []
    for shape, wanted in zip(shapes, filtered, strict=True):
        stride, length = filtered_places(shape) if wanted else (1, 1)
        strides.append(stride)
        lengths.append(length)
        reaches.append(radius if wanted else 0)
    return [*strides, *lengths, *reaches]


def _check(
    parameters: Sequence[Tensor],
    sums: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    hyper: Tensor,
    rng: Tensor,
    std: float,
    expected_batch_size: float,
    filter_strength: float,
    filtered: Sequence[bool],
    optimizer: str,
) -> None:
    op = "noise_update"
    if optimizer not in COLUMNS:
        raise ValueError(f"{op}: optimizer must be 'sgd', 'adam' or 'adamw', got {optimizer!r}.")
    for name, number in (("std", std), ("filter_strength", filter_strength)):
        if not 0 <= number < math.inf:
            raise ValueError(f"{op}: {name} must be 0 or a finite positive number, got {number}.")
    if not 0 < expected_batch_size < math.inf:
        raise ValueError(f"{op}: expected_batch_size must be finite and above 0, got {expected_batch_size}.")
    count = len(parameters)
    check(op, "hyper", hyper, (count, COLUMNS[optimizer]), dtypes=(torch.float32,))
    check(op, "rng", rng, (2,), like=hyper, dtypes=(torch.int64,))
    tensors = [("hyper", hyper), ("rng", rng)]
    lists = [("sums", sums)]
    lists += [("first", first)] if optimizer != "sgd" or len(first) else []
    lists += [("second", second)] if optimizer != "sgd" else []
    for name, values in [*lists, ("filtered", filtered)]:
        if len(values) != count:
            raise ValueError(f"{op}: {name} must have an entry for each of the {count} parameters, got {len(values)}.")
    for i, parameter in enumerate(parameters):
        check(op, f"parameters[{i}]", parameter, [None] * getattr(parameter, "ndim", 0), like=hyper, dtypes=DTYPES)
        tensors.append((f"parameters[{i}]", parameter))
        for name, values in lists:
            dtypes = (torch.float32, torch.float64) if name == "sums" else (torch.float32,)
            check(op, f"{name}[{i}]", values[i], parameter.shape, like=hyper, dtypes=dtypes)
            tensors.append((f"{name}[{i}]", values[i]))
        if filtered[i] and parameter.ndim != 2:
            raise ValueError(f"{op}: filtered[{i}] takes a matrix, got the shape {tuple(parameter.shape)}.")
    for name, tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, got strides {tensor.stride()}.")


def noise_update(
    parameters: Sequence[Tensor],
    sums: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    hyper: Tensor,
    rng: Tensor,
    *,
    std: float,
    expected_batch_size: float,
    filter_strength: float,
    filtered: Sequence[bool],
    optimizer: OptimizerName,
    config: Config | None = None,
) -> None:
    """One optimizer step of every parameter with ĝ = filter((sum + std·z) / expected_batch_size), in place.

    The noise z of element e of ``parameters[p]`` is a function of (seed, step, p, e) alone: one call a step and seed,
    or two calls add the same noise. The filter is :class:`lora_dp.privacy.filtering.GaussianFilter` (arXiv 2602.19926),
    the optimizers are torch's. ĝ is rounded to the parameter's dtype, all else computed in float32, and the new
    parameter rounded once. All tensors are contiguous and on one device.

    Args:
        parameters: of any shapes, float32, bfloat16 or float16.
        sums: what each parameter's clipped gradients add up to, its shape, all float32 or all float64.
        first: float32 state of each parameter's shape: Adam's first moment, or SGD's momentum buffer ([]: no momentum).
        second: Adam's second moment, likewise; unused for "sgd".
        hyper: (P, columns) float32, a row of :mod:`~lora_dp.kernels.optimizer_rows` for each parameter.
        rng: (2,) int64, seed and step: on the device, so that a captured graph replays with the next step.
        std: deviation of the noise, in the units of ``sums``; 0 for none.
        expected_batch_size: what the noised sums are divided by.
        filter_strength: the filter's standard deviation in entries; 0 for none.
        filtered: whether each parameter, a matrix then, is filtered.
        optimizer: "sgd", "adam" (weight decay as L2) or "adamw" (decoupled weight decay).

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, device or layout, or is out of range.
    """
    _check(parameters, sums, first, second, hyper, rng, std, expected_batch_size, filter_strength, filtered, optimizer)
    wide = any(total.dtype == torch.float64 for total in sums)
    if wide and any(total.dtype != torch.float64 for total in sums):
        raise TypeError("noise_update: sums must be all float32 or all float64.")
    sizes = tuple(parameter.numel() for parameter in parameters)
    if sum(sizes) == 0:
        return

    config = config or _pick(hyper, len(sizes), sum(sizes))
    firsts, tiles = first_tiles(sizes, config["BLOCK"])
    stateful = [len(first) > 0, optimizer != "sgd"]
    addresses = [tensor.data_ptr() for tensors in (parameters, sums) for tensor in tensors]
    for used, tensors in zip(stateful, (first, second), strict=True):
        addresses += [tensor.data_ptr() for tensor in tensors] if used else [0] * len(sizes)
    shapes = tuple(parameter.shape for parameter in parameters)
    wanted = tuple(bool(filter_strength and each) for each in filtered)
    columns = _filter_columns(shapes, wanted, filter_reach(filter_strength))
    dtypes = [DTYPES.index(parameter.dtype) for parameter in parameters]
    with on_device(hyper):
        table = send([*addresses, *sizes, *dtypes, *columns, *firsts], hyper.device)
        _noise_update_kernel[(tiles,)](
            table,
            len(sizes),
            hyper,
            rng,
            float(std),
            float(expected_batch_size),
            1 / max(filter_strength, _LEAST_STRENGTH),
            WIDE=wide,
            NOISE=std > 0,
            OPTIMIZER=optimizer,
            STATE=any(stateful),
            COLUMNS=COLUMNS[optimizer],
            PADDED=padded(len(sizes)),
            **config.launch,
        )


def _pick(hyper: Tensor, count: int, elements: int) -> Config:
    # The widest tile that still gives every multiprocessor a few programs.
    programs = 4 * multiprocessors(hyper.device)
    default = next((name for name in ("wide", "medium") if elements >= programs * CONFIGS[name]["BLOCK"]), "narrow")
    return pick("noise_update", CONFIGS, default, hyper, count=count, elements=elements)


def builds() -> Iterator[Build]:
    """Every configuration with noise, for every optimizer; and one without, for ahead-of-time compiling."""
    signature = {
        "table": "*i64",
        "count": "i32",
        "hyper": "*fp32",
        "rng": "*i64",
        "std": "fp32",
        "expected_batch_size": "fp32",
        "inverse_strength": "fp32",
    }
    optimizers = {"sgd": ("sgd", False), "momentum": ("sgd", True), "adam": ("adam", True), "adamw": ("adamw", True)}
    cases = [(label, name, True) for label in optimizers for name in CONFIGS] + [("adamw", "medium", False)]
    for label, name, noise in cases:
        optimizer, state = optimizers[label]
        config = CONFIGS[name]
        yield Build(
            f"fp32 bf16 fp16 {label} {name}{'' if noise else ' without noise'}",
            _noise_update_kernel,
            signature,
            {
                "WIDE": True,
                "NOISE": noise,
                "OPTIMIZER": optimizer,
                "STATE": state,
                "COLUMNS": COLUMNS[optimizer],
                "PADDED": 256,
                **dict(config.blocks),
            },
            config.num_warps,
            config.num_stages,
            ("table", "hyper", "rng"),
        )
