"""Noise, low-pass filter and optimizer step of all parameters in one launch, where Triton kernels run.

For reproducible runs with torch's SGD, Adam or AdamW on float32 parameters: the noise comes from a counter-based
generator on the device. The wrapped optimizer's state and hyper-parameters are read and kept up as it would itself, so
schedulers, state dicts and a later step by torch go on from there; what it does not leave behind is the noised gradient
in ``.grad``.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lora_dp.coverage import PrivateParameter
from lora_dp.filtering import Filter, GaussianFilter
from lora_dp.mechanism import Mechanism
from lora_dp.ops.registry import kernels_take
from lora_dp.randomness import SeededSource

_NAMES: dict[type, Literal["sgd", "adam", "adamw"]] = {
    torch.optim.SGD: "sgd", torch.optim.Adam: "adam", torch.optim.AdamW: "adamw"}
_States = list[tuple[dict[str, Any], dict[str, Any], Tensor]]
# Options that change the formula, or hand it hooks or tensors that the kernel does not know.
_UNKNOWN = ("maximize", "amsgrad", "differentiable", "capturable", "fused")


def can_fuse(
    optimizer: torch.optim.Optimizer, trained: Sequence[PrivateParameter], sums: Sequence[Tensor],
    mechanism: Mechanism, low_pass: Filter | None,
) -> bool:
    """Whether :func:`fused_step` does what the wrapped optimizer's own step would do."""
    if type(optimizer) not in _NAMES or not isinstance(mechanism.source, SeededSource) or not trained:
        return False
    if not isinstance(low_pass, GaussianFilter | None):
        return False
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return False
    groups = optimizer.param_groups
    if any(group.get(option) for group in groups for option in _UNKNOWN):
        return False
    if type(optimizer) is torch.optim.Adam and any(group.get("decoupled_weight_decay") for group in groups):
        return False
    if any(isinstance(value, Tensor) for group in groups for value in (group["lr"], *group.get("betas", ()))):
        return False
    if len({bool(group.get("momentum")) for group in groups}) > 1:
        return False
    device = trained[0].parameter.device
    return all(
        kernels_take(p.parameter) and all(
            tensor.dtype == torch.float32 and tensor.device == device and tensor.is_contiguous()
            for tensor in (p.parameter, total))
        for p, total in zip(trained, sums, strict=True))


@torch.no_grad()
def fused_step(
    optimizer: torch.optim.Optimizer, trained: Sequence[PrivateParameter], sums: Sequence[Tensor],
    mechanism: Mechanism, low_pass: Filter | None, expected_batch_size: int,
) -> None:
    """θ ← optimizer(θ, low-pass((sum + σC·z) / L)) for every trained parameter; see :func:`can_fuse`.

    Args:
        optimizer: torch's SGD, Adam or AdamW.
        trained: the parameters of this phase.
        sums: their clipped sums, float32.
        mechanism: with a seeded source.
        low_pass: Gaussian, on LoRA's factors alone, or None.
        expected_batch_size: L.
    """
    from lora_dp.kernels.noise_update import noise_update

    parameters: list[Tensor] = [p.parameter.detach() for p in trained]
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    states: _States = [(group_of[id(p.parameter)], optimizer.state[p.parameter], p.parameter) for p in trained]
    name = _NAMES[type(optimizer)]
    rows, first, second = (_sgd if name == "sgd" else _adam)(states)
    assert isinstance(mechanism.source, SeededSource)
    device = parameters[0].device
    noise_update(
        parameters, list(sums), first, second, torch.tensor(rows, dtype=torch.float32).to(device, non_blocking=True),
        torch.tensor(mechanism.source.next_counter()).to(device, non_blocking=True),
        std=mechanism.noise_std(sum(total.numel() for total in sums)), expected_batch_size=expected_batch_size,
        filter_strength=low_pass.strength if isinstance(low_pass, GaussianFilter) else 0.0,
        filtered=[low_pass is not None and p.factor is not None for p in trained],
        optimizer=name)


def _state(state: dict[str, Any], name: str, parameter: Tensor) -> Tensor:
    """The named state, made if it is missing."""
    value = state.get(name)
    if value is None:
        value = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    state[name] = value.contiguous()
    return state[name]


def _sgd(states: _States) -> tuple[list[list[float]], list[Tensor], list[Tensor]]:
    from lora_dp.kernels.noise_update import sgd_row

    rows = [
        sgd_row(group["lr"], weight_decay=group["weight_decay"], momentum=group["momentum"],
                dampening=group["dampening"], nesterov=group["nesterov"],
                first_step=state.get("momentum_buffer") is None)
        for group, state, _ in states]
    if not states[0][0]["momentum"]:
        return rows, [], []
    return rows, [_state(state, "momentum_buffer", parameter) for _, state, parameter in states], []


def _adam(states: _States) -> tuple[list[list[float]], list[Tensor], list[Tensor]]:
    from lora_dp.kernels.noise_update import adam_row

    rows = []
    for group, state, _ in states:
        state["step"] = state.get("step", torch.tensor(0.0)) + 1
        rows.append(adam_row(
            group["lr"], weight_decay=group["weight_decay"], betas=group["betas"], eps=group["eps"],
            step=int(state["step"])))
    return (rows, [_state(state, "exp_avg", parameter) for _, state, parameter in states],
            [_state(state, "exp_avg_sq", parameter) for _, state, parameter in states])
