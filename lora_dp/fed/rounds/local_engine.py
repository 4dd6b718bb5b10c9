"""The engine in one process: clients take their turns on one model."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from lora_dp.errors import IsolationError
from lora_dp.fed.data.examples import Examples
from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.messages import Reply, Task


class ClientTimeout(RuntimeError):
    """A client took longer than it may."""


class LocalEngine:
    """Trains clients one after the other. Idle clients cost nothing but the indices of their examples.

    Args:
        trainer: does a client's turn.
        parts: each client's examples.
        timeout: seconds that a turn of a client may take, looked at after each of its steps; None for no limit.
    """

    def __init__(self, trainer: Trainer, parts: Sequence[Examples], timeout: float | None = None) -> None:
        self.trainer, self.parts, self.timeout = trainer, parts, timeout

    def train(self, tasks: Iterable[tuple[int, Task]], on_step: Callable[[], None]) -> Iterator[Reply]:
        for client, task in tasks:
            try:
                update = self.trainer.train(client, self.parts[client], task, self._watched(on_step))
            except IsolationError:
                raise  # no other client will do better with this model; where examples are protected, none says so
            except Exception as error:
                failure = str(error) if isinstance(error, ClientTimeout) else f"raised {type(error).__name__}"
                yield Reply(client, None, failure, str(error))
            else:
                yield Reply(client, update)

    def _watched(self, on_step: Callable[[], None]) -> Callable[[], None]:
        if self.timeout is None:
            return on_step
        limit, end = self.timeout, time.monotonic() + self.timeout

        def step() -> None:
            if time.monotonic() > end:
                raise ClientTimeout(f"gave no answer within {limit:g} s")
            on_step()

        return step
