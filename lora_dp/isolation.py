"""Does each example keep to itself? A proof by trial that rows are attributed to the right example.

A per-example gradient is only that if no other example can change it. Three trials on one batch, for an example i:

1. every other example is replaced (by copies of i): no row attributed to i, and no output for i, may change;
2. a loss made of i's outputs alone must have no gradient in a row attributed to another example;
3. with a loss at hand: under the replacement of 1, i's rows of its gradient must not change; and no buffer may take
   another value, for that would be a statistic of the batch, kept without noise.

They catch batch normalisation, window-major orders, tables shared across the batch and losses that mix examples.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lora_dp.coverage import recorder_of
from lora_dp.layers import PrivateModule

_SEED = 20260219
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF_TOLERANCE = 2e-2
# The label that cross entropy and Transformers pass over.
_IGNORED = -100

LossFunction = Callable[[Any, Any], Tensor]


class IsolationError(RuntimeError):
    """An example's rows, outputs or gradients depend on other examples of its batch."""


class _Trace:
    """One forward pass: outputs of every leaf and private module in order, and the means to get their gradients."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.outputs: list[tuple[str, nn.Module, Tensor]] = []
        self.gradients: dict[str, list[Tensor]] = {}
        self.result: Any = None
        self.loss: Tensor | None = None
        self.buffers: dict[str, Tensor] = {}
        self._tensor_hooks: list[Any] = []

    def close(self) -> None:
        """Take the hooks off the tensors: through the autograd graph they would keep the trace and the model alive."""
        for handle in self._tensor_hooks:
            handle.remove()
        self._tensor_hooks.clear()

    def private(self) -> list[tuple[str, Tensor]]:
        return [(name, output) for name, module, output in self.outputs if _is_trained(module)]

    @contextmanager
    def hooks(self, keep_outputs: bool) -> Iterator[None]:
        """Watch modules; also during backward, in which reentrant checkpoints run their modules once more."""

        def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def watch(module: nn.Module, _: Any, output: Any) -> None:
                if not isinstance(output, Tensor):
                    return
                if keep_outputs:
                    self.outputs.append((name, module, output))
                if output.requires_grad and _is_trained(module):
                    self._tensor_hooks.append(output.register_hook(
                        lambda gradient: self.gradients.setdefault(name, []).append(gradient)))
            return watch

        handles = [module.register_forward_hook(hook(name)) for name, module in self.model.named_modules()
                   if name and (isinstance(module, PrivateModule) or not any(True for _ in module.children()))]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def backward(self, scalar: Tensor) -> dict[str, list[Tensor]]:
        """Gradients of ``scalar`` at the outputs of the trained layers, by name; the parameters' are left alone."""
        before = [(p, p.grad) for p in self.model.parameters()]
        for parameter, _ in before:
            parameter.grad = None
        self.gradients = {}
        try:
            # Not torch.autograd.grad: reentrant checkpoints allow only backward().
            with self.hooks(keep_outputs=False), _undisturbed(self.model):
                scalar.backward(retain_graph=True)
        finally:
            for parameter, gradient in before:
                parameter.grad = gradient
        return self.gradients


def _is_trained(module: nn.Module) -> bool:
    return isinstance(module, PrivateModule) and bool(module.private_parameters())


def has_uneven_tokens(kwargs: dict[str, Any]) -> bool:
    """Whether the examples' labels (N, T) count different numbers of tokens: then a mean over the batch's tokens weighs
    an example by the lengths of the others, which a batch of equal lengths does not show."""
    labels = kwargs.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point() or not len(labels):
        return False
    counts = (labels != _IGNORED).sum(1)
    return bool((counts != counts[0]).any())


def check_isolation(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], n: int, *,
    targets: Any = None, criterion: LossFunction | None = None,
) -> None:
    """Run the trials on the batch of ``n`` examples with which ``model(*args, **kwargs)`` would be called.

    The first and the last example are tried. Random numbers, buffers, gradients and modes are left as they were.
    A batch of fewer than two examples passes: it has nobody to mix with.

    Args:
        model: in the mode in which it is to be trained.
        args, kwargs: of the forward; tensors whose first dimension is ``n`` hold one entry per example.
        n: number of examples.
        targets: given to ``criterion``, also by example.
        criterion: loss(model output, targets); None uses the model's own loss if its output has one.

    Raises:
        IsolationError: naming the module, or the loss, in which examples meet.
    """
    if n < 2:
        return
    # Suspended to the end: checkpointed modules run forward again inside the gradients below.
    with _suspended(model), ExitStack() as traces:
        base = traces.enter_context(closing(_run(model, args, kwargs, targets, criterion)))
        for name, output in base.private():
            if output.dim() < 2 or output.shape[0] % n:
                raise IsolationError(
                    f"'{name}' works on {tuple(output.shape)} in a batch of {n} examples: its rows cannot be told "
                    "apart by example; freeze it or leave it out of the private layers.")
        for i in (0, n - 1):
            _check_gradient_rows(base, i, n)
            other_args, other_kwargs, other_targets = pytree.tree_map(partial(_only, i=i, n=n), (args, kwargs, targets))
            replaced = _run(model, other_args, other_kwargs, other_targets, criterion)
            _check_replaced(base, traces.enter_context(closing(replaced)), i, n)


def _only(leaf: Any, i: int, n: int) -> Any:
    if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == n:
        return leaf[i : i + 1].expand_as(leaf).clone()
    return leaf


def _run(model: nn.Module, args: Any, kwargs: Any, targets: Any, criterion: LossFunction | None) -> _Trace:
    trace = _Trace(model)
    with trace.hooks(keep_outputs=True), _undisturbed(model), torch.enable_grad():
        # forward itself, not __call__: the hooks on the whole model are the engine's.
        trace.result = model.forward(*args, **kwargs)
        trace.loss = _loss(trace.result, targets, criterion)
        trace.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return trace


@contextmanager
def _suspended(model: nn.Module) -> Iterator[None]:
    recorder = recorder_of(model)
    if recorder is None:
        yield
        return
    before, recorder.suspended = recorder.suspended, True
    try:
        yield
    finally:
        recorder.suspended = before


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    # Copies stand in for the buffers: written back in place, they would spoil what a graph has saved of them.
    owned = [(module._buffers, name, buffer) for module in model.modules()
             for name, buffer in module._buffers.items() if buffer is not None]
    copies: dict[int, Tensor] = {}
    for owner, name, buffer in owned:
        owner[name] = copies.setdefault(id(buffer), buffer.clone())
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(_SEED)
            yield
    finally:
        for owner, name, buffer in owned:
            owner[name] = buffer


def _loss(result: Any, targets: Any, criterion: LossFunction | None) -> Tensor | None:
    if criterion is not None:
        return criterion(result, targets)
    scalars = [leaf for leaf in pytree.tree_leaves(_plain(result))
               if isinstance(leaf, Tensor) and leaf.dim() == 0 and leaf.requires_grad]
    return scalars[0] if scalars else None


def _plain(result: Any) -> Any:
    return dict(result) if isinstance(result, dict) else result


def _outputs(trace: _Trace, n: int) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(_plain(trace.result))
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 0 and leaf.shape[0] == n]


def _rows(tensor: Tensor, n: int) -> Tensor:
    """Example-major grouping, as the layers do it: (N, everything else)."""
    return tensor.detach().reshape(n, -1)


def _differ(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape:
        return True
    if not left.numel():
        return False
    if not left.is_floating_point():
        return not torch.equal(left, right)
    left, right = left.nan_to_num(), right.nan_to_num()
    tolerance = _TOLERANCE.get(left.dtype, _HALF_TOLERANCE)
    return bool((left - right).abs().max() > tolerance * left.abs().max().clamp(min=torch.finfo(left.dtype).tiny))


def _check_gradient_rows(base: _Trace, i: int, n: int) -> None:
    outputs = [output for output in _outputs(base, n) if output.requires_grad]
    if not outputs:
        return
    generator = torch.Generator().manual_seed(_SEED)
    alone = torch.stack([
        (output[i] * torch.randn(output[i].shape, generator=generator).to(output)).sum() for output in outputs]).sum()
    for name, gradients in base.backward(alone).items():
        for gradient in gradients:
            rows = _rows(gradient, n).nan_to_num()
            others = torch.cat([rows[:i], rows[i + 1 :]]).abs().max()
            if others > _TOLERANCE.get(rows.dtype, _HALF_TOLERANCE) * rows.abs().max():
                raise IsolationError(
                    f"The output of example {i} depends on rows of '{name}' that are attributed to other examples: the "
                    "module's first dimension is not ordered by example (all rows of one example together), or a "
                    "module after it mixes the batch; move the batch dimension first, or leave the module out.")


def _check_replaced(base: _Trace, replaced: _Trace, i: int, n: int) -> None:
    mixing = next((name for (name, _, left), (_, _, right) in zip(base.outputs, replaced.outputs, strict=False)
                   if _row_changed(left, right, i, n)), "the model itself")
    for (name, left), (_, right) in zip(base.private(), replaced.private(), strict=False):
        if _row_changed(left, right, i, n):
            raise IsolationError(
                f"Rows of '{name}' attributed to example {i} change with the other examples of the batch; the first "
                f"module where this is seen is '{mixing}'. Replace what mixes examples (BatchNorm by GroupNorm, say), "
                "or order rows by example.")
    for left, right in zip(_outputs(base, n), _outputs(replaced, n), strict=False):
        if _row_changed(left, right, i, n):
            raise IsolationError(
                f"The output for example {i} changes with the other examples of the batch, seen first in '{mixing}': "
                "replace what mixes examples (BatchNorm by GroupNorm, say).")
    for name, buffer in base.buffers.items():
        if name in replaced.buffers and _differ(buffer, replaced.buffers[name]):
            raise IsolationError(
                f"The buffer '{name}' takes up statistics of the examples, which nothing clips or noises: switch them "
                "off (track_running_stats=False, say) or keep that module in eval().")
    if base.loss is None or replaced.loss is None:
        return
    left_gradients, right_gradients = base.backward(base.loss), replaced.backward(replaced.loss)
    for name, gradients in left_gradients.items():
        for left, right in zip(gradients, right_gradients.get(name, []), strict=False):
            if _differ(_rows(left, n)[i], _rows(right, n)[i]):
                raise IsolationError(
                    f"The loss mixes examples: the gradient of example {i} at '{name}' changes with the others. Use a "
                    "loss that is a mean or sum of terms of one example each (for token losses: average over each "
                    "example's tokens first, then over examples).")


def _row_changed(left: Tensor, right: Tensor, i: int, n: int) -> bool:
    if left.dim() == 0 or left.shape[0] % n or not left.is_floating_point() or left.shape != right.shape:
        return False
    return _differ(_rows(left, n)[i], _rows(right, n)[i])
