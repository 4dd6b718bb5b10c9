"""Parameters to which a forward may not write: what it put there of the examples would be kept, and never clipped.

An embedding with ``max_norm`` does, by which rows were looked up; so does a running centre kept as a frozen parameter.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_dp.loss_graph import IsolationError


def written(name: str) -> IsolationError:
    """The refusal."""
    return IsolationError(
        f"The model's forward writes to its parameter '{name}', by the examples that it is given: nothing clips that "
        "or adds noise. Leave it out (an embedding's max_norm, say), or compute it from public data beforehand.")


class Unwritten(TorchDispatchMode):
    """Inside this context no operation writes to a parameter of the model; refused before it does."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._names = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters() if p.numel()}

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


class Versions:
    """How often parameters were written to."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]):
        self._parameters = list(parameters)
        self._before: list[int] = []

    def begin(self) -> None:
        """A forward begins."""
        self._before = [parameter._version for _, parameter in self._parameters]

    def check(self) -> None:
        """It has ended.

        Raises:
            IsolationError: it has written to a parameter.
        """
        for (name, parameter), before in zip(self._parameters, self._before, strict=False):
            if parameter._version != before:
                raise written(name)
