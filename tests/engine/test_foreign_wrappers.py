"""What others put around a model or beside its process is refused by name."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tests.chosen_options import make
from tests.models import examples, mlp, take_step
from tests.support import make_private


@pytest.fixture
def two_processes() -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


def test_several_processes_are_refused_at_set_up(two_processes: None) -> None:
    with pytest.raises(RuntimeError, match=r"^torch\.distributed runs 2 processes, .*: train in one process"):
        make()


def test_and_at_a_step_when_they_came_later(request: pytest.FixtureRequest) -> None:
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    take_step(model, optimizer, examples(4))
    request.getfixturevalue("two_processes")
    with pytest.raises(RuntimeError, match="runs 2 processes"):
        take_step(model, optimizer, examples(4))
    assert optimizer.ledger.steps == 1


def test_one_process_of_a_group_is_taken() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        make()
    finally:
        torch.distributed.destroy_process_group()


def test_wrapped_models_are_refused_by_name(two_processes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_dp.engine.engine.check_one_process", lambda: None)
    from torch.distributed.fsdp import fully_shard

    inner = nn.Sequential(mlp())
    whole = {
        "DistributedDataParallel": nn.parallel.DistributedDataParallel(mlp()),
        "DataParallel": nn.DataParallel(mlp()),
    }
    inner[0] = nn.DataParallel(inner[0])
    for name, model in [*whole.items(), ("DataParallel", inner)]:
        with pytest.raises(ValueError, match=rf"is wrapped in {name}, .*: give the model inside it"):
            make(model=model)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    with pytest.raises(ValueError, match="is wrapped in FSDPModule"):
        make(model=fully_shard(mlp(), mesh=mesh))
    spread = mlp()
    from torch.distributed.tensor import Replicate, distribute_tensor

    spread[2].weight = nn.Parameter(distribute_tensor(spread[2].weight.detach(), mesh, [Replicate()]))
    with pytest.raises(ValueError, match=r"^'2\.weight' is sharded over processes \(DTensor\)"):
        make(model=spread)
