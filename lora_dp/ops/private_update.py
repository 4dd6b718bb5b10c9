"""Noise, low-pass filter and optimizer step of all parameters: one launch on a GPU, one threaded pass on a CPU.

    n ← Σᵢ round(cᵢ Gᵢ / Δ) + round(z · std / Δ)     integers, exact in any order; or round(sum / Δ) for a given sum
    ĝ ← filter(n · Δ / L)                            Δ = grid step of std (why: :mod:`lora_dp.privacy.noise`)
    θ ← optimizer(θ, ĝ)                              torch's SGD, Adam, AdamW

All arithmetic is in double precision, and rounded to each tensor's dtype at the end; CPU and GPU give the same bits.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lora_dp.kernels.gaussian_filter import filter_reach, filtered_dimension, filtered_places
from lora_dp.ops.native import in_memory, native, native_takes, refuse_capture
from lora_dp.ops.registry import LIBRARY
from lora_dp.ops.rounded_gaussian import rounded_gaussian_

UpdateOptimizer = Literal["sgd", "momentum", "adam", "adamw"]

# In the order of the native library's numbers for them.
_OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_COLUMNS = 8
_TILE_ON_CUDA = 1024
# Neighbours on either side, reach · stride, that a filtered element may have.
_MOST_HALO = {"cpu": 2**24, "cuda": 2048}


class ExampleSum(NamedTuple):
    """Σᵢ cᵢ Gᵢ still to be formed: ``gradients`` ``(N, *shape)`` float32 or float64, ``coefficients`` (N,) float64.

    An example with coefficient 0 contributes nothing, whatever it holds.
    """

    gradients: Tensor
    coefficients: Tensor


def can_update(parameter: Tensor, filter_strength: float) -> bool:
    """Whether the native update takes this parameter, filtered so (0: not filtered)."""
    if parameter.dtype not in _DTYPES or not parameter.is_contiguous() or not native_takes(parameter.device):
        return False
    if not filter_strength:
        return True
    halo = filter_reach(filter_strength) * filtered_places(parameter.shape)[0]
    return halo <= _MOST_HALO[parameter.device.type]


class UpdateArguments(NamedTuple):
    """The arguments of the op, in the order of its schema; :func:`private_update_` says what each is."""

    parameters: list[Tensor]
    sums: list[Tensor]
    coefficients: list[Tensor | None]
    first: list[Tensor]
    second: list[Tensor]
    gradients: list[Tensor]
    hyper: Tensor
    filtered: list[bool]
    filter_strength: float
    optimizer: str
    key: int
    draw: int
    scale: float
    step: float
    expected_batch_size: float


@functools.lru_cache(maxsize=64)
def _weights(strength: float) -> tuple[float, ...]:
    # Beyond 40 deviations a weight is 0 in any format, and the square of a tiny strength's distance would overflow.
    distances = (min(k / strength, 40.0) for k in range(filter_reach(strength) + 1)) if strength else ()
    return tuple(math.exp(-0.5 * distance**2) for distance in distances)


def _smoothed(gradient: Tensor, strength: float) -> Tensor:
    last, length = filtered_dimension(gradient.shape) == 1, max(gradient.shape)
    along_rows = gradient if last else gradient.T
    position = torch.arange(length, device=gradient.device)
    (total, *others) = _weights(strength)
    smooth = total * along_rows
    for k, weight in enumerate(others, 1):
        total += 2 * weight
        left, right = ((position + offset).clamp(0, length - 1) for offset in (-k, k))
        smooth += weight * (along_rows[:, left] + along_rows[:, right])
    smooth /= total
    return smooth if last else smooth.T


def _stepped(
    optimizer: str, theta: Tensor, gradient: Tensor, first: Tensor | None, second: Tensor | None, row: list[float]
) -> Tensor:
    """In float64; changes the states in place, rounded to their dtype after use."""
    if optimizer in ("sgd", "momentum"):
        lr, decay, momentum, weight, nesterov, first_step = row[:6]
        gradient = gradient + decay * theta
        if first is not None:
            buffer = gradient if first_step else momentum * first.double() + weight * gradient
            first.copy_(buffer)
            gradient = gradient + momentum * buffer if nesterov else buffer
        return theta - lr * gradient
    lr, decay, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, root_correction = row
    assert first is not None and second is not None
    if optimizer == "adamw":
        theta = theta * (1 - lr * decay)
    else:
        gradient = gradient + decay * theta
    mean = first.double() + one_minus_beta1 * (gradient - first.double())
    square = beta2 * second.double() + one_minus_beta2 * gradient * gradient
    first.copy_(mean)
    second.copy_(square)
    return theta - step_size * mean / (square.sqrt() / root_correction + eps)


def _reference(update: UpdateArguments) -> None:
    rows, scale, step = update.hyper.tolist(), update.scale, update.step
    for p, parameter in enumerate(update.parameters):
        weights = update.coefficients[p]
        if weights is None:
            terms = update.sums[p].double().unsqueeze(0)
        else:
            used = weights != 0
            terms = update.sums[p][used].double() * weights[used].view(-1, *[1] * parameter.dim())
        if scale:
            noise = rounded_gaussian_(
                torch.empty(parameter.shape, dtype=torch.int64, device=parameter.device),
                update.key,
                p,
                update.draw,
                scale,
            )
            # As the kernels: NaN, or what no clipped gradient is, must not reach an integer.
            most = 2.0**62 if weights is None else min(2.0**51 - 1, 2.0**62 / max(len(weights), 1))
            steps = (terms / step).nan_to_num_(0.0).clamp_(-most, most).round_().to(torch.int64)
            gradient = (steps.sum(0) + noise).double() * step
        else:
            gradient = terms.sum(0)
        gradient = gradient / update.expected_batch_size
        if update.filtered[p] and update.filter_strength:
            gradient = _smoothed(gradient, update.filter_strength)
        if update.gradients:
            update.gradients[p].copy_(gradient)
        first = update.first[p] if update.first else None
        second = update.second[p] if update.second else None
        parameter.copy_(_stepped(update.optimizer, parameter.double(), gradient, first, second, rows[p]))


def _table(update: UpdateArguments) -> list[int]:
    """The rows of ``struct Row`` in csrc/update_math.h."""
    table, tiles, reach = [], 0, filter_reach(update.filter_strength)
    for p, parameter in enumerate(update.parameters):
        weights, size = update.coefficients[p], parameter.numel()
        smooth = update.filtered[p] and update.filter_strength
        stride, length = filtered_places(parameter.shape) if smooth else (1, 1)
        table += [
            parameter.data_ptr(),
            update.sums[p].data_ptr(),
            0 if weights is None else weights.data_ptr(),
            update.first[p].data_ptr() if update.first else 0,
            update.second[p].data_ptr() if update.second else 0,
            update.gradients[p].data_ptr() if update.gradients else 0,
            size,
            0 if weights is None else len(weights),
            _DTYPES.index(parameter.dtype),
            _DTYPES.index(update.sums[p].dtype),
            max(stride, 1),
            max(length, 1),
            reach if smooth and size else 0,
            tiles,
        ]
        tiles += -(-size // _TILE_ON_CUDA)
    return table


def _native(update: UpdateArguments) -> None:
    hyper, count, weights = update.hyper, len(update.parameters), _weights(update.filter_strength)
    rows = torch.tensor(_table(update), dtype=torch.int64, device="cpu")
    kernel = torch.tensor(weights, dtype=torch.float64, device="cpu")
    device, number, noisy = update.parameters[0].device, _OPTIMIZERS.index(update.optimizer), update.scale > 0
    if device.type == "cpu":
        native.private_update(
            update.key,
            update.draw,
            rows.data_ptr(),
            hyper.data_ptr(),
            count,
            number,
            noisy,
            update.scale,
            update.step,
            update.expected_batch_size,
            kernel.data_ptr(),
            len(weights),
            torch.get_num_threads(),
        )
        return
    # One copy for all that the kernel reads beside the tensors.
    sent = torch.cat([rows, hyper.flatten().view(torch.int64), kernel.view(torch.int64)]).to(device, non_blocking=True)
    at_hyper = sent.data_ptr() + 8 * rows.numel()
    with torch.cuda.device(device):
        native.private_update_cuda(
            update.key,
            update.draw,
            rows.data_ptr(),
            sent.data_ptr(),
            at_hyper,
            count,
            number,
            noisy,
            update.scale,
            update.step,
            update.expected_batch_size,
            kernel.data_ptr(),
            at_hyper + 8 * hyper.numel(),
            len(weights),
            torch.cuda.current_stream().cuda_stream,
        )


def _run(*arguments: Any) -> None:
    update = UpdateArguments(*arguments)
    _check(update)
    if not update.parameters:
        return
    device = update.parameters[0].device
    refuse_capture("private_update_", device)
    sums, coefficients = list(update.sums), list(update.coefficients)
    for p, kept in enumerate(coefficients):
        if kept is not None and len(kept) == 0:  # no tensor without elements has an address
            sums[p], coefficients[p] = torch.zeros_like(update.parameters[p], dtype=torch.float64), None
    strength = update.filter_strength if any(update.filtered) else 0.0
    update = update._replace(sums=sums, coefficients=coefficients, filter_strength=strength)
    (_native if native_takes(device) else _reference)(update)
    # What is written through an address, autograd does not see.
    written = [*update.parameters, *update.first, *update.second, *update.gradients]
    torch.autograd.graph.increment_version(written)


def _fake(*arguments: object) -> None:
    return None


LIBRARY.define(
    "private_update_(Tensor(a!)[] parameters, Tensor[] sums, Tensor?[] coefficients, Tensor(b!)[] first, "
    "Tensor(c!)[] second, Tensor(d!)[] gradients, Tensor hyper, bool[] filtered, float filter_strength, "
    "str optimizer, int key, int draw, float scale, float step, float expected_batch_size) -> ()"
)
LIBRARY.impl("private_update_", _run, "CompositeExplicitAutograd")
torch.library.register_fake("lora_dp::private_update_", _fake, lib=LIBRARY)


def private_update_(
    parameters: Sequence[Tensor],
    sums: Sequence[Tensor | ExampleSum],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    gradients: Sequence[Tensor],
    hyper: Sequence[Sequence[float]],
    *,
    optimizer: UpdateOptimizer,
    key: int,
    draw: int,
    scale: float,
    step: float,
    expected_batch_size: float,
    filtered: Sequence[bool],
    filter_strength: float,
) -> None:
    """One private step of every parameter, in place.

    The noise of parameter p is :func:`~lora_dp.ops.rounded_gaussian.rounded_gaussian_` of (key, p, draw): one call for
    each draw.

    Args:
        parameters: any shapes, float32, bfloat16, float16 or float64, contiguous, on one device.
        sums: of each parameter, its clipped sum (its shape, float32 or float64) or an :class:`ExampleSum`.
        first: states of the parameters' shapes and dtypes: momentum buffers or first moments; [] for "sgd".
        second: second moments; [] for "sgd" and "momentum".
        gradients: where ĝ goes, like the parameters; [] for nowhere.
        hyper: for each parameter a row of :mod:`lora_dp.kernels.optimizer_rows`.
        optimizer: "sgd", "momentum", "adam" (weight decay as L2) or "adamw" (decoupled).
        key, draw: of the noise; unused without.
        scale: deviation of the noise in steps of the grid, in [1, 2³³); 0: no noise, and no grid.
        step: the grid's, a power of two; unused without noise.
        expected_batch_size: L.
        filtered: whether each parameter, a matrix then, is filtered.
        filter_strength: of the Gaussian filter, in entries; 0 for none.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, device or layout, is out of range, or, on a CPU, is
            not finite. Nothing has changed then.
    """
    plain = [part.gradients if isinstance(part, ExampleSum) else part for part in sums]
    weights = [part.coefficients if isinstance(part, ExampleSum) else None for part in sums]
    named: list[tuple[str, Sequence[Tensor | None]]] = [
        ("parameters", parameters),
        ("sums", plain),
        ("coefficients", weights),
        ("first", first),
        ("second", second),
        ("gradients", gradients),
    ]
    for name, values in named:
        for p, tensor in enumerate(values):
            if tensor is None and name == "coefficients":
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(f"private_update_: {name}[{p}] must be a tensor, got {type(tensor).__name__}.")
            # Torch sends these elsewhere than to our checks: with one on the meta device, to a trial without numbers.
            if tensor.device != parameters[0].device or tensor.layout != torch.strided or tensor.is_nested:
                raise _stray(f"{name}[{p}]", tensor, parameters[0].device)
    wanted = 6 if optimizer in ("sgd", "momentum") else _COLUMNS
    for p, row in enumerate(hyper):
        if len(row) != wanted:
            raise _refusal(f"hyper[{p}]", f"have {wanted} numbers for {optimizer}", len(row))
    rows = [[*row, *[0.0] * (_COLUMNS - wanted)] for row in hyper]
    torch.ops.lora_dp.private_update_(
        list(parameters),
        plain,
        weights,
        list(first),
        list(second),
        list(gradients),
        torch.tensor(rows, dtype=torch.float64, device="cpu").view(len(rows), _COLUMNS),
        list(filtered),
        float(filter_strength),
        optimizer,
        key,
        draw,
        float(scale),
        float(step),
        float(expected_batch_size),
    )


def _stray(name: str, tensor: Tensor, device: torch.device | None) -> ValueError:
    plain = tensor.layout == torch.strided and not tensor.is_nested
    layout = tensor.stride() if plain else "nested" if tensor.is_nested else tensor.layout
    return _refusal(name, f"be contiguous and on {device}", f"strides {layout} on {tensor.device}")


def _refusal(what: str, must: str, got: object) -> ValueError:
    return ValueError(f"private_update_: {what} must {must}, got {got}.")


def _check(update: UpdateArguments) -> None:
    strength, hyper, scale = update.filter_strength, update.hyper, update.scale
    if update.optimizer not in _OPTIMIZERS:
        raise _refusal("optimizer", f"be one of {', '.join(_OPTIMIZERS)}", repr(update.optimizer))
    if not 0 <= strength < math.inf:
        raise _refusal("filter_strength", "be 0 or a finite positive number", strength)
    parameters, count = update.parameters, len(update.parameters)
    states = [("first", update.first), ("second", update.second)][: {"sgd": 0, "momentum": 1}.get(update.optimizer, 2)]
    states += [("gradients", update.gradients)] if update.gradients else []
    lists = [(name, getattr(update, name)) for name in ("sums", "coefficients", "hyper", "filtered")]
    for name, values in [*lists, *states]:
        if len(values) != count:
            raise _refusal(name, f"have an entry for each of the {count} parameters", len(values))
    _check_tensor("hyper", hyper, (count, _COLUMNS), (torch.float64,), torch.device("cpu"))
    if not hyper.isfinite().all():
        raise _refusal("hyper", "be finite", hyper.tolist())
    check = functools.partial(_check_tensor, device=parameters[0].device if count else None)
    for p, parameter in enumerate(parameters):
        check(f"parameters[{p}]", parameter, parameter.shape, _DTYPES)
        kept = update.coefficients[p]
        n = () if kept is None else (len(kept),)
        if kept is not None:
            check(f"coefficients[{p}]", kept, n, (torch.float64,))
        check(f"sums[{p}]", update.sums[p], (*n, *parameter.shape), (torch.float32, torch.float64))
        for name, values in states:
            check(f"{name}[{p}]", values[p], parameter.shape, (parameter.dtype,))
        if update.filtered[p] and parameter.dim() != 2:
            raise _refusal(f"filtered[{p}]", "be False: a filter takes matrices, not a shape", tuple(parameter.shape))
        if not can_update(parameter, strength if update.filtered[p] else 0.0) and native_takes(parameter.device):
            must = f"be smaller for the shape {tuple(parameter.shape)} here"
            raise _refusal("filter_strength", must, strength)
    if scale and not (1 <= scale < 2**33 and update.step > 0 and math.frexp(update.step)[0] == 0.5):
        raise ValueError(
            f"private_update_: scale must lie in [1, 2³³) and step be a power of two, got {scale} and {update.step}."
        )
    if not 0 < update.expected_batch_size < math.inf:
        raise _refusal("expected_batch_size", "be finite and above 0", update.expected_batch_size)


def _check_tensor(
    name: str, tensor: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device | None
) -> None:
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"private_update_: {name} must have the shape {tuple(shape)}, got {tuple(tensor.shape)}.")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"private_update_: {name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}.")
    # A lazily negated tensor, or one of zeros, has other numbers in memory, or none.
    if tensor.is_neg() or tensor._is_zerotensor():
        raise ValueError(f"private_update_: {name} must have its numbers in memory: give it cloned.")
    if tensor.device != device or tensor.layout != torch.strided or not tensor.is_contiguous():
        raise _stray(name, tensor, device)
    if not in_memory(tensor):
        raise ValueError(f"private_update_: {name} reaches beyond its storage, or its address is odd: give it cloned.")
