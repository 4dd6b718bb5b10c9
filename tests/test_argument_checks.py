"""Arguments of a wrong type, settings changed afterwards, scalers and wrappers: one clear sentence each."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, Subset, TensorDataset

from lora_dp import LoRAConfig, PrivacyEngine, inject_lora
from lora_dp.argument_checks import check_count, check_number
from lora_dp.engine.cuda_graphs import GraphedStep
from lora_dp.fed.config import RunConfig
from lora_dp.losses import causal_lm_loss, classification_loss, masked_lm_loss, question_answering_loss, regression_loss
from lora_dp.privacy.filtering import GaussianFilter, LaplacianFilter
from tests.chosen_options import make
from tests.models import examples, mlp, private_run, seeded, take_step
from tests.support import make_private

NO_NUMBERS = ["8", None, [1.0, 1.0], (1,), True, 1 + 0j, torch.tensor([1.0, 1.0]), np.ones(2), {}]
NO_COUNTS = [10.0, "8", math.nan, math.inf, [3], True, np.float64(10), torch.tensor(3.0)]

TARGETS = {"target_epsilon": 2.0, "target_delta": 1e-5, "steps": 3}


@pytest.mark.parametrize("name", ["noise_multiplier", "max_grad_norm", "target_epsilon", "target_delta", "epochs"])
@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_must_be_a_number(name: str, value: object) -> None:
    options: dict[str, Any] = {name: value}
    if name not in ("noise_multiplier", "max_grad_norm"):
        options = {**TARGETS, **options}
    if name == "epochs":
        options["steps"] = None
        if value is None:
            with pytest.raises(ValueError, match="either as epochs or as steps"):
                make(**options)
            return
    with pytest.raises(TypeError, match=rf"^{name} must be a number, got .*\.$") as refusal:
        make(**options)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 160


@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
def test_what_must_be_a_whole_number(value: object) -> None:
    model, private, _ = private_run(seeded())
    for name, action in {
        "steps": lambda: make(**{**TARGETS, "steps": value}),
        "batch_size": lambda: GraphedStep(model, private, lambda model, x: model(x).sum(), batch_size=value),  # type: ignore[arg-type]
        "reproducible_seed": lambda: PrivacyEngine(reproducible_seed=value),  # type: ignore[arg-type]
    }.items():
        with pytest.raises(TypeError, match=rf"^{name} must be a whole number, got"):
            action()
    if value == 10.0:
        with pytest.raises(TypeError, match=r"^steps must be a whole number, got 10.0 \(float\): write steps=10\.$"):
            make(**{**TARGETS, "steps": 10.0})


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2), Fraction(2)])
def test_numbers_of_other_kinds_are_taken(value: Any) -> None:
    check_number("x", value)
    make(noise_multiplier=value, max_grad_norm=value)
    check_count("x", np.int64(3))


@pytest.mark.parametrize("epochs", [math.nan, math.inf])
def test_epochs_without_end_are_refused(epochs: float) -> None:
    with pytest.raises(ValueError, match="epochs must be finite"):
        make(**{**TARGETS, "steps": None, "epochs": epochs})


@pytest.mark.parametrize("delta", ["1e-5", None, [1e-5]])
def test_delta_of_the_engine(delta: Any) -> None:
    with pytest.raises(TypeError, match="^delta must be a number"):
        seeded().get_epsilon(delta)


def test_a_list_of_bounds_names_what_shares_one_out() -> None:
    with pytest.raises(TypeError, match=r"max_grad_norm must be a number, got \[1, 1\] \(list\): .*'per_layer'"):
        make(max_grad_norm=[1, 1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", None),
        ("model", "gpt2"),
        ("optimizer", None),
        ("optimizer", "sgd"),
        ("optimizer", torch.optim.SGD),
        ("data_loader", None),
        ("data_loader", [1, 2]),
    ],
)
def test_objects_of_another_class(name: str, value: object) -> None:
    for options in ({}, TARGETS):
        with pytest.raises(TypeError, match=rf"^{name} must be a \w+, got .*: .+\.$"):
            make(**{name: value, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": None}, "target_modules must be a list of names, got None"),
        ({"trainable_modules": 5}, "trainable_modules must be a list of names, got 5"),
        ({"dropout": "0.1"}, "dropout must be a number"),
        ({"dropout": None}, "dropout must be a number"),
        ({"alpha": "8"}, "alpha must be a number, got '8' (str)"),
        ({"alpha": [8]}, "alpha must be a number"),
        ({"rslora": "8"}, "rslora must be True or False, got '8' (str)"),
        ({"rslora": None}, "rslora must be True or False"),
    ],
)
def test_lora_config(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError) as refusal:
        LoRAConfig(**options)
    assert words in str(refusal.value)


DATA = TensorDataset(*examples(20))


@pytest.mark.parametrize(
    "order",
    [
        {"sampler": SequentialSampler(range(8))},
        {"sampler": SequentialSampler(TensorDataset(torch.zeros(20)))},
        {"sampler": RandomSampler(range(8))},
        {"sampler": RandomSampler(DATA, num_samples=8)},
        {"sampler": RandomSampler(DATA, replacement=True)},
        {"sampler": RandomSampler(Subset(DATA, range(8)))},
        {"sampler": [1, 2, 3]},
        {"batch_sampler": BatchSampler(SequentialSampler(DATA), 4, False)},
        {"batch_sampler": [[0, 1], [2]]},
    ],
    ids=lambda order: str(type(next(iter(order.values()))).__name__),
)
def test_an_order_over_other_examples_is_refused(order: dict[str, Any]) -> None:
    options = order if "batch_sampler" in order else {"batch_size": 4, **order}
    with pytest.raises(ValueError, match=r"no sampler of its own.*torch\.utils\.data\.Subset"):
        make(data_loader=DataLoader(DATA, **options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shuffle": True},
        {"drop_last": True},
        {"sampler": RandomSampler(DATA)},
        {"sampler": SequentialSampler(DATA)},
        {"shuffle": True, "generator": torch.Generator()},
    ],
)
def test_a_plain_order_is_taken_and_so_is_a_subset(options: dict[str, Any]) -> None:
    assert make(data_loader=DataLoader(DATA, batch_size=4, **options))[2].sample_rate == 0.2
    assert make(data_loader=DataLoader(Subset(DATA, range(8)), batch_size=4, shuffle=True))[2].sample_rate == 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [({"r": True}, "r must be a whole number"), ({"alpha": math.inf}, "alpha must be finite, got inf")],
)
def test_lora_config_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LoRAConfig(**options)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((None, LoRAConfig()), "model"),
        (("gpt2", LoRAConfig()), "model"),
        ((nn.Linear(3, 3), None), "config"),
        ((nn.Linear(3, 3), {"r": 8}), "config"),
    ],
)
def test_inject_lora(arguments: tuple[Any, Any], name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name} must be a (Module|LoRAConfig), got .*: .+\.$"):
        inject_lora(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        *[
            ({name: value}, ValueError, f"^Unknown {name} ")
            for name in ("clipping", "phases", "loss_reduction")
            for value in (["AB"], {"AB": 1}, None, 3)
        ],
        *[
            ({"low_pass": value}, TypeError, "^low_pass must be a GaussianFilter, a LaplacianFilter or None, got a")
            for value in ("gaussian", 3, [GaussianFilter(1.0)], GaussianFilter)
        ],
        *[
            ({"regulate_noise": value, "phases": "B"}, TypeError, "^regulate_noise must be True or False, got")
            for value in (None, "x", 1)
        ],
    ],
)
def test_choices(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(**options)


@pytest.mark.parametrize("phases", [["A"], None, {"A": 1}])
def test_phases_chosen_later(phases: Any) -> None:
    with pytest.raises(ValueError, match="^Unknown phases"):
        make()[1].set_phases(phases)


@pytest.mark.parametrize("kind", [GaussianFilter, LaplacianFilter])
@pytest.mark.parametrize("strength", ["a", None, True, [1.0]])
def test_strength_of_a_filter(kind: Any, strength: Any) -> None:
    with pytest.raises(TypeError, match="^The filter's strength must be a number, got .*: 0 turns it off"):
        kind(strength)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        *[
            ({"weight": value}, TypeError, "^weight must be a number, got")
            for value in (None, "2", torch.ones(4), torch.tensor(2.0), True)
        ],
        *[
            ({"weight": value}, ValueError, f"^weight must be finite and not 0, got {value}")
            for value in (math.nan, math.inf, -math.inf, 0, 0.0)
        ],
        ({"retain_graph": "no"}, TypeError, "^retain_graph must be True or False"),
    ],
)
def test_backward(options: dict[str, Any], error: type[Exception], words: str) -> None:
    model = mlp()
    optimizer, (x, y) = make_private(model, batch_size=4), examples(4)
    optimizer.batch.expect(4)
    losses = classification_loss(model(x), y)
    with pytest.raises(error, match=words):
        optimizer.backward(losses, **options)
    optimizer.backward(losses, weight=np.float32(-2))  # nothing was lost
    for given, words in (
        ({"mask": [True] * 4}, "^mask must be a bool tensor, got a list"),
        ({"closure": torch.ones(4)}, "^closure must be a function, got a Tensor"),
    ):
        with pytest.raises(TypeError, match=words):
            optimizer.step(**given)
    with pytest.raises(TypeError, match="^do_skip must be True or False"):
        optimizer.signal_skip_step("no")
    optimizer.step()
    assert optimizer.ledger.steps == 1


def test_graphed_step() -> None:
    model, private, _ = private_run(seeded())
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    for arguments, words in (
        ((None, private, len), "model must be a Module"),
        ((model, plain, len), "optimizer must be a PrivateOptimizer"),
        ((model, None, len), "optimizer must be a PrivateOptimizer"),
        ((model, private, None), "loss must be a function"),
    ):
        with pytest.raises(TypeError, match=words):
            GraphedStep(*arguments, batch_size=4)


X, Y, TOKENS, IDS, MASK = (
    torch.randn(4, 3),
    torch.zeros(4).long(),
    torch.randn(2, 3, 5),
    torch.zeros(2, 3).long(),
    torch.ones(4, 3),
)
LOSSES: dict[Any, dict[str, Any]] = {
    classification_loss: {"logits": X, "labels": Y},
    masked_lm_loss: {"logits": TOKENS, "labels": IDS},
    causal_lm_loss: {"logits": TOKENS, "labels": IDS},
    regression_loss: {"predictions": X, "targets": X},
    question_answering_loss: {
        "start_logits": X,
        "end_logits": X,
        "start_positions": Y,
        "end_positions": Y,
        "attention_mask": MASK,
    },
}
EACH = [(loss, name) for loss, arguments in LOSSES.items() for name in arguments]


@pytest.mark.parametrize("value", [None, [0, 1], np.zeros(4), 3.0], ids=repr)
@pytest.mark.parametrize(("loss", "name"), EACH)
def test_losses_take_tensors(loss: Any, name: str, value: Any) -> None:
    loss(**LOSSES[loss])
    with pytest.raises(TypeError, match=rf"^{loss.__name__} takes tensors, got {name} = .*: torch.as_tensor makes one"):
        loss(**{**LOSSES[loss], name: value})


@pytest.mark.parametrize(("loss", "name"), EACH)
def test_losses_take_numbers_of_one_kind(loss: Any, name: str) -> None:
    given = LOSSES[loss][name]
    if given.dtype == torch.int64:
        wrong, words = [given.float(), given.int(), given.bool()], r"must be int64, got torch\.\w+: \.long\(\) makes"
    elif name == "targets":
        wrong, words = [given > 0, given.to(torch.complex64)], r"must be real numbers, got torch\.\w+"
    elif name == "attention_mask":
        return
    else:
        wrong, words = [given.long(), given > 0], r"must be floating-point numbers, got torch\.\w+: \.float\(\) makes"
    for value in wrong:
        with pytest.raises(TypeError, match=rf"^{name} {words}"):
            loss(**{**LOSSES[loss], name: value})


def test_options_of_losses() -> None:
    for smoothing, error in (("a", TypeError), (None, TypeError), (2, ValueError), (-0.1, ValueError), (1, ValueError)):
        with pytest.raises(error, match="^label_smoothing must"):
            classification_loss(X, Y, label_smoothing=smoothing)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"labels \(N, K\), which are probabilities, must be floating-point"):
        classification_loss(X, torch.zeros(4, 3).long())
    with pytest.raises(ValueError, match="^Token losses take"):
        causal_lm_loss(X, Y)


@pytest.mark.parametrize("state", [None, {}, [], "x", {"accountant": "rdp"}])
def test_states(state: Any) -> None:
    with pytest.raises(ValueError, match=r"not the state of an engine, .*engine\.state_dict\(\) returned"):
        PrivacyEngine("rdp").load_state_dict(state)
    optimizer = make()[1]
    with pytest.raises(ValueError, match=r"not the state of an optimizer, .*optimizer\.state_dict\(\) returned"):
        optimizer.load_state_dict(state)
    with pytest.raises(TypeError, match="steps_taken must be a whole number"):
        optimizer.load_state_dict({**optimizer.state_dict(), "steps_taken": "3"})
    with pytest.raises(ValueError, match="steps_taken must be at least 0"):
        optimizer.load_state_dict({**optimizer.state_dict(), "steps_taken": -1})
    optimizer.load_state_dict(optimizer.state_dict())  # before its first step


@pytest.mark.parametrize("seed", [-1, 2**64, 2**70])
def test_seeds_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match="^reproducible_seed must be (at least 0|below 2)"):
        PrivacyEngine(reproducible_seed=seed)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_grad_norm": "inf"}, "max_grad_norm must be a number, not 'inf'"),
        ({"delta": None}, "delta must be a number, not None"),
        ({"rounds": 2.5}, "rounds must be a whole number, not 2.5"),
        ({"rounds": "3"}, "rounds must be a whole number"),
        ({"lr": "fast"}, "lr must be a number"),
        ({"reproducible": "yes"}, "reproducible must be true or false"),
        ({"seed": True}, "seed must be a whole number"),
    ],
)
def test_options_of_a_federated_run(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        RunConfig.from_flat(options)
    assert RunConfig.from_flat({"lr": None, "max_grad_norm": 2, "clients_per_round": 3}).privacy.max_grad_norm == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_model_converted_after_make_private_is_refused_before_a_step_is_spent(dtype: torch.dtype, steps: int) -> None:
    model = mlp()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make(model=model, optimizer=torch.optim.AdamW(trained))[1]
    x, y = examples(4)
    for _ in range(steps):
        take_step(model, optimizer, (x, y))
    model.to(dtype)
    if dtype == torch.float64 and steps == 0:
        take_step(model, optimizer, (x.double(), y))  # nothing has been kept in float32 yet
        assert optimizer.ledger.steps == 1
        return
    with pytest.raises(RuntimeError, match=rf"was torch.float32 when .* and is {dtype} now: convert .* before inject"):
        take_step(model, optimizer, (x.to(dtype), y))
    assert optimizer.ledger.steps == steps
