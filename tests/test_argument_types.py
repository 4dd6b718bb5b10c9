"""Arguments of adapted layers, of files and of the isolation check: a wrong type is refused in one clear sentence."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lora_dp import (
    DPEmbedding,
    DPLinear,
    DPLoRALinear,
    Ledger,
    LoRAConfig,
    inject_lora,
    load_adapter,
    merge_adapters,
    save_adapter,
    unmerge_adapters,
)
from tests.models import examples, mlp, seeded
from tests.support import make_private


def test_numpys_numbers_in_a_lora_config_are_taken_and_saved(tmp_path: Path) -> None:
    given = LoRAConfig(r=np.int64(2), alpha=np.float32(3), dropout=np.float32(0.25), target_modules=["0"])  # type: ignore[arg-type]
    assert (given.r, given.alpha, given.dropout) == (2, 3, 0.25) and type(given.r) is int
    model = inject_lora(nn.Sequential(nn.Linear(6, 8)), given)
    save_adapter(model, tmp_path / "saved")
    again = load_adapter(nn.Sequential(nn.Linear(6, 8)), tmp_path / "saved")
    assert torch.equal(again[0].lora_A, model[0].lora_A)  # type: ignore[index, union-attr]
    layer = DPLoRALinear(6, 4, r=np.int64(2), alpha=np.float64(4), dropout=np.float32(0.5))  # type: ignore[arg-type]
    assert (layer.r, layer.scaling, layer.dropout) == (2, 2.0, 0.5)
    assert [type(value) for value in (layer.r, layer.scaling, layer.dropout)] == [int, float, float]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        *[
            ({"r": value}, TypeError, "r must be a whole number, got")
            for value in ("8", None, True, 2.0, [2], math.nan)
        ],
        *[({"r": value}, ValueError, f"Rank {value} does not fit") for value in (0, -1, 5, 10**400)],
        *[({"alpha": value}, TypeError, "alpha must be a number, got") for value in ("8", True, [8], 1j)],
        ({"alpha": math.inf}, ValueError, "alpha must be finite, got inf"),
        *[({"alpha": value}, ValueError, "alpha must be above 0") for value in (math.nan, -math.inf, 0)],
        *[({"dropout": value}, TypeError, "dropout must be a number, got") for value in ("0", None, True)],
        *[({"dropout": value}, ValueError, "dropout must be in") for value in (math.nan, math.inf, 1, -0.1)],
        *[({"rslora": value}, TypeError, "rslora must be True or False") for value in ("no", None, 1)],
    ],
)
def test_an_adapted_layer(options: dict[str, Any], error: type[Exception], words: str) -> None:
    for make_layer in (
        lambda **given: DPLoRALinear(6, 4, **given),
        lambda **given: DPLoRALinear.from_linear(nn.Linear(6, 4), **given),
    ):
        with pytest.raises(error, match=rf"^{words}.*\.$") as refusal:
            make_layer(**{"r": 2, **options})
        assert "\n" not in str(refusal.value)
    if options.keys() <= {"r", "alpha"} and error is TypeError:
        with pytest.raises(TypeError, match=rf"^{words}"):
            DPLoRALinear(6, 4, r=2).set_rank(**{"r": 1, "alpha": 1.0, **options})


@pytest.mark.parametrize("value", [None, "8", 10.0, math.nan, [1, 1], True, torch.tensor(1.0), -1])
def test_sizes_of_a_layer(value: Any) -> None:
    error = ValueError if value == -1 else TypeError
    for make in (lambda one, other: DPLoRALinear(one, other, r=1), DPLinear, DPEmbedding):
        for name, sizes in zip(
            ("num_embeddings", "embedding_dim") if make is DPEmbedding else ("in_features", "out_features"),
            ((value, 4), (4, value)),
            strict=True,
        ):
            with pytest.raises(error, match=rf"^{name} must be .*, got .*\.$"):
                make(*sizes)


@pytest.mark.parametrize("value", [torch.tensor(1.0), torch.zeros(2), 3, [1]])
def test_names_of_modules(value: Any) -> None:
    for name in ("target_modules", "trainable_modules"):
        with pytest.raises(TypeError, match=rf"^{name} must be a list of names, got .*\.$"):
            LoRAConfig(r=2, **{name: value})


@pytest.mark.parametrize("value", [None, [], "lr", 3])
def test_a_group_of_parameters(value: Any) -> None:
    optimizer = make_private(mlp(), batch_size=4)
    with pytest.raises(TypeError, match=r"^param_group must be a dict, got .*params.*\.$"):
        optimizer.add_param_group(value)


@pytest.mark.parametrize("value", [None, "gpt2", {}, nn.Linear])
def test_functions_of_a_model(value: Any, tmp_path: Path) -> None:
    for action in (
        merge_adapters,
        unmerge_adapters,
        lambda model: save_adapter(model, tmp_path),
        lambda model: load_adapter(model, tmp_path),
        lambda model: seeded().check_isolation(model, torch.zeros(2, 6)),
    ):
        with pytest.raises(TypeError, match=r"^model must be a Module, got .*: give the .*\.$"):
            action(value)


@pytest.mark.parametrize("value", [None, 3, b"folder", [], {}])
def test_what_must_be_a_path(value: Any) -> None:
    model = inject_lora(nn.Sequential(nn.Linear(6, 8)), LoRAConfig(r=2, target_modules=["0"]))
    for name, action in (
        ("folder", lambda: save_adapter(model, value)),
        ("folder", lambda: load_adapter(model, value)),
        ("path", lambda: Ledger.load(value)),
        ("path", lambda: Ledger().save(value)),
    ):
        with pytest.raises(TypeError, match=rf"^{name} must be a path, got .*: a string or a pathlib\.Path\.$"):
            action()


@pytest.mark.parametrize(
    "state",
    [
        None,
        3,
        [],
        torch.zeros(2),
        torch.tensor(1.0),
        np.zeros(2),
        "state",
        {"format": "lora-dp ledger", "version": 2, "entries": [torch.zeros(2)]},
        {"format": "lora-dp ledger", "version": 2, "entries": 3},
    ],
    ids=repr,
)
def test_states_of_a_ledger(state: Any) -> None:
    with pytest.raises(ValueError, match=r"^Not a whole ledger of version 2 \(.*\): restore it from a backup"):
        Ledger().load_state_dict(state)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (None, "a NoneType"),
        (3, "a int"),
        ("ab", "a str"),
        (np.zeros((2, 6)), "a ndarray"),
        ((1, 2, 3), "a tuple of 3"),
        ([torch.zeros(2, 6)], "a list of 1"),
        (torch.nn.Linear, "a type"),
    ],
)
def test_a_batch_for_the_isolation_check(batch: Any, words: str) -> None:
    either = r"a dict, a tensor or a pair \(inputs, targets\)"
    with pytest.raises(TypeError, match=rf"^batch must be {either}, got {words}\.$"):
        seeded().check_isolation(mlp(), batch, nn.CrossEntropyLoss())


@pytest.mark.parametrize("criterion", ["x", 3, torch.zeros(2), []])
def test_a_criterion_for_the_isolation_check(criterion: Any) -> None:
    for batch in (examples(4), list(examples(4))):
        with pytest.raises(TypeError, match=r"^criterion must be a function of output and targets, got .*\.$"):
            seeded().check_isolation(mlp(), batch, criterion)
        seeded().check_isolation(mlp(), batch, nn.CrossEntropyLoss())
