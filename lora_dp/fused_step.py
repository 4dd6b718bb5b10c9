"""Noise, low-pass filter and optimizer step of all parameters together, where an op does them in one launch or pass.

The wrapped optimizer's state and hyper-parameters are read and kept up as it would itself, so schedulers, state dicts
and a later step by torch go on from there. Where no op does what the wrapped optimizer's own step would do,
:func:`find_fused_step` finds none.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lora_dp.coverage import PrivateParameter
from lora_dp.filtering import Filter, GaussianFilter
from lora_dp.kernels.optimizer_rows import adam_row, sgd_row
from lora_dp.mechanism import Mechanism, total
from lora_dp.noise import grid_step
from lora_dp.ops.private_update import ExampleSum, can_update, private_update_
from lora_dp.ops.registry import kernels_take
from lora_dp.randomness import Draw, RandomSource, SeededSource

_NAMES: dict[type, Literal["sgd", "adam", "adamw"]] = {
    torch.optim.SGD: "sgd", torch.optim.Adam: "adam", torch.optim.AdamW: "adamw"}
_States = list[tuple[dict[str, Any], dict[str, Any], Tensor]]
_Sums = Sequence[Tensor | ExampleSum]
_Step = Callable[
    [torch.optim.Optimizer, Sequence[PrivateParameter], _Sums, Mechanism, Filter | None, int], None]
# Options that change the formula, or hand it hooks or tensors that no kernel knows.
_UNKNOWN = ("maximize", "amsgrad", "differentiable", "capturable", "fused")


def find_fused_step(
    optimizer: torch.optim.Optimizer, trained: Sequence[PrivateParameter], sums: _Sums, mechanism: Mechanism,
    low_pass: Filter | None,
) -> _Step | None:
    """What does the whole step: the native op, else the Triton kernel for reproducible runs, else None."""
    if not trained or not isinstance(low_pass, GaussianFilter | None) or not _known(optimizer):
        return None
    device = trained[0].parameter.device
    tensors = [value.gradients if isinstance(value, ExampleSum) else value for value in sums]
    if any(tensor.device != device or not tensor.is_contiguous()
           for tensor in [*(p.parameter for p in trained), *tensors]):
        return None
    if isinstance(mechanism.source, RandomSource) and all(
            can_update(p.parameter, _strength(low_pass, p)) and _states_match(optimizer.state.get(p.parameter), p)
            for p in trained):
        return _native_step
    if isinstance(mechanism.source, SeededSource) and kernels_take(trained[0].parameter) and all(
            p.parameter.dtype == torch.float32 for p in trained):
        return _triton_step
    return None


def _known(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the wrapped optimizer's step is a formula of ours, the same in all its groups, and nobody hooks it."""
    if type(optimizer) not in _NAMES or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return False
    groups = optimizer.param_groups
    if any(group.get(option) for group in groups for option in _UNKNOWN):
        return False
    if type(optimizer) is torch.optim.Adam and any(group.get("decoupled_weight_decay") for group in groups):
        return False
    if any(isinstance(value, Tensor) for group in groups for value in (group["lr"], *group.get("betas", ()))):
        return False
    return len({bool(group.get("momentum")) for group in groups}) <= 1


def _strength(low_pass: Filter | None, p: PrivateParameter) -> float:
    return low_pass.strength if isinstance(low_pass, GaussianFilter) and p.factor is not None else 0.0


def _states_match(state: dict[str, Any] | None, p: PrivateParameter) -> bool:
    values = [] if state is None else [state.get(name) for name in ("momentum_buffer", "exp_avg", "exp_avg_sq")]
    return all(value is None or (value.dtype == p.parameter.dtype and value.device == p.parameter.device)
               for value in values)


@torch.no_grad()
def _native_step(
    optimizer: torch.optim.Optimizer, trained: Sequence[PrivateParameter], sums: _Sums, mechanism: Mechanism,
    low_pass: Filter | None, expected_batch_size: int,
) -> None:
    """θ ← optimizer(θ, low-pass((sum + σC·z) / L)) by :func:`private_update_`."""
    std = mechanism.noise_std(sum(p.parameter.numel() for p in trained))
    step = grid_step(std) if std else 1.0
    assert isinstance(mechanism.source, RandomSource)
    draw = mechanism.source.next_draw() if std else Draw(0, 0)
    name, rows, first, second = _rows_and_states(optimizer, trained)
    for p in trained:
        p.parameter.grad = torch.empty_like(p.parameter)
    private_update_(
        [p.parameter.detach() for p in trained], sums, first, second,
        [p.parameter.grad for p in trained if p.parameter.grad is not None], rows,
        optimizer="momentum" if name == "sgd" and first else name, key=draw.key, draw=draw.number,
        scale=std / step if std else 0.0, step=step, expected_batch_size=expected_batch_size,
        filtered=[_strength(low_pass, p) > 0 for p in trained],
        filter_strength=low_pass.strength if isinstance(low_pass, GaussianFilter) else 0.0)


@torch.no_grad()
def _triton_step(
    optimizer: torch.optim.Optimizer, trained: Sequence[PrivateParameter], sums: _Sums, mechanism: Mechanism,
    low_pass: Filter | None, expected_batch_size: int,
) -> None:
    """The same with noise of a counter-based generator on the device, not cryptographic; ``.grad`` stays empty."""
    from lora_dp.kernels.noise_update import noise_update

    name, rows, first, second = _rows_and_states(optimizer, trained)
    assert isinstance(mechanism.source, SeededSource)
    device = trained[0].parameter.device
    noise_update(
        [p.parameter.detach() for p in trained], [total(value).double() for value in sums], first, second,
        torch.tensor(rows, dtype=torch.float32).to(device, non_blocking=True),
        torch.tensor(mechanism.source.next_counter()).to(device, non_blocking=True),
        std=mechanism.noise_std(sum(p.parameter.numel() for p in trained)), expected_batch_size=expected_batch_size,
        filter_strength=low_pass.strength if isinstance(low_pass, GaussianFilter) else 0.0,
        filtered=[_strength(low_pass, p) > 0 for p in trained], optimizer=name)


def _rows_and_states(
    optimizer: torch.optim.Optimizer, trained: Sequence[PrivateParameter]
) -> tuple[Literal["sgd", "adam", "adamw"], list[list[float]], list[Tensor], list[Tensor]]:
    """The formula, its numbers for each parameter, and the states, made where they are missing."""
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    states: _States = [(group_of[id(p.parameter)], optimizer.state[p.parameter], p.parameter) for p in trained]
    name = _NAMES[type(optimizer)]
    return (name, *(_sgd if name == "sgd" else _adam)(states))


def _state(state: dict[str, Any], name: str, parameter: Tensor) -> Tensor:
    """The named state, made if it is missing."""
    value = state.get(name)
    if value is None:
        value = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    state[name] = value.contiguous()
    return state[name]


def _sgd(states: _States) -> tuple[list[list[float]], list[Tensor], list[Tensor]]:
    rows = [
        sgd_row(group["lr"], weight_decay=group["weight_decay"], momentum=group["momentum"],
                dampening=group["dampening"], nesterov=group["nesterov"],
                first_step=state.get("momentum_buffer") is None)
        for group, state, _ in states]
    if not states[0][0]["momentum"]:
        return rows, [], []
    return rows, [_state(state, "momentum_buffer", parameter) for _, state, parameter in states], []


def _adam(states: _States) -> tuple[list[list[float]], list[Tensor], list[Tensor]]:
    rows = []
    for group, state, _ in states:
        state["step"] = state.get("step", torch.tensor(0.0)) + 1
        rows.append(adam_row(
            group["lr"], weight_decay=group["weight_decay"], betas=group["betas"], eps=group["eps"],
            step=int(state["step"])))
    return (rows, [_state(state, "exp_avg", parameter) for _, state, parameter in states],
            [_state(state, "exp_avg_sq", parameter) for _, state, parameter in states])
