"""What travels between the server and its nodes."""

from dataclasses import replace

import pytest

pytest.importorskip("flwr")

import lora_dp.fed.flower.without_telemetry  # noqa: F401

# isort: split
from flwr.app import ConfigRecord, RecordDict

from lora_dp.fed.flower import messages
from lora_dp.fed.flower.server import FlowerEngine
from lora_dp.fed.rounds.messages import Update
from tests.fed.flower.loopback import LoopbackGrid
from tests.fed.flower.small_deployments import STATE, TASK, nodes, tiny


def test_tasks_and_updates_travel_unchanged():
    config = messages.pack_config("seed: 1")
    content = messages.pack_task(config, TASK, messages.pack_tensors(TASK.state))
    back = messages.unpack_task(content)
    assert (back.round, back.turn, back.rank, messages.unpack_config(content)) == (3, 1, 2, "seed: 1")
    update = messages.unpack_answer(messages.pack_update(Update(STATE)))
    assert isinstance(update, Update)
    for state in (back.state, update.tensors):
        assert state.keys() == STATE.keys()
        assert all(t.equal(STATE[name]) and t.dtype == STATE[name].dtype for name, t in state.items())


@pytest.mark.parametrize("sums", [False, True])
def test_whether_sums_are_asked_for_travels(sums):
    content = messages.pack_task(messages.pack_config(""), replace(TASK, sums=sums), messages.pack_tensors(STATE))
    assert messages.unpack_task(content).sums is sums


@pytest.mark.parametrize("said", [1, 0, "yes", "", 1.0, [True]])
def test_what_is_no_truth_value_asks_for_nothing(said):
    content = messages.pack_task(messages.pack_config(""), TASK, messages.pack_tensors(STATE))
    content.config_records[messages.TASK]["sums"] = said
    with pytest.raises(TypeError, match="no truth value"):
        messages.unpack_task(content)


def test_a_task_of_a_server_that_knows_no_sums_is_for_a_turn():
    content = messages.pack_task(messages.pack_config(""), TASK, messages.pack_tensors(STATE))
    del content.config_records[messages.TASK]["sums"]
    assert messages.unpack_task(content).sums is False


def test_nodes_get_neither_the_output_folder_nor_the_servers_device(tmp_path):
    grid = LoopbackGrid(nodes(1), lambda message, context: None)
    engine = FlowerEngine(grid, tiny(clients=1, output=tmp_path, device="cpu"))
    engine._meet()
    told = messages.unpack_config(grid.sent[0].content)
    assert str(tmp_path) not in told and "device: auto" in told


def test_an_answer_that_is_no_integer_is_none():
    content = RecordDict({messages.ANSWER: ConfigRecord({"client": "0"})})
    with pytest.raises(TypeError):
        messages.unpack_introduction(content)
