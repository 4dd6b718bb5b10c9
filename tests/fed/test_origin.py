"""A run goes on with the options and the examples that it was begun with, or not at all."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from lora_dp.fed.config import RunConfig
from lora_dp.fed.data.examples import Examples, TextExamples
from lora_dp.fed.launch import resume, run
from lora_dp.fed.methods import get_method
from lora_dp.fed.origin import SERVERS_OWN, Origin, examples_digest, flat, plain_options
from lora_dp.fed.rounds.ledgers import EXAMPLES, LOG, Account, AheadLog, LogError
from lora_dp.hash_chain import canonical
from tests.fed.chained import forge
from tests.fed.small import TRAINING, make_examples, plan_for

PLAN = plan_for(get_method("dp-lora"), TRAINING)
TINY = {"clients": 2, "rounds": 4, "local_steps": 1, "batch_size": 16, "accountant": "rdp", "device": "cpu"}
# Another value of every option, with what else it takes to be one.
OTHERS: dict[str, dict[str, Any]] = {
    "method": {"method": "deer"},
    "method_options": {"method": "lora-fair", "method_options": {"objective": "cosine"}},
    "clients": {"clients": 6},
    "clients_per_round": {"clients_per_round": 3},
    "rounds": {"rounds": 21},
    "local_steps": {"local_steps": 11},
    "batch_size": {"batch_size": 65},
    "partition": {"partition": "dirichlet"},
    "dirichlet_alpha": {"dirichlet_alpha": 0.5},
    "weighting": {"weighting": "equal"},
    "ranks": {"method": "flora", "ranks": [4, 4, 4, 4, 3]},
    "min_clients": {"min_clients": 2},
    "client_timeout": {"client_timeout": 60.0},
    "fault_norm": {"fault_norm": 10.0},
    "engine": {"engine": "flower"},
    "epsilon": {"epsilon": 7.0},
    "delta": {"delta": 1e-6},
    "unit": {"unit": "client"},
    "noise_by": {"unit": "client", "noise_by": "client"},
    "max_grad_norm": {"max_grad_norm": 2.0},
    "max_update_norm": {"unit": "client", "max_update_norm": 2.0},
    "clipping": {"clipping": "flat"},
    "clip_quantile": {"clipping": "adaptive", "clip_quantile": 0.7},
    "sums_share": {"sums_share": 0.2},
    "accountant": {"accountant": "rdp"},
    "mechanism": {"mechanism": "as-released"},
    "optimizer": {"optimizer": "adamw"},
    "lr": {"lr": 0.25},
    "lr_ratio": {"lr_ratio": 3.0},
    "low_pass": {"low_pass": "none"},
    "low_pass_strength": {"low_pass_strength": 0.125},
    "views": {"views": 4},
    "mirror": {"views": 4, "mirror": True},
    "balanced": {"sums_share": 0.1, "balanced": True},
    "warm_start": {"sums_share": 0.1, "warm_start": True},
    "server_optimizer": {"server_optimizer": "momentum"},
    "server_lr": {"server_lr": 0.5},
    "averaging": {"averaging": "tail"},
    "dataset": {"dataset": "elsewhere"},
    "subset": {"dataset": "elsewhere", "subset": "sst2"},
    "input_column": {"dataset": "elsewhere", "input_column": "a"},
    "pair_column": {"dataset": "elsewhere", "pair_column": "b"},
    "label_column": {"dataset": "elsewhere", "label_column": "c"},
    "task": {"dataset": "elsewhere", "task": "classification"},
    "prompt_column": {"dataset": "elsewhere", "prompt_column": "d"},
    "prompt_template": {"dataset": "elsewhere", "prompt_template": "{d}:"},
    "completion_column": {"dataset": "elsewhere", "completion_column": "e"},
    "chat": {"dataset": "elsewhere", "chat": True},
    "validation_split": {"dataset": "elsewhere", "validation_split": "test"},
    "validation_fraction": {"validation_fraction": 0.3},
    "split_seed": {"split_seed": 1},
    "max_length": {"max_length": 64},
    "model": {"model": "other"},
    "r": {"r": 3},
    "alpha": {"alpha": 2.0},
    "dropout": {"dropout": 0.1},
    "target_modules": {"target_modules": ["qkv"]},
    "init_a": {"init_a": "orthonormal"},
    "adapt_last": {"adapt_last": 1},
    "features": {"features": "unit"},
    "feature_blocks": {"features": "mean", "feature_blocks": [1, 2]},
    "class_texts": {"features": "mean", "class_texts": ["bad", "good"]},
    "contrast": {"contrast": "model"},
    "whitening": {"features": "mean", "whitening": "made-up"},
    "precision": {"precision": "bf16"},
    "pretrained": {"pretrained": False},
    "seed": {"seed": 1},
    "reproducible": {"reproducible": True},
    "evaluate_every": {"evaluate_every": 2},
    "generate": {"generate": 3},
    "checkpoint_every": {"checkpoint_every": 2},
    "output": {"output": Path("other")},
    "device": {"device": "cpu"},
}


def account(examples: str = "e" * 64, **options: Any) -> Account:
    """Of a plan that is always the same: what is refused is refused by the options, or by the examples."""
    return Account(PLAN, [12, 20, 9], Origin(plain_options(RunConfig.from_flat(options)), examples))


def begun(folder: Path, **options: Any) -> AheadLog:
    found = AheadLog(folder / LOG)
    found.begin(account(**options), reproducible=False)
    found.append(1, [0, 1])
    return found


def refusal(name: str) -> str:
    return rf"begun on other terms \((?!options)(.*, )?{name}(, .*)? differ\).*restore its config.yaml"


def test_every_option_has_another_value_here():
    assert OTHERS.keys() == flat(RunConfig()).keys() > SERVERS_OWN


@pytest.mark.parametrize("name", OTHERS)
def test_no_option_changes_but_the_servers_own(tmp_path, name):
    """Each against a run that differs in it alone, if there is such."""
    begun(tmp_path, **{other: value for other, value in OTHERS[name].items() if other != name})
    log, changed = AheadLog(tmp_path / LOG), account(**OTHERS[name])
    if name in SERVERS_OWN:
        log.replay(changed, rounds_done=1, reproducible=False)
        assert changed.releases(0) == changed.releases(1) == TRAINING.local_steps
        return
    with pytest.raises(LogError, match=refusal(name)):
        log.replay(changed, rounds_done=1, reproducible=False)
    assert changed.releases(0) == 0


def test_the_same_options_in_other_words_are_the_same(tmp_path):
    begun(tmp_path, epsilon="none", lr=1, clients=5, method_options={})
    AheadLog(tmp_path / LOG).begin(account(epsilon=float("inf"), lr=1.0), reproducible=False)
    even = plain_options(RunConfig.from_flat({"dirichlet_alpha": float("inf")}))
    assert canonical(even["dirichlet_alpha"]) == '"inf"'
    assert len({canonical(plain_options(RunConfig.from_flat({"lr": rate}))) for rate in (1, 1.0)}) == 1
    written = RunConfig.from_flat({"lr": 0.1 + 0.2, "method": "flora", "ranks": {4: 0.75, 8: 0.25}})
    again = RunConfig.from_flat(yaml.safe_load(written.to_yaml()))
    assert plain_options(again) == plain_options(written)


# The examples


def test_other_examples_or_the_same_ones_elsewhere_are_refused(tmp_path):
    begun(tmp_path)
    with pytest.raises(LogError, match=r"begun on other terms \(examples differ\).*restore its config.yaml and its"):
        AheadLog(tmp_path / LOG).replay(account("f" * 64), rounds_done=1, reproducible=False)
    AheadLog(tmp_path / LOG).replay(account(), rounds_done=1, reproducible=False)


def texts() -> TextExamples:
    ids = torch.arange(24, dtype=torch.int32).view(6, 4)
    return TextExamples(ids, torch.tensor([4, 3, 4, 2, 1, 4]), torch.arange(6) % 2, 0, torch.zeros_like(ids))


PARTS = [np.array([0, 2, 4]), np.array([5, 1])]
Changed = tuple[Examples, list[Any], Examples]
CHANGES: dict[str, Callable[[Examples, Examples], Changed]] = {
    "one moved": lambda train, held: (train, [PARTS[0][:2], np.array([5, 1, 4])], held),
    "one across": lambda train, held: (train, [PARTS[0][:2], np.concatenate([PARTS[0][2:], PARTS[1]])], held),
    "clients swapped": lambda train, held: (train, PARTS[::-1], held),
    "one less": lambda train, held: (train, [PARTS[0], PARTS[1][:1]], held),
    "known by number": lambda train, held: (train, [range(3), PARTS[1]], held),
    "other rows": lambda train, held: (train.subset([1, 0, 2, 3, 4, 5]), PARTS, held),
    "one held out": lambda train, held: (train, PARTS, train.subset([3])),
    "a label": lambda train, held: (_with(train, "_labels", 3), PARTS, held),
    "a held-out label": lambda train, held: (train, PARTS, _with(held, "_labels", 1)),
}


def _with(examples: Examples, name: str, row: int) -> Examples:
    """The same but for one number of one row of the store."""
    changed = examples.subset(range(len(examples)))
    values = getattr(examples, name).clone()
    values.view(len(values), -1)[row, -1] += 1
    setattr(changed, name, values)
    return changed


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("make", [lambda: make_examples(6, 0), texts], ids=["images", "texts"])
def test_the_digest_is_of_who_has_what(name, make):
    held = make_examples(2, 1)
    assert examples_digest(make(), PARTS, held) == examples_digest(make(), PARTS, held)
    assert examples_digest(*CHANGES[name](make(), held)) != examples_digest(make(), PARTS, held)


@pytest.mark.parametrize("name", ["_pixels", "_mean", "_std", "_ids", "_lengths", "_segments", "_pad_id"])
def test_the_digest_is_of_every_value_that_a_model_is_given(name):
    train = next(made for made in (make_examples(6, 0), texts()) if hasattr(made, name))
    if name == "_pad_id":
        changed = train.subset(range(6))
        changed._pad_id = 1
    else:
        changed = _with(train, name, 0)
    held = make_examples(2, 1)
    assert examples_digest(changed, PARTS, held) != examples_digest(train, PARTS, held)


# What stands where


def test_nothing_of_the_examples_is_in_the_log(tmp_path, monkeypatch):
    """A digest tells whoever knows all other examples whether one is there: it is for the server's own eyes."""
    monkeypatch.setattr("secrets.token_hex", lambda count: "00" * count)  # drawn for each log
    for name in ("e", "f"):
        (tmp_path / name).mkdir()
        AheadLog(tmp_path / name / LOG).begin(account(64 * name), reproducible=False)
    first, second = ((tmp_path / name) for name in ("e", "f"))
    assert sorted(path.name for path in first.iterdir()) == [LOG, f"{LOG}.heads", EXAMPLES]
    for name in (LOG, f"{LOG}.heads"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert (first / EXAMPLES).read_bytes() != (second / EXAMPLES).read_bytes()
    assert (first / EXAMPLES).stat().st_mode & 0o077 == 0 and EXAMPLES.startswith("server-only")


@pytest.mark.parametrize("content", [None, b"", b"0" * 63 + b"\n", b"0" * 64, b"\xff" * 65])
def test_without_the_digest_the_run_is_not_gone_on_with(tmp_path, content):
    begun(tmp_path)
    (tmp_path / EXAMPLES).unlink()
    if content is not None:
        (tmp_path / EXAMPLES).write_bytes(content)
    with pytest.raises(LogError, match=rf"{EXAMPLES} beside it is missing or damaged.*Restore it from a backup"):
        AheadLog(tmp_path / LOG).replay(account(), rounds_done=1, reproducible=False)


def test_the_digest_of_another_run_on_the_same_examples_does_not_serve(tmp_path):
    (tmp_path / "other").mkdir()
    begun(tmp_path), begun(tmp_path / "other", seed=1)
    (tmp_path / EXAMPLES).write_bytes((tmp_path / "other" / EXAMPLES).read_bytes())
    with pytest.raises(LogError, match=r"examples differ"):
        AheadLog(tmp_path / LOG).begin(account(), reproducible=False)


@pytest.mark.parametrize("left", ["half of a dig", "0" * 64 + "\n"])
def test_a_crash_between_the_digest_and_the_log_is_made_good(tmp_path, left):
    (tmp_path / EXAMPLES).write_text(left)
    begun(tmp_path)
    AheadLog(tmp_path / LOG).replay(account(), rounds_done=1, reproducible=False)


def test_the_options_are_in_the_chain(tmp_path):
    begun(tmp_path)
    lines = (tmp_path / LOG).read_bytes()
    edited = lines.replace(b'"split_seed":0', b'"split_seed":1')
    assert edited != lines
    (tmp_path / LOG).write_bytes(edited)
    with pytest.raises(LogError, match="line 1 is damaged"):
        AheadLog(tmp_path / LOG).begin(account(split_seed=1), reproducible=False)


def test_a_log_without_options_belongs_to_an_earlier_version(tmp_path):
    begun(tmp_path)
    entries = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    for entry in entries:
        del entry["digest"]
    entries[0]["version"] = 2
    del entries[0]["terms"]["options"]
    forge(tmp_path / LOG, entries)
    with pytest.raises(LogError, match="version 2: go on with this run by the lora-dp that began it"):
        AheadLog(tmp_path / LOG).replay(account(), rounds_done=1, reproducible=False)


def test_a_log_begun_without_a_configuration_is_none_of_a_configured_run(tmp_path):
    AheadLog(tmp_path / LOG).begin(Account(PLAN, [12, 20, 9]), reproducible=False)
    with pytest.raises(LogError, match=r"\(options differ\)"):
        AheadLog(tmp_path / LOG).begin(account(), reproducible=False)


# Whole runs


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def cut_short(folder: Path, **options: Any) -> None:
    """A run that ended, with its last word taken back: as if it had been killed after its last checkpoint."""
    run(RunConfig.from_flat({**TINY, "method": "dp-lora", **options, "output": folder}), quiet())
    (folder / "summary.json").unlink()


def edit(folder: Path, **options: str) -> None:
    text = (folder / "config.yaml").read_text()
    for name, value in options.items():
        text, count = re.subn(rf"(?m)^{name}: .*$", f"{name}: {value}", text)
        assert count == 1
    (folder / "config.yaml").write_text(text)


@pytest.mark.slow
def test_a_run_whose_configuration_was_edited_is_refused_before_anything_is_done(tmp_path):
    """The seed deals the examples anew, so that one comes to more releases than planned; another split makes examples
    that were trained on validation data, whose metrics are exact."""
    folder = tmp_path / "run"
    cut_short(folder)
    text = (folder / "config.yaml").read_text()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for options in (
        {"seed": "77"},
        {"split_seed": "77"},
        {"partition": "dirichlet"},
        {"validation_fraction": "0.25"},
        {"max_grad_norm": "2.0"},
        {"lr": "0.01"},
        {"dropout": "0.1"},
    ):
        edit(folder, **options)
        [name] = options
        with pytest.raises(ValueError, match=refusal(name)):
            resume(folder, quiet())
        (folder / "config.yaml").write_text(text)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    edit(
        folder,
        min_clients="2",
        client_timeout="600",
        fault_norm="500",
        evaluate_every="3",
        checkpoint_every="2",
        weighting="equal",
        device="auto",
    )
    assert resume(folder, quiet()).summary["status"] == "finished"


@pytest.mark.slow
def test_a_run_whose_data_were_changed_is_refused(tmp_path):
    """One image for another: the same numbers of examples, at the same clients."""
    data, folder, rng = tmp_path / "data", tmp_path / "run", np.random.default_rng(0)
    for row in range(60):
        place = data / "train" / str(row % 2) / f"{row:03d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(place)
    cut_short(folder, dataset=str(data))
    changed = data / "train" / "0" / "000.png"
    was = changed.read_bytes()
    Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(changed)
    with pytest.raises(ValueError, match=r"begun on other terms \(examples differ\)"):
        resume(folder, quiet())
    changed.write_bytes(was)
    assert resume(folder, quiet()).summary["status"] == "finished"
