"""Where clients do their work: in this process, or on Flower. The same server, tasks and client code for all."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from lora_dp.fed.rounds.messages import Reply, Task


class Engine(Protocol):
    """Carries tasks to clients and brings back what came of them."""

    def train(self, tasks: Iterable[tuple[int, Task]], on_step: Callable[[], None]) -> Iterator[Reply]:
        """One reply for each (client, task), in any order, each as soon as it is there; faults are replies too.

        Args:
            tasks: may be drawn one by one; a task's tensors must not be changed.
            on_step: called after a local step, where the engine can see it.
        """
        ...
