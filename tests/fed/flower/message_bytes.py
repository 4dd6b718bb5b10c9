"""Bytes of a client's messages in a round, by method and rank: ``python -m tests.fed.flower.message_bytes`` prints the
table of docs/reports/million-clients.md."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

import lora_dp.fed.flower.without_telemetry  # noqa: F401

# isort: split
from flwr.app import Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity
from tabulate import tabulate

from lora_dp.fed.config import RunConfig
from lora_dp.fed.flower import messages
from lora_dp.fed.methods import MERGED, Layers, State, get_method
from lora_dp.fed.rounds.messages import Update
from lora_dp.fed.rounds.server import Server

# RoBERTa base for two classes: query and value of 12 blocks; the head is trained as it is.
WIDTH = 768
LAYERS = [f"roberta.encoder.layer.{i}.attention.self.{part}" for i in range(12) for part in ("query", "value")]
HEAD = {
    "classifier.dense.weight": (WIDTH, WIDTH),
    "classifier.dense.bias": (WIDTH,),
    "classifier.out_proj.weight": (2, WIDTH),
    "classifier.out_proj.bias": (2,),
}
METHODS = ["la-lora", "dp-lora", "flexlora", "lora-fair", "ffa-lora", "rolora", "deer", "flora", "rac-lora", "galore"]
RANKS = [4, 8, 16]
CLIENTS = 100


@dataclass(frozen=True)
class Bytes:
    """Of one client in one round, as they travel; ``news`` is what a client would need that kept all it ever had."""

    up: float
    down: float
    news: float


def travelling(content: RecordDict) -> int:
    """Bytes of a message with that content, all its parts serialised by Flower."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(content, dst_node_id=1, message_type="train")
    return sum(len(part.deflate()) for part in get_all_nested_objects(message).values())


def start(rank: int) -> State:
    """Float32 adapters and head at random."""
    shapes: dict[str, tuple[int, ...]] = dict(HEAD)
    for name in LAYERS:
        shapes |= {f"{name}.lora_A": (rank, WIDTH), f"{name}.lora_B": (WIDTH, rank)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


def rounds(method: str, rank: int, clients: int) -> Iterator[Bytes]:
    """Round after round, each of so many clients, by the server and the messages of every run."""
    chosen, layers = get_method(method), Layers({name: (WIDTH, WIDTH) for name in LAYERS}, rank, None)
    server, config = Server(start(rank), layers, chosen), messages.pack_config(RunConfig().to_yaml())
    index, seen = 0, -1
    while True:
        server.begin(index, torch.Generator().manual_seed(index))
        up = down = news = 0
        for turn in range(chosen.turns):
            task = server.task(index, turn, rank)
            news, seen = news + server.news_bytes(seen, rank), server.version
            down += travelling(messages.pack_task(config, task, messages.pack_tensors(task.state)))
            tensors = {
                name: tensor + 0.01
                for name, tensor in task.state.items()
                if not name.endswith(MERGED) and chosen.trains(name, index, turn)
            }
            up += travelling(messages.pack_update(Update(tensors)))
            combined = chosen.aggregation()
            # Stacks grow with the clients that are in them; all other sums are of one size.
            for _ in range(clients if method == "flora" else 1):
                combined.add(chosen.contribution(tensors, layers), 1.0)
            server.apply(chosen.combine(combined.result(), server.state, layers, index, turn))
        yield Bytes(up, down, news)
        index += 1


def usual(method: str, rank: int, clients: int = CLIENTS) -> Bytes:
    """The mean of the second and third round: the first sends everything, and some methods alternate."""
    going = rounds(method, rank, clients)
    next(going)
    first, second = next(going), next(going)
    return Bytes((first.up + second.up) / 2, (first.down + second.down) / 2, (first.news + second.news) / 2)


def main() -> None:
    """Prints the table, in MB."""
    rows = []
    for method in METHODS:
        found = [usual(method, rank) for rank in RANKS]
        cells = [f"{getattr(of, kind) / 1e6:,.2f}" for kind in ("up", "down", "news") for of in found]
        rows.append([method, *cells])
    heads = [f"{kind}, r = {rank}" for kind in ("up", "down", "news") for rank in RANKS]
    print(tabulate(rows, ["method", *heads], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
