"""Averages of what training releases step by step: most of the noise of the last iterates goes, at no cost."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_dp.argument_checks import check_count, check_kind, check_number
from lora_dp.nn.lora_linear import DPLoRALinear


class IterateAverage:
    """Average of the iterates of a model's trained parameters; of the frozen ones there is no copy.

    Each iterate has been released, so that an average costs no privacy. Its noise is that of single iterates less what
    they do not share. Give one of ``tail_from`` and ``decay``:

    - tail: mean of all iterates from one on (Polyak and Juditsky 1992; its tail, since the first are far away);
    - exponential: a ← dₜ a + (1 − dₜ) θ with dₜ = min(decay, (1 + t)/(10 + t)) after t earlier iterates, from a = θ of
      the first (De et al. 2022, arXiv 2204.13650, with that warm-up). It looks back over about 1/(1 − decay) steps.

    LoRA's factors are averaged each for itself, and the mean of products B·A is another. Where only one factor moves
    the two agree.

    Args:
        model: whose parameters that require a gradient now are averaged.
        tail_from: number of the first update that counts, from 1.
        decay: below 1; 0.999 is usual for thousands of steps, 0.9 for a hundred.

    Attributes:
        updates: how many iterates were given, those before the tail included.

    The average is kept in float32, or float64 for parameters in it: steps in half precision would vanish.

    Raises:
        ValueError: both or neither of the two are given, one is out of range, or nothing of the model is trained.
        TypeError: something of another type.

    The examples of the methods go on from this one:

    >>> model = nn.Linear(1, 1, bias=False)
    >>> average = IterateAverage(model, tail_from=2)
    >>> for iterate in (7.0, 1.0, 3.0):  # where a training loop takes a step
    ...     _ = nn.init.constant_(model.weight, iterate)
    ...     average.update()
    >>> with average.applied():
    ...     model.weight.item()
    2.0
    >>> model.weight.item()
    3.0
    """

    def __init__(self, model: nn.Module, *, tail_from: int | None = None, decay: float | None = None):
        check_kind("model", model, nn.Module, "give the one that is trained")
        if (tail_from is None) == (decay is None):
            raise ValueError(
                "Give either tail_from, for a mean of the last iterates, or decay, for an exponential one."
            )
        if tail_from is not None:
            check_count("tail_from", tail_from)
        if decay is not None:
            check_number("decay", decay)
            if not 0 <= decay < 1:
                raise ValueError(f"decay must be in [0, 1), got {decay}: 0.999 is usual.")
        self._tail_from, self._decay, self.updates = tail_from, decay, 0
        # Where parameters are, not themselves: load_state_dict(assign=True) puts others there.
        self._places = {
            f"{prefix}.{name}" if prefix else name: (module, name)
            for prefix, module in model.named_modules()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad
        }
        if not self._places:
            raise ValueError("The model has nothing to average: make this after inject_lora, before freezing anything.")
        self._adapters = [(name, module) for name, module in model.named_modules() if isinstance(module, DPLoRALinear)]
        self._average: dict[str, Tensor] = {}
        self._in_model = False

    @torch.no_grad()
    def update(self) -> None:
        """Take up the model as it is now: after each step, an empty batch's too.

        Raises:
            RuntimeError: an adapter is merged, or the average itself is in the model.

        >>> average.update()
        >>> average.updates
        4
        """
        self._check_model()
        self.updates += 1
        earlier = self.updates - 1 if self._tail_from is None else self.updates - self._tail_from
        if earlier < 0:
            return
        share = 1 / (earlier + 1) if self._decay is None else 1 - min(self._decay, (1 + earlier) / (10 + earlier))
        for name, parameter in self._parameters().items():
            wide = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
            if earlier == 0:
                self._average[name] = wide.clone()
            else:
                self._average[name].lerp_(wide, share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model holds the average, rounded to its dtype: to evaluate, save or merge it.

        The iterates come back at the end, and what was merged within is unmerged first.

        Raises:
            RuntimeError: there is no average yet, an adapter is merged, the average is in the model already, or, at the
                end, the model was trained or loaded within.

        >>> with average.applied():
        ...     saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        >>> saved["weight"].item()
        2.0
        """
        self._check_model()
        if not self._average:
            raise RuntimeError(f"There is no average yet after {self.updates} updates: the tail begins later.")
        parameters = self._parameters()
        iterates = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._write(parameters, self._average)
        versions = {name: parameter._version for name, parameter in parameters.items()}
        self._in_model = True
        try:
            yield
        finally:
            now = self._parameters()
            changed = [
                name for name in now if now[name] is not parameters[name] or now[name]._version != versions[name]
            ]
            for _, layer in self._adapters:
                if layer.merged:
                    layer.unmerge()
            self._write(now, iterates)
            self._in_model = False
        if changed:
            raise RuntimeError(
                f"'{changed[0]}' was trained or loaded while the average was in the model, and is the last iterate "
                "again: train and load outside of applied()."
            )

    def state_dict(self) -> dict[str, Any]:
        """The average by name, and the number of updates; nothing else is to be saved.

        >>> state = average.state_dict()
        >>> state["updates"], list(state["average"])
        (3, ['weight'])
        """
        return {
            "updates": self.updates,
            "tail_from": self._tail_from,
            "decay": self._decay,
            "average": {name: tensor.clone() for name, tensor in self._average.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: it is none, or that of another kind of average or other parameters.

        >>> resumed = IterateAverage(model, tail_from=2)
        >>> resumed.load_state_dict(average.state_dict())
        >>> resumed.updates
        3
        """
        if not {"updates", "tail_from", "decay", "average"} <= set(state_dict):
            raise ValueError("This is not the state of an IterateAverage: give what its state_dict() returned.")
        if (state_dict["tail_from"], state_dict["decay"]) != (self._tail_from, self._decay):
            raise ValueError(
                f"The state is of an average with tail_from={state_dict['tail_from']} and decay={state_dict['decay']}: "
                "make this one alike."
            )
        saved, parameters = state_dict["average"], self._parameters()
        shapes = {name: tensor.shape for name, tensor in saved.items()}
        if saved and shapes != {name: parameter.shape for name, parameter in parameters.items()}:
            raise ValueError("The state is of an average over other parameters: make it of the same model.")
        self.updates = state_dict["updates"]
        self._average = {
            name: tensor.to(
                parameters[name].device, torch.promote_types(parameters[name].dtype, torch.float32), copy=True
            )
            for name, tensor in saved.items()
        }

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: getattr(module, attribute) for name, (module, attribute) in self._places.items()}

    def _check_model(self) -> None:
        if self._in_model:
            raise RuntimeError("The average is in the model: leave applied() first.")
        for name, layer in self._adapters:
            if layer.merged:
                raise RuntimeError(f"The adapter of '{name}' is merged: call unmerge_adapters first.")

    @staticmethod
    @torch.no_grad()
    def _write(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
