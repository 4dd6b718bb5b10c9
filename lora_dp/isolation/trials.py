"""Trial passes of a model, watched: what its layers and its loss do, with everything left as it was."""

import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lora_dp.isolation.batches.calls import tensors_in
from lora_dp.isolation.batches.tables import Table, put_back
from lora_dp.isolation.deterministic import Still
from lora_dp.isolation.model_state.parameters import Unwritten, originals, replaced
from lora_dp.isolation.seeding import other_states, seeded, torch_states
from lora_dp.isolation.trial_values import Gradients, rows_of, sum_of
from lora_dp.nn.private_module import PrivateModule, pass_recorder_of

# Tensors too, which a forward may have cached in the dtype of a trial.
_SETTING = (str, bool, int, float, NoneType, Tensor)
LossFunction = Callable[[Any, Any], Tensor]


class Trace:
    """One forward pass: outputs of every module in order, and the means to get their gradients.

    Attributes:
        outputs: name, module and output of each, in order.
        inputs: name of each trained private layer and what it was given, in order: with weights of zero its output
            tells nothing, and its gradient all the same.
        result: what the model returned.
        losses: the loss or losses: the criterion's, or the scalars that the model returned.
        buffers: what the pass has made of copies of the model's.
        random: whether the pass drew random numbers; ``elsewhere``, whether NumPy or Python drew them.
    """

    def __init__(self, model: nn.Module, still: bool, seed: int):
        self.model, self.still, self.seed = model, still, seed
        self.outputs: list[tuple[str, nn.Module, Tensor]] = []
        self.inputs: list[tuple[str, Tensor]] = []
        self.gradients: dict[str, list[Tensor]] = {}
        self.result: Any = None
        self.losses: list[Tensor] = []
        self.buffers: dict[str, Tensor] = {}
        self.random = self.elsewhere = False
        self._tensor_hooks: list[Any] = []

    def close(self) -> None:
        """Take the hooks off the tensors: through the autograd graph they would keep the trace and the model alive."""
        for handle in self._tensor_hooks:
            handle.remove()

    def private(self) -> list[tuple[str, Tensor]]:
        return [(name, output) for name, module, output in self.outputs if is_trained(module)]

    def by_example(self, n: int) -> list[Tensor]:
        """Those whose first dimension is N, or all rows of one example after another, as of flattened tokens."""
        return [leaf for leaf in values_in(self.result) if of_examples(leaf, n)]

    def beside(self, other: "Trace", n: int, m: int) -> list[tuple[Tensor, Tensor]]:
        """Pairs of them: of this pass over ``n`` examples, and of another one over ``m``."""
        return [
            (left, right)
            for left, right in zip(values_in(self.result), values_in(other.result), strict=False)
            if of_examples(left, n) and of_examples(right, m)
        ]

    @contextmanager
    def hooks(self, keep_outputs: bool) -> Iterator[None]:
        """Watch modules; also during backward, in which reentrant checkpoints run their modules once more."""

        def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def watch(module: nn.Module, given: Any, output: Any) -> None:
                if keep_outputs and is_trained(module) and given and isinstance(given[0], Tensor):
                    self.inputs.append((name, given[0]))
                if not isinstance(output, Tensor):
                    return
                if keep_outputs:
                    self.outputs.append((name, module, output))
                if output.requires_grad and is_trained(module):
                    self._tensor_hooks.append(
                        output.register_hook(lambda gradient: self.gradients.setdefault(name, []).append(gradient))
                    )

            return watch

        handles = [module.register_forward_hook(hook(name)) for name, module in _watched(self.model)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def backward(self, scalar: Tensor) -> dict[str, list[Tensor]]:
        """Gradients of ``scalar`` at the outputs of the trained layers, by name; the parameters' are left alone."""
        before = [(p, p.grad) for p in originals(self.model.parameters())]
        for parameter, _ in before:
            parameter.grad = None
        self.gradients = {}
        try:
            # Not torch.autograd.grad: reentrant checkpoints allow only backward().
            with self.hooks(keep_outputs=False), undisturbed(self.model, self.seed), _chance(self.still):
                scalar.backward(retain_graph=True)
        finally:
            for parameter, gradient in before:
                parameter.grad = gradient
        return self.gradients


def _watched(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules in a model by name; and the model itself where it is a private layer, by the name of its class."""
    inner = [(name, module) for name, module in model.named_modules() if name]
    return [*inner, (type(model).__name__, model)] if is_trained(model) else inner


def of_examples(output: Tensor, n: int) -> bool:
    """Whether its rows can be those of ``n`` examples, of each as many."""
    return output.shape[0] % n == 0


def is_trained(module: nn.Module) -> bool:
    return isinstance(module, PrivateModule) and bool(module.private_parameters())


def values_in(result: Any) -> list[Tensor]:
    """The outputs of a model that may hold values of examples."""
    return [leaf for leaf in tensors_in(result) if leaf.dim() > 0]


def scalars(result: Any) -> list[Tensor]:
    """The single numbers with a gradient among a model's outputs: its own losses."""
    return [leaf for leaf in tensors_in(result) if leaf.dim() == 0 and leaf.requires_grad]


class LayerRows(NamedTuple):
    """What a trained layer did in a pass: how many ``rows`` it gave, and what it was ``given`` of each example kept."""

    rows: int
    given: list[Tensor]


class Quiet(NamedTuple):
    """A pass in which nothing was drawn.

    Attributes:
        outputs: what the model returned that may hold values of examples, of each example kept.
        layers: the name of each trained layer that was called, and what it did, in order.
        gradients: by the place of the loss, its gradients at the outputs of the trained layers, of all examples.
        values: by the place of the loss, those of all examples, where it is one for each.
    """

    outputs: list[list[Tensor]]
    layers: list[tuple[str, LayerRows]]
    gradients: Mapping[int, Gradients]
    values: Mapping[int, Tensor]


class Trials:
    """Runs a model on one batch after another; within its context the model records nothing.

    Args:
        model: in the mode in which it is to be trained.
        criterion: loss(model output, targets), a scalar or one number for each example; None for the model's own.
        positional: names of keyword arguments that the model is given by position, in order.
    """

    def __init__(self, model: nn.Module, criterion: LossFunction | None, positional: tuple[str, ...] = ()):
        self._model, self._criterion, self._positional = model, criterion, positional
        self._open = ExitStack()
        self.draw_anew()

    def __enter__(self) -> "Trials":
        # Suspended to the end: checkpointed modules run forward again inside the gradients.
        self._open.enter_context(_suspended(self._model))
        self._open.enter_context(torch.enable_grad())
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def draw_anew(self) -> None:
        """From here on passes draw other numbers, of a seed that nobody knows; until then all draw the same."""
        self.seed = secrets.randbits(63)

    def run(self, call: tuple[Any, dict[str, Any], Any], *, still: bool = False) -> Trace:
        """One forward pass on (args, kwargs, targets); ``still`` for one in which nothing is drawn at random."""
        args, kwargs, targets = _copied(call)
        trace = Trace(self._model, still, self.seed)
        self._open.callback(trace.close)
        with trace.hooks(keep_outputs=True), undisturbed(self._model, self.seed), _chance(still):
            before, others = torch_states(), other_states()
            with Unwritten(self._model):
                trace.result = self._called(args, kwargs)
            trace.losses = self._losses(trace.result, targets)
            trace.random, trace.elsewhere = before != torch_states(), others != other_states()
            trace.buffers = dict(self._model.named_buffers())
        return trace

    def outputs(
        self, call: tuple[Any, dict[str, Any], Any], n: int, kept: list[int], losses: Collection[int] = ()
    ) -> "Quiet":
        """A pass over ``n`` examples without anything drawn at random: what some of them were given and got, and the
        gradients of the ``losses`` at these places, of all."""
        args, kwargs, targets = _copied(call)
        trace = Trace(self._model, True, self.seed)
        layers: list[tuple[str, LayerRows]] = []

        def by_example(tensor: Tensor) -> list[Tensor]:
            return list(rows_of(tensor.detach(), n)[kept]) if of_examples(tensor, n) else []

        def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def looks(module: nn.Module, given: Any, output: Any) -> None:
                rows = output.shape[0] if isinstance(output, Tensor) and output.dim() else 0
                layers.append((name, LayerRows(rows, by_example(given[0]) if given else [])))

            return looks

        handles = [
            module.register_forward_hook(look(name))
            for name, module in self._model.named_modules()
            if is_trained(module)
        ]
        try:
            with undisturbed(self._model, self.seed), Still():
                with trace.hooks(keep_outputs=False) if losses else nullcontext(), Unwritten(self._model):
                    result = self._called(args, kwargs)
                found = self._losses(result, targets) if losses else []
        finally:
            for handle in handles:
                handle.remove()
        made = {place: loss for place, loss in enumerate(found) if place in losses}
        gradients = {place: trace.backward(sum_of(loss)) for place, loss in made.items() if loss.requires_grad}
        trace.close()
        values = {place: loss.detach() for place, loss in made.items() if loss.dim() and of_examples(loss, n)}
        return Quiet([by_example(tensor) for tensor in values_in(result)], layers, gradients, values)

    def _losses(self, result: Any, targets: Any) -> list[Tensor]:
        return scalars(result) if self._criterion is None else [self._criterion(result, targets)]

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As by the user, hooks on the whole model too, but never compiled."""
        by_place = [kwargs[name] for name in self._positional]
        by_name = {name: value for name, value in kwargs.items() if name not in self._positional}
        return self._model._call_impl(*args, *by_place, **by_name)


def _copied(call: Any) -> Any:
    """The same call as a model takes it, with tensors of its own: it may scale its input in place."""
    copies: dict[int, Tensor] = {}

    def own(leaf: Any) -> Any:
        if isinstance(leaf, Table):
            return Table(own(leaf.tensor), leaf.free)
        if not isinstance(leaf, Tensor):
            return leaf
        return copies.setdefault(id(leaf), leaf.detach().clone().requires_grad_(leaf.requires_grad))

    return put_back(pytree.tree_map(own, call))


def _chance(still: bool) -> AbstractContextManager[Any]:
    return Still() if still else nullcontext()


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Whichever modules are switched between training and evaluation inside, are switched back afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _suspended(model: nn.Module) -> Iterator[None]:
    recorder = pass_recorder_of(model)
    if recorder is None:
        yield
        return
    before, recorder.suspended, recorder.tried = recorder.suspended, True, True
    try:
        yield
    finally:
        recorder.suspended, recorder.tried = before, False


@contextmanager
def undisturbed(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers follow the seed, and they, buffers and settings are afterwards as they were before."""
    # Which table is in a buffer, say, as rotary embeddings of texts that are longer than ever.
    settings = [
        (
            vars(module),
            set(vars(module)),
            {n: value for n, value in vars(module).items() if isinstance(value, _SETTING)},
        )
        for module in model.modules()
    ]
    try:
        # Copies stand in for the buffers: written back in place, they would spoil what a graph has saved of them.
        with replaced((module._buffers for module in model.modules()), Tensor.clone), seeded(seed):
            yield
    finally:
        for attributes, names, before in settings:
            attributes.update(before)
            for name in [name for name, value in attributes.items() if name not in names and isinstance(value, Tensor)]:
                del attributes[name]
