"""Parameters, which a forward may not write to.

What it wrote into one of the examples would be kept, and never clipped: an embedding with ``max_norm`` does so, by
which rows were looked up, and a running centre kept as a frozen parameter.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_dp.errors import IsolationError


def written(name: str) -> IsolationError:
    """The refusal."""
    return IsolationError(
        f"The model's forward writes to its parameter '{name}', by the examples that it is given: nothing clips that "
        "or adds noise. Leave it out (an embedding's max_norm, say), or compute it from public data beforehand."
    )


def stand_in(parameter: nn.Parameter) -> nn.Parameter:
    """A float32 copy, for a while in the place of a parameter of half precision, which it knows.

    >>> import torch
    >>> half = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    >>> [one is half for one in originals([stand_in(half), half])]
    [False, True, True]
    """
    copy = nn.Parameter(parameter.detach().to(torch.float32), requires_grad=parameter.requires_grad)
    copy.stands_for = parameter  # type: ignore[attr-defined]
    return copy


def originals(parameters: Iterable[nn.Parameter]) -> Iterator[nn.Parameter]:
    """These, and behind each stand-in the parameter in whose place it is."""
    for parameter in parameters:
        yield parameter
        if (original := getattr(parameter, "stands_for", None)) is not None:
            yield original


@contextmanager
def replaced(holders: Iterable[dict[str, Any]], copy: Callable[[Any], Any]) -> Iterator[None]:
    """For a while each tensor in these dictionaries, as of a module's parameters, is its copy, the same for the same
    one. Afterwards they are as they were, those too that were None or not there.

    >>> layer = nn.Linear(2, 1)
    >>> with replaced([layer._parameters], stand_in):
    ...     next(originals([layer.weight])) is layer.weight
    True
    """
    held, copies = [(tensors, dict(tensors)) for tensors in holders], {}
    try:
        for tensors, before in held:
            for name, tensor in before.items():
                if tensor is not None:
                    if id(tensor) not in copies:
                        copies[id(tensor)] = copy(tensor)
                    tensors[name] = copies[id(tensor)]
        yield
    finally:
        for tensors, before in held:
            tensors.clear()
            tensors.update(before)


class Unwritten(TorchDispatchMode):
    """Inside this context no operation writes to a parameter of the model; refused before it does."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._names = {
            each.untyped_storage().data_ptr(): name
            for name, parameter in model.named_parameters()
            for each in originals([parameter])
            if each.numel()
        }

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for place, argument in enumerate(func._schema.arguments):
                if argument.alias_info is None or not argument.alias_info.is_write:
                    continue
                given = args[place] if place < len(args) else kwargs.get(argument.name)
                for tensor in given if isinstance(given, list | tuple) else [given]:
                    if isinstance(tensor, Tensor) and (name := self._names.get(_storage(tensor))) is not None:
                        raise written(name)
        return func(*args, **kwargs)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


Held = tuple[str, dict[str, nn.Parameter | None], str]


def held_parameters(model: nn.Module) -> Iterator[Held]:
    """The name of each parameter, and where it is found, also once another has taken its place."""
    for path, module in model.named_modules():
        for name in module._parameters:
            yield f"{path}.{name}" if path else name, module._parameters, name


class Versions:
    """How often the parameters of a model were written to, and which they are."""

    def __init__(self, model: nn.Module | None = None):
        self._parameters = [] if model is None else list(held_parameters(model))
        self._buffers = (
            []
            if model is None
            else [
                (name, buffer)
                for name, buffer in model.named_buffers()
                if buffer.is_floating_point() and not buffer.is_inference()
            ]
        )  # none can write to those
        self._before: tuple[list[Any], list[int], list[int]] = [], [], []
        self._written: list[int] = []

    def _now(self) -> tuple[list[Any], list[int], list[int]]:
        found = [held.get(name) for _, held, name in self._parameters]
        held = [parameter for parameter in found if parameter is not None]
        return found, [parameter._version for parameter in held], [parameter.data_ptr() for parameter in held]

    def begin(self) -> None:
        """A forward begins."""
        self._before = self._now()

    def check(self) -> None:
        """It has ended.

        Raises:
            IsolationError: it has written to a parameter, or put another in its place.
        """
        (before, *written_before), (found, *written_now) = self._before, self._now()
        names = [
            name for (name, *_), one, other in zip(self._parameters, before, found, strict=False) if one is not other
        ]
        if not names and written_before != written_now:
            there = [name for (name, *_), held in zip(self._parameters, found, strict=True) if held is not None]
            names = [
                name
                for name, *marks in zip(there, *written_before, *written_now, strict=True)
                if marks[:2] != marks[2:]
            ]
        if names:
            raise written(names[0])
        self._written = [buffer._version for _, buffer in self._buffers]

    def check_backward(self) -> None:
        """A backward through that forward has ended.

        Raises:
            IsolationError: it has written to a parameter or a buffer, by a hook.
        """
        names = [
            name for (name, buffer), mark in zip(self._buffers, self._written, strict=True) if buffer._version != mark
        ]
        if names:
            raise IsolationError(
                f"The backward writes to the buffer '{names[0]}', by the examples that it is given: nothing clips that "
                "or adds noise. Leave out the hook that does so."
            )
        self.check()
