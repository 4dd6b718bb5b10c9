"""Tasks, updates and introductions as Flower's records, and back."""

from dataclasses import dataclass

import lora_dp.fed.engines.flower_quiet  # noqa: F401  (before Flower)

# isort: split
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors.torch import load, save

from lora_dp.fed.exchange import Task, Update
from lora_dp.fed.methods import State

CONFIG, TASK, TENSORS, ANSWER = "config", "task", "tensors", "answer"
_FORMAT = "safetensors"


@dataclass(frozen=True)
class Introduction:
    """What a node says of itself.

    Attributes:
        client: its number, from 0.
        partitions: number of nodes that its federation was set up for; None where nobody said.
        examples: in its own folder; None where it takes its part of the shared data set, or the number is not public.
    """

    client: int
    partitions: int | None = None
    examples: int | None = None


def pack_config(text: str) -> ConfigRecord:
    """A run's configuration, as in config.yaml."""
    return ConfigRecord({"yaml": text})


def unpack_config(content: RecordDict) -> str:
    """The configuration in a message's content."""
    return str(content.config_records[CONFIG]["yaml"])


def pack_task(config: ConfigRecord, task: Task, tensors: ArrayRecord) -> RecordDict:
    """A message's content; the records are shared by all messages that they are given to."""
    numbers = ConfigRecord({"round": task.round, "turn": task.turn, "rank": task.rank})
    return RecordDict({CONFIG: config, TASK: numbers, TENSORS: tensors})


def unpack_task(content: RecordDict) -> Task:
    """The task in a message's content, tensors on the CPU."""
    numbers = content.config_records[TASK]
    state = unpack_tensors(content.array_records[TENSORS])
    return Task(_integer(numbers["round"]), _integer(numbers["turn"]), _integer(numbers["rank"]), state)


def pack_tensors(state: State) -> ArrayRecord:
    """Tensors by name, in one array of bytes: a SuperLink is asked for every array of a record by itself."""
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    return ArrayRecord({_FORMAT: Array(np.frombuffer(data, dtype=np.uint8))})


def unpack_tensors(record: ArrayRecord) -> State:
    """Tensors by name, on the CPU.

    Raises:
        Exception: of any kind, where the bytes are damaged.
    """
    return load(record[_FORMAT].numpy().tobytes())


def pack_update(update: Update) -> RecordDict:
    """A reply's content."""
    return RecordDict({TENSORS: pack_tensors(update.tensors), ANSWER: ConfigRecord()})


def pack_failure(reason: str) -> RecordDict:
    """A reply's content where there is no update; the words must tell nothing of the data."""
    return RecordDict({ANSWER: ConfigRecord({"failure": reason})})


def unpack_answer(content: RecordDict) -> Update | str:
    """The update in a reply's content, or the reason why there is none.

    Raises:
        Exception: of any kind, where it is no answer.
    """
    answer = content.config_records[ANSWER]
    if "failure" in answer:
        return str(answer["failure"])
    return Update(unpack_tensors(content.array_records[TENSORS]))


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
        return str(answer["failure"])
    partitions, examples = answer.get("partitions"), answer.get("examples")
    return Introduction(
        _integer(answer["client"]),
        None if partitions is None else _integer(partitions),
        None if examples is None else _integer(examples))


def _integer(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"expected an integer, not {type(value).__name__}")
    return value
