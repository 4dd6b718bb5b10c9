"""A server that breaks its word: a node keeps what its owner wrote, or refuses before it looks at any private data."""

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("flwr")

import lora_dp.fed.flower.without_telemetry  # noqa: F401

# isort: split
from flwr.app import ConfigRecord, RecordDict

import lora_dp.fed.models.task_losses
from lora_dp.fed.config import RunConfig
from lora_dp.fed.flower import client as flower_client
from lora_dp.fed.flower import messages
from lora_dp.fed.flower.ledger import Refused
from lora_dp.fed.flower.policy import RULES, Policy, read_yaml
from lora_dp.fed.origin import flat
from lora_dp.fed.rounds.messages import Update
from lora_dp.fed.rounds.setup import open_job
from lora_dp.privacy.accounting import Ledger
from tests.fed.flower.asking_servers import ODD, SPOILT, WHOLE, answer, asking_model, policy, sent, texts
from tests.fed.flower.node_data import GOOD, own_folder


def test_every_option_of_a_run_has_a_rule_and_the_default_run_keeps_them():
    assert RULES.keys() == flat(RunConfig()).keys()
    Policy(RULES).check(RunConfig())


# What a server may try, and the option by whose name a node refuses it.
HARMFUL: list[dict[str, Any]] = [
    {"model": "somewhere/else"},
    {"model": "/srv/model"},
    {"model": "vit_tiny_patch16_224"},
    {"pretrained": False},
    {"target_modules": "(a+)+$"},
    {"target_modules": ["head"]},
    {"precision": "bf16"},
    {"max_length": 10**9},
    {"r": 10**9},
    {"alpha": 1e300},
    {"dropout": 0.999},
    {"dropout": math.nan},
    {"epsilon": 9.0},
    {"epsilon": 1e9},
    {"delta": 0.01},
    {"max_grad_norm": 1e-20},
    {"max_grad_norm": 1e19},
    {"clipping": "none"},
    {"accountant": "mine"},
    {"optimizer": "lbfgs"},
    {"lr": 1e300},
    {"lr": math.inf},
    {"lr_ratio": 1e300},
    {"local_steps": 10**9},
    {"batch_size": 10**9},
    {"rounds": 10**12},
    {"clients": 10**12},
    {"rounds": 2.5},
    {"batch_size": True},
    {"local_steps": 2.0},
    {"seed": 1.5},
    {"low_pass": "gaussian", "low_pass_strength": 1e300},
    {"method": "somebody-elses"},
    {"method": "flat-lora:dp-lora", "method_options": {"rho": 1e300}},
    {"r": 4.5},
    {"max_length": "128"},
    {"pretrained": "yes"},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", HARMFUL, ids=lambda options: "-".join(map(str, options.items())))
def test_what_could_harm_is_refused_by_name_and_before_any_data_are_read(options, node, state, monkeypatch):
    def opened(*_: Any) -> None:
        raise AssertionError("data were opened")

    monkeypatch.setattr(flower_client, "_opened", opened)
    said = answer(sent(options, state), node)
    assert isinstance(said, str)
    assert any(f"{name} " in said for name in options) or "was sent a configuration that is none" in said, said
    assert not Path(node["ledger"]).exists()
    config = messages.pack_config(yaml.safe_dump({**GOOD, **options}))
    introduced = flower_client._answered(flower_client._introduce, RecordDict({messages.CONFIG: config}), node)
    assert messages.unpack_introduction(introduced) == said


@pytest.mark.parametrize(
    ("name", "within", "beyond"),
    [
        ("epsilon", 8.0, 8.001),
        ("delta", 1e-5, 1.01e-5),
        ("max_grad_norm", 0.001, 0.00099),
        ("max_grad_norm", 1000.0, 1001.0),
        ("batch_size", 4096, 4097),
        ("local_steps", 10**4, 10**4 + 1),
        ("r", 256, 257),
        ("max_length", 512, 513),
        ("dropout", 0.9, 0.91),
        ("clients", 10**6, 10**6 + 1),
        ("rounds", 10**6, 10**6 + 1),
    ],
)
def test_bounds_are_where_they_are_said_to_be(name, within, beyond):
    Policy(RULES).check(RunConfig.from_flat({name: within}))
    with pytest.raises(Refused, match=f"no such run: {name} is"):
        Policy(RULES).check(RunConfig.from_flat({name: beyond}))


@pytest.mark.slow
def test_a_budget_decides_on_epsilon_in_place_of_the_rule(node, state, tmp_path):
    """What a run claims is nothing to the ledger, which counts what it would release."""
    node |= {"epsilon": 1.0, "delta": 1e-5}
    assert isinstance(answer(sent({"epsilon": 0.9}, state), node), Update)
    before = Path(node["ledger"]).read_text()
    for _ in range(2):
        assert "has no budget left" in answer(sent({"epsilon": 1000.0}, state), node)
    assert Path(node["ledger"]).read_text() == before


UNPROTECTED = [
    {"epsilon": "none"},
    {"reproducible": True},
    {"mechanism": "as-released", "method": "la-lora", "engine": "local"},
    {"unit": "client"},
    WHOLE,
]


@pytest.mark.parametrize("options", UNPROTECTED, ids=lambda options: "-".join(map(str, options.items())))
def test_the_promise_is_the_owners_whatever_the_server_says(options, node, state, monkeypatch):
    monkeypatch.setattr(flower_client, "_opened", lambda *_: pytest.fail("data were opened"))
    assert "keeps a ledger" in answer(sent(options, state), node)
    without = {"partition-id": 0, "data": node["data"]}
    nodes = [without, {"partition-id": 0}, {"partition-id": 0, "num-partitions": 2}, {**without, "private": True}]
    for config in nodes:
        for asked in (options, {}):
            assert "has no ledger" in answer(sent(asked, state), config)


@pytest.mark.slow
def test_private_false_is_the_owners_word_and_a_whole_one(node, state):
    said = {**node, "private": False}
    assert "must leave one of them out" in answer(sent({}, state), said)
    del said["ledger"]
    for options in ({}, {"epsilon": "none"}, {"reproducible": True}, {"unit": "client"}):
        assert isinstance(answer(sent(options, state), said), Update), options
    # It speaks of noise alone: what the node opens is still not the server's to choose.
    assert "model is" in answer(sent({"epsilon": "none", "model": "/etc"}, state), said)
    shared = {"partition-id": 0, "private": False}
    assert "dataset is" in answer(sent({"epsilon": "none", "dataset": "/etc"}, state), shared)
    assert "neither true nor false" in answer(sent({}, state), {**said, "private": "false"})


def test_nodes_that_ray_simulates_are_told_by_the_process_and_not_by_a_message(monkeypatch):
    import ray

    inside = {"partition-id": 0, "num-partitions": 2}
    assert not flower_client._by_ray(inside)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: type("Here", (), {"get_actor_id": lambda self: "1"})())
    assert flower_client._by_ray(inside) and not flower_client._by_ray({**inside, "data": "/srv/own"})


HARMLESS: list[dict[str, Any]] = [
    {},
    {"method": "la-lora"},
    {"method": "flat-lora:ffa-lora"},
    {"clipping": "per_layer", "max_grad_norm": 0.001},
    {"clipping": "flat", "max_grad_norm": 1000.0},
    {"batch_size": 4096},
    {"batch_size": 1},
    {"lr": 3.0},
    {"epsilon": 0.5, "delta": 1e-6, "accountant": "pld", "rounds": 1},
    {"seed": 7, "rounds": 1000},
    {"dropout": 0.5},
    {"dataset": "/etc", "label_column": "secret", "partition": "dirichlet"},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", HARMLESS, ids=lambda options: "-".join(map(str, options.items())))
def test_what_it_accepts_is_noised_as_its_ledger_says(options, node, state, monkeypatch):
    """What is sent when training fails on everything is noise alone: its size is that of the ledger's entry."""

    def failing(*_: Any) -> None:
        raise IndexError("index out of range in self")

    monkeypatch.setattr(lora_dp.fed.models.task_losses, "logits", failing)
    options = {"low_pass": "none", "lr_ratio": 1.0, **options}
    update = answer(sent(options, state), node)
    assert isinstance(update, Update), update
    [(event, count)] = Ledger.load(Path(node["ledger"])).entries
    config = RunConfig.from_flat({**GOOD, **options})
    batch = min(config.federation.batch_size, 40)
    assert count == 2 and event.sample_rate >= batch / 40 - 1e-12
    moved = update.tensors["head.weight"] - state["head.weight"]
    rate, bound = config.optimization.lr, config.privacy.max_grad_norm
    expected = event.noise_multiplier * bound / batch * rate * math.sqrt(count)
    assert abs(float(moved.std()) / expected - 1) < 6 / math.sqrt(2 * moved.numel()), (float(moved.std()), expected)
    # No run leads to less noise than its ε needs.
    ledger = Ledger()
    ledger.append(event, count * config.federation.rounds)
    assert ledger.epsilon(config.privacy.delta, "rdp") <= config.privacy.epsilon * (1 + 1e-9) + 0.3 * (
        config.privacy.accountant == "pld"
    )


@pytest.mark.parametrize("task", [(3, 0, 4), (0, 1, 4), (0, 0, 0), (0, 0, 5), (0, 0, 10**9), (2**31 - 1, 0, 4)])
def test_a_task_that_the_run_does_not_have_costs_nothing(task, node, state):
    said = answer(sent({}, state, task), node)
    assert isinstance(said, str) and "the run has no such" in said and not Path(node["ledger"]).exists()


@pytest.mark.parametrize("number", [-1, 2**31, 10**30, True, 1.5, "0"])
@pytest.mark.parametrize("field", ["round", "turn", "rank"])
def test_a_tasks_numbers_are_numbers(field, number, node, state):
    content = sent({}, state)
    content.config_records[messages.TASK][field] = number
    assert answer(content, node) in ("raised TypeError", "raised ValueError") and not Path(node["ledger"]).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\nrounds: [*b, *b]",
        "rounds: 3\n" * 10**5,
        "- 1",
        "[" * 5000,
        "\x00",
        "unknown: 1",
        "1: 2",
        "rounds: !!python/object/apply:os.system ['true']",
        "rounds: [1, 2]",
        "epsilon: {}",
    ],
)
def test_a_configuration_that_is_none_is_refused(text, node, state, caplog):
    said = answer(sent(text, state), node)
    assert isinstance(said, str) and not Path(node["ledger"]).exists()
    assert len(said) <= 300 and not ODD.search(said) and not ODD.search(caplog.text)


def test_aliases_that_stand_for_more_than_memory_holds_are_not_followed():
    lines = ["ranks: &a0 [1, 1]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    with pytest.raises(ValueError, match="aliases"):
        read_yaml("\n".join(lines))
    assert read_yaml("rounds: 3") == {"rounds": 3}


@pytest.mark.slow
@pytest.mark.parametrize("where", [*sorted(flat(RunConfig())), SPOILT, "tensor", "record"])
def test_no_text_of_a_server_reaches_the_nodes_log_as_it_is(where, node, state, caplog):
    if where == "tensor":
        content = sent({}, {**state, SPOILT: torch.zeros(1)})
    elif where == "record":
        content = sent({}, state)
        content.config_records[messages.CONFIG] = ConfigRecord({"yaml": [SPOILT] * 10})
    else:
        content = sent({where: SPOILT}, state)
    with caplog.at_level(logging.DEBUG, logger="lora_dp"):
        said = answer(content, {"partition-id": 0, "private": False} if where == "dataset" else node)
    assert isinstance(said, Update) or not ODD.search(said) and "\n" not in said and len(said) <= 300
    for record in caplog.records:
        assert not ODD.search(record.getMessage()) and "\n" not in record.getMessage()
        assert len(record.getMessage()) < 3000 and record.exc_info is None


# A failure is no bit


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return asking_model(tmp_path_factory.mktemp("words") / "model")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, WHOLE], ids=["example", "client"])
def test_a_server_that_names_model_and_tokenizer_learns_no_word(options, words, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    options = {**options, "model": str(words), "batch_size": 40, "epsilon": 0.5, "method": "ffa-lora"}
    answers, ledgers = [], []
    for name, last in (("without", "patient 39 is well"), ("with", "patient 39 has hiv")):
        node = {
            "partition-id": 0,
            "data": str(texts(tmp_path / name, last)),
            "ledger": str(tmp_path / f"{name}.json"),
            "unit": options.get("unit", "example"),
            "policy": policy(tmp_path / "policy.yaml", {"model": str(words)}),
        }
        shared = RunConfig.from_flat({**GOOD, **options, "dataset": node["data"], "validation_fraction": 0.2})
        start = open_job(shared).trainer.workspace.state()
        flower_client._opened.cache_clear()
        with caplog.at_level(logging.ERROR):
            update = answer(sent(options, start), node)
        assert isinstance(update, Update), update
        answers.append({name: (tensor.shape, tensor.dtype) for name, tensor in update.tensors.items()})
        ledgers.append(json.loads(Path(node["ledger"]).read_text())["entries"])
    assert answers[0] == answers[1] and ledgers[0] == ledgers[1]
    assert "training failed" in caplog.text  # on this side


@pytest.mark.slow
def test_an_example_that_cannot_be_encoded_counts_and_contributes_nothing(node, state, caplog):
    broken = Path(node["ledger"]).parent / "data"
    own_folder(broken, 40)
    [first, *_] = sorted((broken / "train" / "0").iterdir())
    first.write_bytes(b"no image of Jane")
    node["data"] = str(broken)
    flower_client._opened.cache_clear()
    config = messages.pack_config(yaml.safe_dump(GOOD))
    said = messages.unpack_introduction(
        flower_client._answered(flower_client._introduce, RecordDict({messages.CONFIG: config}), node)
    )
    assert isinstance(said, messages.Introduction) and said.examples == 40
    assert "1 of 40 examples cannot be read" in caplog.text
    examples = flower_client._node(sent({}, state), node).examples(0)
    readable = []
    for row in range(40):
        try:
            readable.append(examples.batch([row])["labels"].item())
        except ValueError:
            assert examples.labels[row] == 0
    assert len(readable) == 39 and len(examples.batch([r for r in range(40) if examples.labels[r] != 0])["labels"]) > 30
    assert isinstance(answer(sent({"batch_size": 40}, state), node), Update)


def test_code_that_a_model_brings_along_is_never_run(words, tmp_path):
    import shutil

    from lora_dp.fed.models.loading import load_model
    from lora_dp.fed.models.options import ModelConfig

    model, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(words, model)
    (model / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForSequenceClassification": "evil.Evil"},
    }
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="could not load"):
        load_model(ModelConfig(str(model)), 2, "text")
    assert not mark.exists()


def test_a_policy_is_of_every_option_so_that_a_new_one_cannot_be_forgotten():
    with pytest.raises(KeyError):
        Policy({name: rule for name, rule in RULES.items() if name != "lr"}).check(RunConfig())
    assert {
        field.name
        for group in dataclasses.fields(RunConfig)
        for field in dataclasses.fields(getattr(RunConfig(), group.name))
    } - {"name"} | {"model"} == set(RULES)
