"""Tasks, updates and introductions as Flower's records, and back.

What comes back was written by a peer. It is taken apart here, and here alone: numbers are checked, sizes bounded, and
texts made harmless before anyone else sees them.
"""

from dataclasses import dataclass

import lora_dp.fed.flower.without_telemetry  # noqa: F401  (before Flower)

# isort: split
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from lora_dp.fed.flower.tensors import MOST_BYTES, pack_tensors, unpack_tensors
from lora_dp.fed.rounds.messages import Task, Update
from lora_dp.fed.rounds.privacy_plan import check_size
from lora_dp.fed.safe_text import harmless

__all__ = [
    "ANSWER",
    "CONFIG",
    "TASK",
    "TENSORS",
    "Introduction",
    "pack_config",
    "pack_failure",
    "pack_introduction",
    "pack_task",
    "pack_tensors",
    "pack_update",
    "unpack_answer",
    "unpack_config",
    "unpack_introduction",
    "unpack_task",
    "unpack_tensors",
]

CONFIG, TASK, TENSORS, ANSWER = "config", "task", "tensors", "answer"
MOST_CONFIG = 2**16
_MOST_NUMBER = 2**31 - 1


@dataclass(frozen=True)
class Introduction:
    """What a node says of itself.

    Attributes:
        client: its number, from 0.
        partitions: number of nodes that its federation was set up for; None where nobody said.
        examples: in its own folder; None where it takes its part of the shared data set, or the number is not public.

    Raises:
        TypeError: what should be a whole number is none.
        ValueError: one that no client has.
    """

    client: int
    partitions: int | None = None
    examples: int | None = None

    def __post_init__(self) -> None:
        _integer(self.client, "a client's number")
        if self.partitions is not None and _integer(self.partitions, "a number of nodes") < 1:
            raise ValueError(f"client {self.client} claims to be one of {self.partitions} nodes")
        if self.examples is not None:
            check_size(self.client, self.examples)


def pack_config(text: str) -> ConfigRecord:
    """A run's configuration, as in config.yaml."""
    return ConfigRecord({"yaml": text})


def unpack_config(content: RecordDict) -> str:
    """The configuration in a message's content.

    Raises:
        KeyError, TypeError, ValueError: there is none, or one that is larger than any.
    """
    text = content.config_records[CONFIG]["yaml"]
    if not isinstance(text, str):
        raise TypeError("the configuration is no text")
    if len(text) > MOST_CONFIG:
        raise ValueError(f"the configuration has {len(text)} characters, more than {MOST_CONFIG}")
    return text


def pack_task(config: ConfigRecord, task: Task, tensors: ArrayRecord) -> RecordDict:
    """A message's content; the records are shared by all messages that they are given to."""
    numbers = ConfigRecord({"round": task.round, "turn": task.turn, "rank": task.rank, "sums": task.sums})
    return RecordDict({CONFIG: config, TASK: numbers, TENSORS: tensors})


def unpack_task(content: RecordDict) -> Task:
    """The task in a message's content, tensors on the CPU.

    Raises:
        Exception: of any kind, where it is no task.
    """
    numbers = content.config_records[TASK]
    index, turn, rank = (_integer(numbers[name], f"a task's {name}") for name in ("round", "turn", "rank"))
    sums = numbers.get("sums", False)
    if not isinstance(sums, bool):
        raise TypeError("what a task asks for sums by is no truth value")
    return Task(index, turn, rank, unpack_tensors(content.array_records[TENSORS]), sums)


def pack_update(update: Update) -> RecordDict:
    """A reply's content."""
    return RecordDict({TENSORS: pack_tensors(update.tensors), ANSWER: ConfigRecord()})


def pack_failure(reason: str) -> RecordDict:
    """A reply's content where there is no update; the words must tell nothing of the data."""
    return RecordDict({ANSWER: ConfigRecord({"failure": harmless(reason)})})


def unpack_answer(content: RecordDict, most_bytes: int = MOST_BYTES) -> Update | str:
    """The update in a reply's content, or the reason why there is none.

    Args:
        content: of the reply.
        most_bytes: of an update's tensors.

    Raises:
        Exception: of any kind, where it is no answer.
    """
    answer = content.config_records[ANSWER]
    if "failure" in answer:
        return harmless(answer["failure"])
    return Update(unpack_tensors(content.array_records[TENSORS], most_bytes))


def pack_introduction(node: Introduction) -> RecordDict:
    """A node's answer to the question who it is."""
    said = {"client": node.client, "partitions": node.partitions, "examples": node.examples}
    return RecordDict({ANSWER: ConfigRecord({name: value for name, value in said.items() if value is not None})})


def unpack_introduction(content: RecordDict) -> Introduction | str:
    """What a node said of itself, or why it cannot take part.

    Raises:
        KeyError, TypeError, ValueError: it is no introduction.
    """
    answer = content.config_records[ANSWER]
    if "failure" in answer:
        return harmless(answer["failure"])
    return Introduction(answer["client"], answer.get("partitions"), answer.get("examples"))  # type: ignore[arg-type]


def _integer(value: object, what: str) -> int:
    """The value, if it is a whole number from 0 that a client, a round or a rank may have."""
    if type(value) is not int:
        raise TypeError(f"{what} is a {type(value).__name__}, not a whole number")
    if not 0 <= value <= _MOST_NUMBER:
        raise ValueError(f"{what} is out of range")
    return value
