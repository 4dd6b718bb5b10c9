"""Opacus' habits work here, or say what to write instead."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import lora_dp
from lora_dp import BatchMemoryManager, PrivacyEngine, calibrate_noise_multiplier
from lora_dp.opacus_names import (
    OF_ACCOUNTANT,
    OF_CALIBRATION,
    OF_ENGINE,
    OF_MAKE_PRIVATE,
    OF_NEW_ENGINE,
    OF_OPTIMIZER,
    OF_PACKAGE,
)
from tests.models import cross_entropy, examples, flat, mlp, snapshot, take_step
from tests.support import make_private, private_gradients


@pytest.mark.parametrize("name", OF_MAKE_PRIVATE)
@pytest.mark.parametrize("method", ["make_private", "make_private_with_epsilon"])
def test_an_argument_of_opacus_is_refused_with_what_to_write(name: str, method: str) -> None:
    with pytest.raises(TypeError, match=rf"^'{name}' is an argument of Opacus': .*\.$"):
        getattr(PrivacyEngine(), method)(**{name: None})


@pytest.mark.parametrize(
    "called, names", [(PrivacyEngine, OF_NEW_ENGINE), (calibrate_noise_multiplier, OF_CALIBRATION)]
)
def test_and_so_is_one_of_a_new_engine_and_of_the_calibration(called: Any, names: dict[str, str]) -> None:
    for name in names:
        with pytest.raises(TypeError, match=rf"^'{name}' is an argument of Opacus': .*\.$"):
            called(**{name: None})


def test_a_name_that_is_imported_is_told_too() -> None:
    for name in OF_PACKAGE:
        with pytest.raises(ImportError, match=rf"^'{name}' is Opacus' name: write .*\.$"):
            exec(f"from lora_dp import {name}")
    with pytest.raises(AttributeError, match="No lora_dp attribute nothing"):
        lora_dp.nothing  # noqa: B018


def test_adaptive_clipping_is_told() -> None:
    with pytest.raises(ValueError, match="Unknown clipping 'adaptive': .*, or give an AdaptiveClipping"):
        make_private(mlp(), batch_size=4, clipping="adaptive")


def test_another_unknown_argument_is_pythons_business() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'modle'"):
        PrivacyEngine().make_private(modle=None)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "holder, names", [("optimizer", OF_OPTIMIZER), ("engine", OF_ENGINE), ("accountant", OF_ACCOUNTANT)]
)
def test_an_attribute_of_opacus_is_refused_with_what_to_write(holder: str, names: dict[str, str]) -> None:
    engine = PrivacyEngine()
    held: dict[str, Any] = {"engine": engine, "accountant": engine.accountant}
    held["optimizer"] = make_private(mlp(), batch_size=4)
    for name in names:
        with pytest.raises(AttributeError, match=rf"^'{name}' is Opacus' name: write .*\.$"):
            getattr(held[holder], name)
        assert not hasattr(held[holder], name)
    with pytest.raises(AttributeError, match=r"^'\w+' has no 'nothing'\.$"):
        held[holder].nothing  # noqa: B018


def test_what_is_called_alike_works() -> None:
    engine = PrivacyEngine(accountant="rdp")
    optimizer = make_private(mlp(), batch_size=4, noise_multiplier=1.5, max_grad_norm=0.7, engine=engine)
    assert (optimizer.noise_multiplier, optimizer.max_grad_norm, optimizer.expected_batch_size) == (1.5, 0.7, 4)
    assert engine.accountant == "rdp"
    assert isinstance(engine.state_dict()["accountant"], str)
    assert type(engine.state_dict()["accountant"]) is str


def test_a_run_is_kept_in_one_file_and_taken_up(tmp_path: Path) -> None:
    engine = PrivacyEngine(accountant="rdp", reproducible_seed=0)
    model = mlp()
    optimizer = make_private(model, batch_size=4, noise_multiplier=1.0, engine=engine)
    take_step(model, optimizer, examples(4))
    engine.save_checkpoint(path=tmp_path / "run.pt", module=model, optimizer=optimizer, checkpoint_dict={"epoch": 3})
    fresh = mlp(seed=5)
    resumed = PrivacyEngine(accountant="rdp", reproducible_seed=0)
    again = make_private(fresh, batch_size=4, noise_multiplier=1.0, engine=resumed)
    held = resumed.load_checkpoint(path=tmp_path / "run.pt", module=fresh, optimizer=again)
    assert held["epoch"] == 3
    assert resumed.ledger.steps == again.steps_taken == 1
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())
    take_step(fresh, again, examples(4))
    assert resumed.ledger.steps == 2


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    torch.save({"module": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"was not written by engine\.save_checkpoint"):
        PrivacyEngine().load_checkpoint(path=tmp_path / "other.pt", module=mlp())


def private(batch_size: int = 8, size: int = 8) -> tuple[Any, Any, Any]:
    model = mlp()
    data = [(x, y) for x, y in zip(*examples(size), strict=True)]
    return PrivacyEngine(accountant="rdp").make_private(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0),
        data_loader=DataLoader(data, batch_size=batch_size),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
    )


def test_the_private_loader_is_a_data_loader_with_its_attributes() -> None:
    model, optimizer, loader = private(batch_size=2)
    assert isinstance(loader, DataLoader)
    assert (loader.batch_size, loader.num_workers, loader.drop_last) == (2, 0, False)
    assert (loader.pin_memory, loader.timeout, loader.generator) == (False, 0, None)
    assert (loader.in_order, loader.pin_memory_device) == (True, "")
    assert list(loader.sampler) == list(range(8))  # as of any loader of batches, which makes no use of it
    assert len(loader.dataset) == 8
    drawn = list(loader.batch_sampler)
    assert len(drawn) == len(loader) == 4
    public = {name for name in vars(DataLoader(loader.dataset)) if not name.startswith("_")} | {"batch_sampler"}
    for name in public - {"dataset"}:
        with pytest.raises(AttributeError, match="without effect"):
            setattr(loader, name, None)
    # A loader that is made of its parts hands out batches that are no step.
    for x, y in DataLoader(loader.dataset, batch_sampler=[[0, 1, 2]]):
        optimizer.backward(torch.nn.functional.cross_entropy(model(x), y, reduction="none"))
        with pytest.raises(RuntimeError, match="no batch that the private loader drew"):
            optimizer.step()


def test_a_private_loader_is_taken_for_another_run() -> None:
    model, _, loader = private(batch_size=2)
    _, again, other = PrivacyEngine().make_private(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    assert (other.batch_size, again.sample_rate) == (2, 0.25)


@pytest.mark.parametrize("size", [1, 3, 8, 20])
def test_parts_of_a_batch_add_up_to_it(size: int) -> None:
    model, optimizer, loader = private()
    before = snapshot(model)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=size, optimizer=optimizer) as parts:
        assert len(parts) == 1
        seen = []
        for x, y in parts:
            seen.append(len(x))
            optimizer.zero_grad()
            optimizer.backward(torch.nn.functional.cross_entropy(model(x), y, reduction="none"))
            optimizer.step()
    assert sum(seen) == 8
    assert max(seen) <= size
    assert optimizer.steps_taken == 1
    whole = mlp()
    reference = make_private(whole, batch_size=8, max_grad_norm=0.5)
    take_step(whole, reference, examples(8), cross_entropy)
    moved = {name: before[name] - p.detach() for name, p in model.named_parameters() if p.requires_grad}
    expected = private_gradients(whole)
    torch.testing.assert_close(flat(moved), flat(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("prepared", ["optimizer", "data_loader"])
def test_what_accelerate_has_prepared_before_is_refused(prepared: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = mlp()
    given: dict[str, Any] = {
        "optimizer": torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0),
        "data_loader": DataLoader([(x, y) for x, y in zip(*examples(16), strict=True)], batch_size=4),
    }
    given[prepared] = accelerate.Accelerator(cpu=True).prepare(given[prepared])
    options: dict[str, Any] = {"model": model, "max_grad_norm": 1.0, **given}
    with pytest.raises(TypeError, match=rf"^The {prepared} has been through .*: call make_private first"):
        PrivacyEngine().make_private(noise_multiplier=1.0, **options)
    with pytest.raises(TypeError, match="has been through"):
        PrivacyEngine().make_private_with_epsilon(target_epsilon=8, target_delta=1e-5, epochs=1, **options)


def test_accelerate_leaves_the_private_loader_as_it_is(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    engine = PrivacyEngine(accountant="rdp")
    model = mlp()
    model, optimizer, loader = engine.make_private(
        model=model,
        optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2),
        data_loader=DataLoader([(x, y) for x, y in zip(*examples(16), strict=True)], batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    engine.keep_ledger(tmp_path / "ledger.json")
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, stepped, batches = accelerator.prepare(model, optimizer, loader)
    assert batches is loader
    before = snapshot(model)
    for x, y in batches:
        loss = torch.nn.functional.cross_entropy(prepared(x), y)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 1e-9)  # of no gradient that there is
        stepped.step()
        stepped.zero_grad()
    assert engine.ledger.steps == optimizer.steps_taken == 4
    assert any((before[name] - p).norm() > 1e-3 for name, p in model.named_parameters() if name in before)
