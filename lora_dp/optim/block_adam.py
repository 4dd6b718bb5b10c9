"""AdamW with one second moment for a whole parameter, the noise's known variance taken out of it."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_dp.argument_checks import check_number
from lora_dp.optim.known_noise import NoiseStd

# Without noise the floor is what Adam calls eps.
_LEAST_FLOOR = 1e-8


class BlockAdamW(torch.optim.Optimizer):
    """The client's steps of DP-FedAdamW (arXiv 2602.19945): θ ← (1 − lr·λ)·θ − lr · m̂ / √max(v̂, γ²) + d.

    m̂ is AdamW's first moment (arXiv 1711.05101). v is one number a parameter, with the known variance s² of the noise
    in its gradient g taken out: v ← β₂·v + (1 − β₂)·(mean(g²) − s²), v̂ = v / (1 − β₂ᵗ). It is linear in what is
    averaged, so that the mean of several clients' v is that of all their gradients. All of it is computed from noisy
    gradients, so it costs no privacy.

    *s.* Under :class:`lora_dp.PrivateOptimizer` it is told before each step (:mod:`lora_dp.optim.known_noise`). In a
    plain loop give ``noise_std``; 0 is AdamW with block means.

    *γ.* Under noise alone v̂ of n numbers has the deviation s²·√(2Σwᵢ²/n), with wᵢ the weights that v̂ has. A smaller v̂
    cannot be told from nothing, and is what γ² is; γ is at least 1e-8.

    *d.* A drift that :meth:`go_on` may set: a public direction in which each step goes besides.

    Args:
        params: parameters, or groups of them, as for any optimizer of torch.
        lr: learning rate; a step moves a number by about so much.
        betas: (β₁, β₂), the decay of the two moments.
        noise_std: s, by group; None where a private optimizer tells it.
        weight_decay: λ.

    Parameters without a gradient are skipped.

    Raises:
        ValueError: a negative, infinite or NaN number, or a beta outside [0, 1).
        TypeError: no number.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = BlockAdamW([weight], lr=0.1, noise_std=0.0)
    >>> weight.grad = torch.tensor([3.0, 4.0])  # of mean square 3.54²
    >>> optimizer.step()
    >>> weight.detach()
    tensor([-0.0849, -0.1131])
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        noise_std: float | None = None,
        weight_decay: float = 0.01,
    ):
        self._told: dict[Tensor, NoiseStd] = {}
        numbers = {"lr": lr, "weight_decay": weight_decay} | ({} if noise_std is None else {"noise_std": noise_std})
        for name, value in [*numbers.items(), *(("Each of betas", beta) for beta in betas)]:
            check_number(name, value)
            if not 0 <= value < (1 if name not in numbers else math.inf):
                raise ValueError(
                    f"{name} must be {'in [0, 1)' if name not in numbers else 'finite and at least 0'}, got {value}."
                )
        super().__init__(params, {"lr": lr, "betas": betas, "noise_std": noise_std, "weight_decay": weight_decay})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._told = {}  # what was told is of the steps of one optimizer, and no copy's

    def set_noise_std(self, stds: Mapping[Tensor, NoiseStd]) -> None:
        """Told by the private optimizer: s of the next step, by parameter.

        Raises:
            ValueError: a group has a ``noise_std`` of its own.

        >>> weight = torch.nn.Parameter(torch.zeros(3))
        >>> BlockAdamW([weight], noise_std=0.5).set_noise_std({weight: 0.4})
        Traceback (most recent call last):
        ValueError: BlockAdamW is told its noise by the private optimizer: leave out noise_std, here 0.5.
        """
        for group in self.param_groups:
            if group["noise_std"] is not None:
                raise ValueError(
                    f"{type(self).__name__} is told its noise by the private optimizer: leave out noise_std, here "
                    f"{group['noise_std']}."
                )
        self._told = dict(stds)

    def go_on(self, parameter: Tensor, second: Tensor, steps: int, drift: Tensor | None = None) -> None:
        """Goes on from a second moment of earlier steps; the first moment starts anew.

        Args:
            parameter: one of this optimizer's.
            second: v, of one number; it is kept up in place.
            steps: so many there were.
            drift: d, of the parameter's shape; public, or released before.

        >>> second = torch.tensor([1.0])
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = BlockAdamW([weight], noise_std=0.0)
        >>> optimizer.go_on(weight, second, steps=10)
        >>> weight.grad = torch.ones(2)
        >>> optimizer.step()
        >>> second
        tensor([1.])
        """
        self.state[parameter] = {"step": 0, "earlier": steps, "exp_avg": _zeros(parameter), "second": second}
        if drift is not None:
            self.state[parameter]["drift"] = drift

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on what ``.grad`` holds.

        Args:
            closure: runs forward and backward once, as torch's; its value is returned.

        Raises:
            RuntimeError: the noise of a parameter is not known, or its gradient is sparse.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        due = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        variances = [self._variance(p, group) for p, group in due]  # refuses before anything has moved
        for (parameter, group), variance in zip(due, variances, strict=True):
            self._update(parameter, group, variance)
        return value

    def _variance(self, parameter: Tensor, group: dict[str, Any]) -> float:
        """The mean of s² over a parameter's numbers."""
        assert parameter.grad is not None
        if parameter.grad.is_sparse:
            raise RuntimeError(f"{type(self).__name__} takes no sparse gradients: set sparse=False.")
        std = self._told.get(parameter, group["noise_std"])
        if std is None:
            raise RuntimeError(
                f"{type(self).__name__} does not know the noise in the gradient of a parameter of shape "
                f"{tuple(parameter.shape)}: give noise_std (0 for none), or let make_private wrap this optimizer."
            )
        return float(std.double().square().expand_as(parameter).mean()) if isinstance(std, Tensor) else std**2

    def _update(self, parameter: Tensor, group: dict[str, Any], variance: float) -> None:
        if not self.state[parameter]:
            self.go_on(parameter, _zeros(parameter).new_zeros(1), 0)
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        assert parameter.grad is not None
        gradient = parameter.grad.to(state["exp_avg"].dtype)
        state["step"] += 1
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
        second = state["second"].mul_(beta2).add_((1 - beta2) * (gradient.square().mean() - variance))
        first, whole = 1 - beta1 ** state["step"], 1 - beta2 ** (state["earlier"] + state["step"])
        # Σwᵢ² of the weights of v̂, which sum to 1.
        spread = (1 - beta2) * (2 - whole) / ((1 + beta2) * whole)
        floor = max(math.sqrt(2 * spread / parameter.numel()) * variance, _LEAST_FLOOR**2)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(mean / (second / whole).clamp(min=floor).sqrt(), alpha=group["lr"] / first)
        if "drift" in state:
            parameter.add_(state["drift"])


def _zeros(parameter: Tensor) -> Tensor:
    """Moments: bfloat16 would lose a thousandth of a square, which is what a step adds."""
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros_like(parameter, dtype=wide, memory_format=torch.preserve_format)
