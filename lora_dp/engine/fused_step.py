"""Noise, low-pass filter and optimizer step of all parameters together, where an op does them in one launch or pass.

The wrapped optimizer's state and hyper-parameters are read and kept up as it would itself, so schedulers, state dicts
and a later step by torch go on from there. Where no op does what the wrapped optimizer's own step would do,
:func:`find_fused_step` finds none.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from lora_dp.engine.validation import PrivateParameter
from lora_dp.kernels.optimizer_rows import adam_row, sgd_row
from lora_dp.ops.private_update import ExampleSum, can_update, private_update_
from lora_dp.ops.registry import kernels_take
from lora_dp.privacy.filtering import Filter, GaussianFilter
from lora_dp.privacy.mechanism import Mechanism, total
from lora_dp.privacy.randomness import Draw, RandomSource, SeededSource

_NAMES: dict[type, Literal["sgd", "adam", "adamw"]] = {
    torch.optim.SGD: "sgd",
    torch.optim.Adam: "adam",
    torch.optim.AdamW: "adamw",
}
# A parameter's group, its state, itself.
_Members = list[tuple[dict[str, Any], dict[str, Any], Tensor]]
_Sums = Sequence[Tensor | ExampleSum]
_Step = Callable[[torch.optim.Optimizer, Sequence[PrivateParameter], _Sums, Mechanism, Filter | None, int], None]
# Options that change the formula, or hand it hooks or tensors that no kernel knows.
_UNKNOWN = ("maximize", "amsgrad", "differentiable", "capturable", "fused")


def find_fused_step(
    optimizer: torch.optim.Optimizer,
    trained: Sequence[PrivateParameter],
    sums: _Sums,
    mechanism: Mechanism,
    low_pass: Filter | None,
) -> _Step | None:
    """What does the whole step: the native op, else the Triton kernel for reproducible runs, else None."""
    if not trained or not isinstance(low_pass, GaussianFilter | None) or not _known(optimizer):
        return None
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(p.parameter) not in held for p in trained):
        return None
    device = trained[0].parameter.device
    tensors = [value.gradients if isinstance(value, ExampleSum) else value for value in sums]
    if any(
        tensor.device != device or not tensor.is_contiguous() for tensor in [*(p.parameter for p in trained), *tensors]
    ):
        return None
    if isinstance(mechanism.source, RandomSource) and all(
        can_update(p.parameter, _strength(low_pass, p)) and _states_match(optimizer.state.get(p.parameter), p)
        for p in trained
    ):
        return _native_step
    if (
        isinstance(mechanism.source, SeededSource)
        and kernels_take(trained[0].parameter)
        and all(p.parameter.dtype == torch.float32 for p in trained)
    ):
        return _triton_step
    return None


def _known(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the wrapped optimizer's step is a formula of ours, the same in all its groups, and nobody hooks it."""
    if type(optimizer) not in _NAMES or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return False
    if torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks:
        return False
    # torch's schedulers wrap the step too, to know that it was called, which we tell them.
    own_step = vars(optimizer).get("step")
    if own_step is not None and not hasattr(own_step, "_wrapped_by_lr_sched"):
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
    return all(
        value is None or (value.dtype == p.parameter.dtype and value.device == p.parameter.device) for value in values
    )


class _Plan(NamedTuple):
    """An update that is about to be taken: its formula, the formula's numbers for each parameter, the states, and what
    enters each parameter's state once it is taken."""

    name: Literal["sgd", "adam", "adamw"]
    rows: list[list[float]]
    first: list[Tensor]
    second: list[Tensor]
    states: list[dict[str, Any]]

    def commit(self, optimizer: torch.optim.Optimizer, trained: Sequence[PrivateParameter]) -> None:
        """Enter it into the wrapped optimizer."""
        for p, state in zip(trained, self.states, strict=True):
            if state:
                optimizer.state[p.parameter].update(state)
        optimizer._opt_called = True  # type: ignore[attr-defined]  # torch's schedulers ask for it


@torch.no_grad()
def _native_step(
    optimizer: torch.optim.Optimizer,
    trained: Sequence[PrivateParameter],
    sums: _Sums,
    mechanism: Mechanism,
    low_pass: Filter | None,
    expected_batch_size: int,
) -> None:
    """θ ← optimizer(θ, low-pass((sum + σC·z) / L)) by :func:`private_update_`."""
    step, scale = mechanism.grid(sum(p.parameter.numel() for p in trained))
    assert isinstance(mechanism.source, RandomSource)
    draw = mechanism.source.next_draw() if scale else Draw(0, 0)
    plan, gradients = _plan(optimizer, trained), [torch.empty_like(p.parameter) for p in trained]
    private_update_(
        [p.parameter for p in trained],
        sums,
        plan.first,
        plan.second,
        gradients,
        plan.rows,
        optimizer="momentum" if plan.name == "sgd" and plan.first else plan.name,
        key=draw.key,
        draw=draw.number,
        scale=scale,
        step=step,
        expected_batch_size=expected_batch_size,
        filtered=[_strength(low_pass, p) > 0 for p in trained],
        filter_strength=low_pass.strength if isinstance(low_pass, GaussianFilter) else 0.0,
    )
    plan.commit(optimizer, trained)
    for p, gradient in zip(trained, gradients, strict=True):
        p.parameter.grad = gradient


@torch.no_grad()
def _triton_step(
    optimizer: torch.optim.Optimizer,
    trained: Sequence[PrivateParameter],
    sums: _Sums,
    mechanism: Mechanism,
    low_pass: Filter | None,
    expected_batch_size: int,
) -> None:
    """The same with noise of a counter-based generator on the device, not cryptographic; ``.grad`` stays empty."""
    from lora_dp.kernels.noise_update import noise_update

    plan, device = _plan(optimizer, trained), trained[0].parameter.device
    assert isinstance(mechanism.source, SeededSource)
    noise_update(
        [p.parameter for p in trained],
        [total(value).double() for value in sums],
        plan.first,
        plan.second,
        torch.tensor(plan.rows, dtype=torch.float32).to(device, non_blocking=True),
        torch.tensor(mechanism.source.next_counter()).to(device, non_blocking=True),
        std=mechanism.noise_std(sum(p.parameter.numel() for p in trained)),
        expected_batch_size=expected_batch_size,
        filter_strength=low_pass.strength if isinstance(low_pass, GaussianFilter) else 0.0,
        filtered=[_strength(low_pass, p) > 0 for p in trained],
        optimizer=plan.name,
    )
    plan.commit(optimizer, trained)


def _plan(optimizer: torch.optim.Optimizer, trained: Sequence[PrivateParameter]) -> _Plan:
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    members: _Members = [
        (group_of[id(p.parameter)], optimizer.state.get(p.parameter, {}), p.parameter) for p in trained
    ]
    return _sgd(members) if _NAMES[type(optimizer)] == "sgd" else _adam(_NAMES[type(optimizer)], members)


def _state(state: dict[str, Any], name: str, parameter: Tensor) -> Tensor:
    """The named state, zeros if it is missing."""
    value = state.get(name)
    if value is None:
        value = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    contiguous: Tensor = value.contiguous()
    return contiguous


def _sgd(members: _Members) -> _Plan:
    rows = [
        sgd_row(
            group["lr"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            first_step=state.get("momentum_buffer") is None,
        )
        for group, state, _ in members
    ]
    if not members[0][0]["momentum"]:
        return _Plan("sgd", rows, [], [], [{} for _ in members])
    buffers = [_state(state, "momentum_buffer", parameter) for _, state, parameter in members]
    return _Plan("sgd", rows, buffers, [], [{"momentum_buffer": buffer} for buffer in buffers])


def _adam(name: Literal["sgd", "adam", "adamw"], members: _Members) -> _Plan:
    # As torch: a half-precision default dtype must not hold the count, which would stick at 256.
    kind = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    steps = [state["step"] + 1 if "step" in state else torch.tensor(1.0, dtype=kind) for _, state, _ in members]
    rows = [
        adam_row(
            group["lr"], weight_decay=group["weight_decay"], betas=group["betas"], eps=group["eps"], step=int(step)
        )
        for (group, _, _), step in zip(members, steps, strict=True)
    ]
    first = [_state(state, "exp_avg", parameter) for _, state, parameter in members]
    second = [_state(state, "exp_avg_sq", parameter) for _, state, parameter in members]
    return _Plan(
        name,
        rows,
        first,
        second,
        [
            {"step": step, "exp_avg": mean, "exp_avg_sq": square}
            for step, mean, square in zip(steps, first, second, strict=True)
        ],
    )
