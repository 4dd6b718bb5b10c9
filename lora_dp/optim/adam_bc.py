"""Adam for noisy gradients: the noise's known variance is taken out of the second moment."""

import math
from typing import Any

import torch
from torch import Tensor

from lora_dp.argument_checks import check_number
from lora_dp.optim.known_noise import NoiseStd, ToldOptimizer

# Without noise the floor is what Adam calls eps.
_LEAST_FLOOR = 1e-8
_MOMENTS = ("exp_avg", "exp_avg_sq", "noise_sq")


class AdamBC(ToldOptimizer):
    """DP-AdamBC (arXiv 2312.14334): θ ← θ − lr · m̂ / √max(v̂ − s², γ²), with s the deviation of the gradient's noise.

    m̂ and v̂ are Adam's (arXiv 1412.6980). Noise leaves E[m̂] as it is, and adds s² to E[v̂]. Where s is far above a
    gradient, Adam divides by s alike everywhere: it is SGD with momentum. Without s², the step is again that of Adam on
    the gradients themselves, up to sampling error. It only uses released numbers, and so costs no privacy.

    *s.* Under :class:`lora_dp.PrivateOptimizer` it is told before each step (:mod:`lora_dp.optim.known_noise`): σC/L
    and the share that a low-pass filter leaves, or what the regulator makes of it. In a plain loop give ``noise_std``.
    Where s changes from step to step, what is taken out is the average of s² with the weights that v̂ has.

    *γ.* v̂ is an average of squares with weights wᵢ, so under noise alone its deviation is s²√(2Σwᵢ²) with
    Σwᵢ² = (1 − β₂)(1 + β₂ᵗ) / (1 + β₂)(1 − β₂ᵗ). A smaller v̂ − s² cannot be told from nothing, and is what γ² is by
    default: γ falls from 1.2 s at the first step to 0.18 s after some 1/(1 − β₂) steps. m̂ has noise of deviation
    s√((1 − β₁)/(1 + β₁)) = 0.23 s then, so that noise alone moves a number by about ``lr`` a step, as far as a sure
    gradient does. A larger γ damps those whose gradient drowns in noise: at γ = s and above the step is nearly
    Adam's. ``floor`` is in units of the gradient, which are those of C: multiply it where C is multiplied.

    *lr.* That of Adam without privacy is the place to begin. A rate tuned for Adam on noisy gradients is too large by
    the ratio of s to a typical gradient.

    Args:
        params: parameters, or groups of them, as for any optimizer of torch.
        lr: learning rate; a step moves a number by about so much.
        betas: (β₁, β₂), the decay of the two moments.
        noise_std: s, by group; None where a private optimizer tells it. 0 makes it Adam.
        floor: γ above 0, by group; None for the one above, at least 1e-8.
        weight_decay: decoupled, as AdamW's (arXiv 1711.05101): θ ← (1 − lr · weight_decay) θ first.

    Parameters without a gradient are skipped. State: two moments a parameter, in float32, or float64 if it is that.

    Raises:
        ValueError: a negative, infinite or NaN number; a beta outside [0, 1); a floor that is 0.
        TypeError: no number.

    >>> weight = torch.nn.Parameter(torch.zeros(3))
    >>> optimizer = AdamBC([weight], lr=0.1, noise_std=0.5)
    >>> weight.grad = torch.tensor([4.0, -4.0, 0.1])  # 0.1 drowns in noise of deviation 0.5
    >>> optimizer.step()
    >>> weight.detach()
    tensor([-0.1008,  0.1008, -0.0168])
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        noise_std: float | None = None,
        floor: float | None = None,
        weight_decay: float = 0.0,
    ):
        defaults = {"lr": lr, "betas": betas, "noise_std": noise_std, "floor": floor, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            ValueError, TypeError: as for the class.
        """
        if isinstance(param_group, dict):
            _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but moments of parameters in half precision stay in float32, as they were saved."""
        super().load_state_dict(state_dict)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            saved, kind = state_dict["state"].get(key, {}), _wide(parameter)
            for name in _MOMENTS:
                if isinstance(value := saved.get(name), Tensor):
                    self.state[parameter][name] = value.to(parameter.device, kind, copy=True)

    def update(self, parameter: Tensor, group: dict[str, Any], std: NoiseStd) -> None:
        """One parameter's step."""
        state, kind = self.state[parameter], _wide(parameter)
        if isinstance(std, Tensor):
            std = std.to(parameter.device, kind)
        if not state:
            state.update(step=0, noise_sq=0.0)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=kind, memory_format=torch.preserve_format)
        assert parameter.grad is not None
        gradient, (beta1, beta2) = parameter.grad.to(kind), group["betas"]
        state["step"] += 1
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        state["noise_sq"] = beta2 * state["noise_sq"] + (1 - beta2) * std * std
        first, second = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        noise = state["noise_sq"] / second
        # Σwᵢ² of the weights of v̂, which sum to 1.
        spread = (1 - beta2) * (2 - second) / ((1 + beta2) * second)
        floor = math.sqrt(2 * spread) * noise if group["floor"] is None else group["floor"] ** 2
        squared = (square / second).sub_(noise).clamp_(min=floor).clamp_(min=_LEAST_FLOOR**2)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(mean / squared.sqrt_(), alpha=group["lr"] / first)


def _wide(parameter: Tensor) -> torch.dtype:
    """The dtype of the moments: bfloat16 would lose a thousandth of a square, which is what a step adds."""
    return torch.promote_types(parameter.dtype, torch.float32)


def _check(group: dict[str, Any]) -> None:
    numbers = {name: group[name] for name in ("lr", "weight_decay")}
    numbers |= {name: group[name] for name in ("noise_std", "floor") if group[name] is not None}
    for name, value in numbers.items():
        check_number(name, value)
        if not (0 <= value < math.inf and (value or name != "floor")):
            least = "above 0" if name == "floor" else "at least 0"
            raise ValueError(f"{name} must be a finite number {least}, got {value}.")
    if not (isinstance(group["betas"], tuple | list) and len(group["betas"]) == 2):
        raise TypeError(f"betas must be a pair of numbers, got {group['betas']!r}.")
    for beta in group["betas"]:
        check_number("Each of betas", beta)
        if not 0 <= beta < 1:
            raise ValueError(f"Each of betas must be in [0, 1), got {beta}.")
