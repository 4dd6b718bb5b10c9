"""What all private layers have in common: they give per-example gradients while an engine records.

Without an engine each is an ordinary differentiable module.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_dp.argument_checks import check_count
from lora_dp.nn.per_example import PassRecorder, Slot


class PrivateModule(nn.Module):
    """Base of the private layers.

    Attributes:
        recorder: set by the engine; None makes the layer an ordinary one. Not part of the state dict.
    """

    recorder: PassRecorder | None

    def __init__(self) -> None:
        super().__init__()
        self.recorder = None

    def private_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of this very module that a private step can train, by name: those that require grad.

        A layer whose factors are modules of their own, as PEFT's are, names them from itself on.
        """
        return {name: p for name, p in self.named_parameters(recurse=False) if p.requires_grad}

    def plain(self) -> nn.Module:
        """The ordinary layer that computes the same, of these very parameters.

        Raises:
            NotImplementedError: there is none.
        """
        raise NotImplementedError(f"There is no ordinary layer for a {type(self).__name__}.")

    def _slots(self, *names: str) -> dict[str, Slot | None] | None:
        """The slots of the named parameters, or None when nothing is being recorded."""
        return self._slots_of({name: self._parameters.get(name) for name in names})

    def _slots_of(self, parameters: Mapping[str, nn.Parameter | None]) -> dict[str, Slot | None] | None:
        """As :meth:`_slots`, of parameters that may lie beneath this module."""
        recorder = self.recorder
        if recorder is None:
            return None
        if not recorder.recording:
            if recorder.current is not None and not recorder.suspended:
                recorder.current.reentrant = True
            if self.training and not recorder.suspended and torch.is_grad_enabled():
                raise RuntimeError(
                    f"A private {type(self).__name__} was called outside the model that was made private: call that "
                    "model's own forward (or use torch.no_grad() to evaluate)."
                )
            return None
        return {name: None if parameter is None else recorder.slot(parameter) for name, parameter in parameters.items()}


def pass_recorder_of(model: nn.Module) -> PassRecorder | None:
    """The recorder that the private layers of ``model`` have, if any."""
    return next((module.recorder for module in model.modules() if isinstance(module, PrivateModule)), None)


def adopt(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Make ``parameter`` the module's, be it None."""
    if parameter is None:
        module.register_parameter(name, None)
    else:
        setattr(module, name, parameter)


def is_transposed(linear: nn.Module) -> bool:
    """Whether ``linear`` stores its weight as (d_in, d_out), as GPT-2's ``Conv1D`` does."""
    return type(linear).__name__ == "Conv1D" and not isinstance(linear, nn.Conv1d)


def linear_features(linear: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of an ``nn.Linear`` or of GPT-2's ``Conv1D``.

    Raises:
        TypeError: it is neither.
    """
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or not (isinstance(linear, nn.Linear) or is_transposed(linear)):
        raise TypeError(f"Expected nn.Linear or transformers' Conv1D, got {type(linear).__name__}.")
    out_features, in_features = weight.shape
    return (out_features, in_features) if is_transposed(linear) else (in_features, out_features)


def replace_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Put each replacement in every place of the module whose ``id`` it stands under."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in replacements:
                setattr(parent, name, replacements[id(child)])


def plain_linear(weight: nn.Parameter, bias: nn.Parameter | None, transposed: bool, training: bool) -> nn.Module:
    """An ``nn.Linear``, or a ``Conv1D`` of Transformers' where the weight is stored as (d_in, d_out), of these very
    parameters."""
    if transposed:
        from transformers.pytorch_utils import Conv1D

        layer: nn.Module = Conv1D(weight.shape[1], weight.shape[0])
    else:
        layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    adopt(layer, "weight", weight)
    adopt(layer, "bias", bias)
    return layer.train(training)


def check_sizes(**sizes: object) -> None:
    """Refuse what is no size of a parameter, by name.

    Raises:
        ValueError, TypeError: below 0; no whole number.
    """
    for name, size in sizes.items():
        check_count(name, size, least=0)
