"""DiSK: gradients filtered over the steps, and taken a little ahead so that the filter does not lag behind."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_dp.argument_checks import check_kind, check_number
from lora_dp.nn.private_module import pass_recorder_of
from lora_dp.optim.known_noise import NoiseStd, noise_aware

_KEY = "disk"


class DiSK(torch.optim.Optimizer):
    """Wraps an optimizer, to be wrapped by ``make_private``: DiSK of arXiv 2410.03883 at one gradient a step.

    The paper's step, with d = xₜ − xₜ₋₁ the last move, takes of each example

        c ∇fᵢ(xₜ + γd) + (1 − c) ∇fᵢ(xₜ)   with c = (1 − κ) / κγ,

    clips and noises it, and filters what is released: g̃ ← (1 − κ) g̃ + κ g. The two gradients carry g̃ from xₜ₋₁ to
    xₜ: (1 − κ)(g̃ + H d) + κ ∇f(xₜ), where H d ≈ (∇f(xₜ + γd) − ∇f(xₜ)) / γ. At γ = (1 − κ)/κ, c is 1: one gradient,
    at xₜ + γd. That is the γ here, for two reasons. A step costs one backward. And one example's part is one gradient,
    clipped to C, at a point made of released weights: an ordinary private step, with the noise as accounted. At another
    γ two clipped gradients would reach C times the sum of c and 1 − c, both taken positive.

    Noise of deviation s leaves s√(κ/(2 − κ)) in g̃, and the filter's lag is taken out as far as the loss is quadratic
    along d. g̃ begins as the first gradient.

    *Where the model is.* It holds the iterate xₜ, except from a training forward of ``model`` to the step that follows:
    then it holds xₜ + γd. Evaluating and saving after a step see the iterate, with nothing to restore. A forward in
    eval mode and :meth:`state_dict` of the model put it back, whatever came before; so does :meth:`to_iterate`.

    A parameter that a step has no gradient for, as in phases "BA", has not moved: its part of d is zero, and its g̃
    waits.

    Args:
        optimizer: of torch, over parameters of ``model``; or :class:`lora_dp.AdamBC`, which is told the noise in g̃.
        model: the whole that is trained: what ``make_private`` is given.
        kappa: κ in (0, 1]; 1 changes nothing. The smaller, the less noise, and the farther ahead.

    State: g̃ and γd a trained number, and the iterate while the model is ahead.

    Raises:
        ValueError: κ is out of range, or the optimizer is private already.
        TypeError: something of another type, or LBFGS, which takes several gradients a step.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 1.0)
    >>> optimizer = DiSK(torch.optim.SGD(model.parameters(), lr=0.1), model, kappa=0.5)
    >>> for _ in range(2):
    ...     model(torch.ones(1, 1)).square().sum().backward()  # f(w) = w²
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> round(model.weight.item(), 4)  # 1 − 0.1·2 = 0.8; then g̃ = (2 + 2·(0.8 − 0.2))/2 = 1.6
    0.64
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, *, kappa: float = 0.7):
        check_kind("optimizer", optimizer, torch.optim.Optimizer, "make one of torch.optim over the trained parameters")
        check_kind("model", model, nn.Module, "give the whole that is trained")
        check_number("kappa", kappa)
        if not 0 < kappa <= 1:
            raise ValueError(f"kappa must be in (0, 1], got {kappa}: 0.7 is usual.")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError("DiSK takes an optimizer of one gradient a step, which LBFGS is not.")
        if hasattr(optimizer, "original_optimizer") or isinstance(optimizer, DiSK):
            raise ValueError(
                f"DiSK wraps a plain optimizer, not a {type(optimizer).__name__}: give the plain one here, and DiSK to "
                "make_private."
            )
        self.inner, self.kappa = optimizer, kappa
        self._memory: dict[Tensor, dict[str, Any]] = {}
        self._iterate: dict[Tensor, Tensor] = {}
        self._told: dict[Tensor, NoiseStd] = {}
        for hook in list(model._forward_pre_hooks.values()):
            if isinstance(hook, _MoveBeforeForward) and (earlier := hook.of(model)) is not None:
                earlier._retire()
        # First of all: the engine counts what a forward writes to parameters from its own hook on.
        self._hooks = [
            model.register_forward_pre_hook(_MoveBeforeForward(self, model), prepend=True),
            model.register_state_dict_pre_hook(_RestoreBeforeSaving(self, model)),
        ]

    # What schedulers and the engine see of an optimizer is the wrapped one's.
    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.inner.defaults

    def __repr__(self) -> str:
        return f"DiSK(kappa={self.kappa:g}, {self.inner!r})"

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError("DiSK belongs to one model, and cannot be copied or pickled: use state_dict().")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        self.inner.add_param_group(param_group)

    def register_step_pre_hook(self, hook: Any) -> Any:
        """A hook on the wrapped optimizer's step, when ``.grad`` holds g̃."""
        return self.inner.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        """A hook after the wrapped optimizer's step, when the model holds the new iterate."""
        return self.inner.register_step_post_hook(hook)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        self.inner.zero_grad(set_to_none)

    @property
    def set_noise_std(self) -> Callable[[Mapping[Tensor, NoiseStd]], None] | None:
        """Takes the noise of each gradient; None where the wrapped optimizer asks for none."""
        return None if noise_aware(self.inner) is None else self._set_noise_std

    def _set_noise_std(self, stds: Mapping[Tensor, NoiseStd]) -> None:
        if not stds and (aware := noise_aware(self.inner)) is not None:
            aware.set_noise_std({})  # may refuse
        self._told = dict(stds)

    @torch.no_grad()
    def to_iterate(self) -> None:
        """Put the iterate into the model, where a training forward was not followed by its step."""
        for parameter, value in self._iterate.items():
            parameter.copy_(value)
        self._iterate = {}

    def _retire(self) -> None:
        """Another was made for the model, which two of them would move twice as far."""
        self.to_iterate()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def _look_ahead(self) -> None:
        if self._iterate:
            return  # a further micro-batch of the same step
        for parameter, memory in self._memory.items():
            if (offset := memory["offset"]) is not None:
                self._iterate[parameter] = parameter.detach().clone()
                parameter.add_(offset)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the wrapped optimizer, from the iterate, on g̃ instead of ``.grad``.

        Args:
            closure: runs forward and backward once, as torch's; its value is returned.

        Raises:
            RuntimeError: another DiSK was made for the model since.
        """
        if not self._hooks:
            raise RuntimeError("Another DiSK was made for this model, which it moves alone: go on with that one.")
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        self.to_iterate()
        due = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        with torch.no_grad():
            for parameter in due:
                self._filter(parameter)
            if (aware := noise_aware(self.inner)) is not None and self._told:
                aware.set_noise_std({p: self._memory[p]["noise_sq"] ** 0.5 for p in due})
            before = [parameter.detach().clone() for parameter in due]
        self.inner.step()
        with torch.no_grad():
            for memory in self._memory.values():
                memory["offset"] = None
            for parameter, old in zip(due, before, strict=True):
                self._memory[parameter]["offset"] = (parameter - old).mul_((1 - self.kappa) / self.kappa)
        return value

    def _filter(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.to(torch.promote_types(parameter.dtype, torch.float32))
        std = self._told.get(parameter, 0.0)
        memory = self._memory.get(parameter)
        if memory is None:
            self._memory[parameter] = {"filtered": gradient.clone(), "noise_sq": std * std, "offset": None}
        else:
            memory["filtered"].lerp_(gradient, self.kappa)
            memory["noise_sq"] = (1 - self.kappa) ** 2 * memory["noise_sq"] + self.kappa**2 * std * std
        parameter.grad = self._memory[parameter]["filtered"].to(parameter.dtype, copy=True)

    def state_dict(self) -> dict[str, Any]:
        """That of the wrapped optimizer, with g̃ and γd of each parameter in the order of the groups."""
        state = self.inner.state_dict()
        parameters = [p for group in self.param_groups for p in group["params"]]
        kept = {i: dict(self._memory[p]) for i, p in enumerate(parameters) if p in self._memory}
        return {**state, _KEY: {"kappa": self.kappa, "memory": kept}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`, or the state of the wrapped optimizer alone, with which the filter begins anew.

        Raises:
            ValueError: it was saved with another κ; as torch's.
        """
        saved = state_dict.get(_KEY, {"kappa": self.kappa, "memory": {}})
        if saved["kappa"] != self.kappa:
            raise ValueError(
                f"The state is of DiSK(kappa={saved['kappa']}), and this one has {self.kappa}: make it alike."
            )
        self.inner.load_state_dict({name: value for name, value in state_dict.items() if name != _KEY})
        self._iterate, self._memory = {}, {}
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, memory in saved["memory"].items():
            device = parameters[index].device
            self._memory[parameters[index]] = {
                name: value.to(device, copy=True) if isinstance(value, Tensor) else value
                for name, value in memory.items()
            }


class _Hook:
    """A hook on the model of one DiSK; on a copy of the model it does nothing, for that has another's parameters."""

    def __init__(self, optimizer: DiSK | None = None, model: nn.Module | None = None):
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self._model = None if model is None else weakref.ref(model)

    def __reduce__(self) -> Any:
        return type(self), ()

    def of(self, module: nn.Module) -> DiSK | None:
        here = self._optimizer is not None and self._model is not None and self._model() is module
        return self._optimizer() if here and self._optimizer is not None else None


class _MoveBeforeForward(_Hook):
    @torch.compiler.disable(reason="weights are moved outside of the compiled graph")
    def __call__(self, module: nn.Module, args: Any) -> None:
        recorder = pass_recorder_of(module)
        if (optimizer := self.of(module)) is None or (recorder is not None and recorder.tried):
            return  # a trial looks at the model where it is
        if not module.training:
            optimizer.to_iterate()
        elif torch.is_grad_enabled():
            optimizer._look_ahead()


class _RestoreBeforeSaving(_Hook):
    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if (optimizer := self.of(module)) is not None:
            optimizer.to_iterate()
