"""Set-up of a model: every trainable parameter covered by a private layer, nothing that mixes examples."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lora_dp.engine.recorder import Recorder
from lora_dp.isolation.model_state.buffers import KeptBuffers
from lora_dp.isolation.model_state.parameters import Versions, held_parameters
from lora_dp.isolation.model_state.parts import ModelParts
from lora_dp.nn.lora_linear import DPLoRALinear
from lora_dp.nn.private_module import PrivateModule


@dataclass(frozen=True)
class PrivateParameter:
    """A parameter that the private step trains.

    Attributes:
        name: qualified name in the model.
        parameter: the parameter itself.
        layer: number of its module among the private ones, for per-layer clipping.
        factor: "A" or "B" for LoRA's factors, None for what every phase trains.
    """

    name: str
    parameter: nn.Parameter
    layer: int
    factor: str | None


def unfrozen(planned: Iterable[PrivateParameter]) -> list[PrivateParameter]:
    """Those of ``planned`` that still require grad. One that was frozen meanwhile is neither noised nor moved, and its
    gradient is left out of a sum that was clipped with or without it: what is released stays a part of the whole.

    Raises:
        RuntimeError: all of them were frozen.
    """
    planned = list(planned)
    trained = [entry for entry in planned if entry.parameter.requires_grad]
    if planned and not trained:
        raise RuntimeError(
            f"'{planned[0].name}' and whatever else this step would train was frozen after make_private: unfreeze some "
            "of it, choose other factors by optimizer.set_phases, or end training here."
        )
    return trained


def cover(model: nn.Module) -> list[PrivateParameter]:
    """All trainable parameters of ``model``, each in one private layer.

    Raises:
        ValueError: a BatchNorm that is not frozen, in eval mode and with running statistics; nothing trainable; a
            trainable parameter outside every private layer, or one that another module shares; each by name.
    """
    for name, module in model.named_modules():
        if _is_batch_norm(module) and not _stands_still(module):
            raise ValueError(
                f"'{name}' is a {type(module).__name__}, which mixes the examples of a batch: replace it by GroupNorm "
                "or LayerNorm, which do not, or freeze it (requires_grad_(False), and .eval() on it after "
                "model.train())."
            )
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
            raise ValueError(
                f"'{name}' ({type(module).__name__}) keeps running statistics of the examples, without noise: set "
                "track_running_stats=False."
            )
        if getattr(module, "max_norm", None) is not None and isinstance(module, nn.Embedding | nn.EmbeddingBag):
            raise ValueError(
                f"'{name}' has max_norm, by which every forward shortens the rows that its examples look up, without "
                "noise: set max_norm=None (and, once, shorten the rows of its weight by torch.renorm)."
            )
    covered: dict[int, PrivateParameter] = {}
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, PrivateModule)]
    for number, (prefix, module) in enumerate(layers):
        for name, parameter in module.private_parameters().items():
            full = f"{prefix}.{name}" if prefix else name
            if isinstance(module, DPLoRALinear) and name in module.frozen_names:
                what = "the frozen weight under" if name == "weight" else "a frozen factor of"
                raise ValueError(
                    f"'{full}' is {what} an adapter but requires grad: freeze it, or use DPLinear to train the layer "
                    "whole."
                )
            factor = {"lora_A": "A", "lora_B": "B"}.get(name.partition(".")[0])
            covered.setdefault(id(parameter), PrivateParameter(full, parameter, number, factor))
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            if parameter.requires_grad and id(parameter) not in covered:
                raise ValueError(
                    f"'{full}' is trainable but no private layer covers it: freeze it (requires_grad_(False)), or name "
                    "its module in LoRAConfig.trainable_modules (Linear, Conv1D, LayerNorm and Embedding can be "
                    "covered), or begin with adapters (inject_lora, or PEFT's get_peft_model and peft_config)."
                )
            if parameter.requires_grad and covered[id(parameter)].name != full:
                raise ValueError(
                    f"'{full}' and '{covered[id(parameter)].name}' are one parameter in two modules: untie them or "
                    "freeze it."
                )
    if not covered:
        raise ValueError(
            "The model has nothing to train: inject adapters with inject_lora first, or load PEFT's with "
            "is_trainable=True."
        )
    return list(covered.values())


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _stands_still(norm: Any) -> bool:
    """Whether this BatchNorm normalises every example by the same public numbers, and nothing of it is trained."""
    frozen = not any(parameter.requires_grad for parameter in norm.parameters())
    return frozen and not norm.training and norm.running_mean is not None and norm.running_var is not None


def frozen_norms(model: nn.Module) -> dict[nn.Module, str]:
    """The BatchNorms of ``model`` that :func:`cover` takes, with their names."""
    return {module: name for name, module in model.named_modules() if _is_batch_norm(module) and _stands_still(module)}


def check_frozen_norms(recorder: Recorder) -> None:
    """Refuse a pass in which a BatchNorm that was frozen at set-up is so no more, as after ``model.train()``.

    Raises:
        RuntimeError: naming it.
    """
    for name, norm in recorder.frozen_norms:
        if not _stands_still(norm):
            raise RuntimeError(
                f"'{name}' is a {type(norm).__name__} that was frozen and in eval mode when the model was made "
                "private, and is not now, so it mixes the examples of a batch: call .eval() on every BatchNorm after "
                "model.train(), or replace them by torchvision.ops.FrozenBatchNorm2d."
            )


def check_statistics(recorder: Recorder, model: nn.Module) -> None:
    """Refuse a pass without gradients, as of ``torch.optim.swa_utils.update_bn``, in which a BatchNorm of a private
    model, or of a copy of one, would take up the statistics of the examples.

    Raises:
        RuntimeError: naming it.
    """
    check_frozen_norms(recorder)
    if recorder.owner is not None:
        return
    for name, norm in model.named_modules():
        if _is_batch_norm(norm) and not _stands_still(norm):
            raise RuntimeError(
                f"'{name}' of this copy of a private model is a {type(norm).__name__} in train mode: it would take up "
                "the statistics of its examples, which nothing clips or noises. Call .eval() on every BatchNorm "
                "(instead of update_bn)."
            )


def check_optimizer(optimizer: torch.optim.Optimizer, covered: Mapping[int, PrivateParameter]) -> None:
    """Refuse an optimizer that would move a parameter that the private step does not cover.

    Raises:
        ValueError: it holds an uncovered trainable parameter.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and id(parameter) not in covered:
                raise ValueError(
                    f"The optimizer holds a trainable parameter of shape {tuple(parameter.shape)} that was not in a "
                    "private layer of the model when it was made private: freeze it, or call make_private again."
                )


def check_holds(optimizer: torch.optim.Optimizer, trained: Iterable[PrivateParameter]) -> None:
    """Refuse an optimizer that lacks a parameter on whose gradient noise, and so privacy, would be spent in vain.

    Raises:
        ValueError: naming the parameter.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for entry in trained:
        if id(entry.parameter) not in held:
            raise ValueError(
                f"The optimizer does not hold '{entry.name}', which would be trained: make it after inject_lora, over "
                "all parameters that require grad, or freeze that one."
            )


def check_dtype(entry: PrivateParameter, before: torch.dtype, *, kept: bool) -> None:
    """Refuse a parameter whose dtype was changed under the optimizer.

    Args:
        entry: the parameter.
        before: its dtype when the model was made private.
        kept: whether the optimizer keeps a state for it; without one a wider dtype does no harm.

    Raises:
        RuntimeError: it was changed.
    """
    now = entry.parameter.dtype
    if now != before and (kept or torch.promote_types(now, before) != now):
        raise RuntimeError(
            f"'{entry.name}' was {before} when the model was made private and is {now} now: convert the model before "
            "inject_lora, which keeps what is trained in float32, or compute under torch.autocast."
        )


def check_frozen(recorder: Recorder) -> None:
    """Refuse a pass in which a parameter that was frozen at set-up takes a gradient.

    Raises:
        RuntimeError: naming it.
    """
    for name, held, key in recorder.frozen:
        parameter = held.get(key)  # perhaps another than then, as after load_state_dict(assign=True)
        if parameter is not None and parameter.requires_grad:
            raise RuntimeError(
                f"'{name}' was frozen when the model was made private, and requires a gradient now, which nothing "
                "clips or noises, whatever optimizer takes it: freeze it again, or call make_private again."
            )


def check_strangers(recorder: Recorder) -> None:
    """Refuse a pass in which the model's outputs lead to a tensor that takes a gradient and is no private parameter.

    Raises:
        RuntimeError: naming its shape.
    """
    # A compiled model is given its parameters.
    for leaf in recorder.losses.strangers(recorder.leaves() | recorder.parameters.keys()):
        raise RuntimeError(
            f"A tensor {tuple(leaf.shape)} inside the model requires a gradient, which nothing clips or noises, "
            "whatever optimizer takes it: make_private has not seen it (a plain tensor, a module in a list of Python's "
            "or one put in later). Register it, as a private layer, before make_private, or freeze it."
        )


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """N: the first dimension of the model's first tensor argument (the inputs before other keywords).

    Raises:
        ValueError: no tensor among the arguments.
    """
    first = [kwargs[key] for key in ("input_ids", "pixel_values", "inputs_embeds") if kwargs.get(key) is not None]
    for leaf in pytree.tree_leaves((args, first, kwargs)):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.shape[0]
    raise ValueError("The model was called without a tensor: its first tensor argument tells the number of examples.")


def attach(model: nn.Module, recorder: Recorder) -> None:
    """Give every private layer of ``model`` the recorder, and the recorder the parameters with their names and the
    BatchNorms, which are frozen."""
    recorder.parameters.update((id(parameter), (name, parameter)) for name, parameter in model.named_parameters())
    recorder.versions, recorder.parts, recorder.buffers = Versions(model), ModelParts(model), KeptBuffers(model)
    # Since an earlier make_private the model may have become another.
    recorder.tested.clear()
    recorder.tested_sizes.clear()
    recorder.most_tried = None
    recorder.frozen = [
        (name, held, key)
        for name, held, key in held_parameters(model)
        if (parameter := held[key]) is not None and not parameter.requires_grad
    ]
    recorder.frozen_norms = [(name, module) for module, name in frozen_norms(model).items()]
    for module in model.modules():
        if isinstance(module, PrivateModule):
            module.recorder = recorder
