"""A deployed run whose server is stopped goes on where its clients' data are, and nowhere else."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("flwr")

import lora_dp.fed.flower.without_telemetry  # noqa: F401

# isort: split
from flwr.app import Context, Message, RecordDict
from safetensors.torch import load_file

from lora_dp.fed.flower.client import client_app
from lora_dp.fed.flower.server import options_of, serve, serve_again, server_app
from lora_dp.fed.launch import resume
from tests.fed.flower.loopback import LoopbackGrid

QUIET = Console(quiet=True)


def config(output: Path) -> Any:
    return options_of(
        {
            "clients": 2,
            "rounds": 3,
            "local-steps": 1,
            "batch-size": 16,
            "accountant": "rdp",
            "device": "cpu",
            "reproducible": True,
            "output": str(output),
        }
    )


def grid() -> LoopbackGrid:
    return LoopbackGrid([{"partition-id": client, "num-partitions": 2} for client in range(2)])


class PowerCut(BaseException):
    pass


def cut_short(output: Path) -> None:
    """The server dies while the second round is under way."""
    work = client_app(simulated=True)

    def answer(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == "train" and message.metadata.group_id == "2":
            raise PowerCut
        return work(message, context)

    with pytest.raises(PowerCut):
        serve(config(output), LoopbackGrid([{"partition-id": c, "num-partitions": 2} for c in range(2)], answer), QUIET)
    assert not (output / "summary.json").exists()


@pytest.mark.slow
def test_it_ends_as_if_it_had_never_stopped(tmp_path):
    serve(config(tmp_path / "whole"), grid(), QUIET)
    cut_short(tmp_path / "cut")
    # What flwr run starts, with the folder in its configuration; the other options there are not asked.
    server_app()(
        grid(),
        Context(
            run_id=1,
            node_id=1,
            node_config={},
            state=RecordDict(),
            run_config={"resume": str(tmp_path / "cut"), "rounds": 99, "method": "deer"},
        ),
    )
    weights = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut")]
    assert weights[0].keys() == weights[1].keys() and all(weights[1][k].equal(v) for k, v in weights[0].items())
    ledgers = [json.loads((tmp_path / name / "ledger.json").read_text()) for name in ("whole", "cut")]
    assert ledgers[0] == ledgers[1] and ledgers[1]["clients"][0]["steps"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("name, value", [("seed", "5"), ("split_seed", "5"), ("lr", "0.01")])
def test_it_goes_on_with_its_own_options_alone(tmp_path, name, value):
    """Nodes without a folder of their own would take other examples for theirs. None is asked for anything."""
    cut_short(tmp_path / "cut")
    path = tmp_path / "cut" / "config.yaml"
    text = path.read_text()
    path.write_text(re.sub(rf"(?m)^{name}: .*$", f"{name}: {value}", text))
    work, asked = client_app(simulated=True), []

    def answer(message: Message, context: Context) -> Message | None:
        asked.append(message.metadata.message_type)
        return work(message, context)

    nodes = LoopbackGrid([{"partition-id": client, "num-partitions": 2} for client in range(2)], answer)
    with pytest.raises(ValueError, match=rf"begun on other terms \({name}.* differ\)"):
        serve_again(tmp_path / "cut", nodes, QUIET)
    assert set(asked) == {"query"}
    path.write_text(text)
    assert serve_again(tmp_path / "cut", grid(), QUIET).summary["status"] == "finished"


@pytest.mark.slow
def test_it_goes_on_nowhere_else(tmp_path):
    cut_short(tmp_path / "cut")
    with pytest.raises(ValueError, match='resume="FOLDER" in its --run-config'):
        resume(tmp_path / "cut", QUIET)
    text = (tmp_path / "cut" / "config.yaml").read_text()
    (tmp_path / "cut" / "config.yaml").write_text(text.replace("engine: deployed", "engine: local"))
    with pytest.raises(ValueError, match="was not deployed: go on with it by lora-dp resume"):
        serve_again(tmp_path / "cut", grid(), QUIET)
