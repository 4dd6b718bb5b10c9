"""Set-up: which parameters are trained, which are refused, and how many examples a call has."""

import copy

import pytest
import torch
from torch import nn

from lora_dp import DPEmbedding, DPLayerNorm, DPLinear, DPLoRALinear, PrivacyEngine
from lora_dp.engine.validation import batch_size, check_optimizer, cover
from tests.models import assert_refuses, examples, mlp, take_step
from tests.support import make_private


def test_every_trainable_parameter_with_its_layer_and_factor():
    model = nn.Sequential(DPLoRALinear(6, 8, r=2), nn.ReLU(), nn.Sequential(DPLayerNorm(8), DPLinear(8, 3)))
    model[2][1].bias.requires_grad_(False)
    assert [(p.name, p.layer, p.factor) for p in cover(model)] == [
        ("0.lora_A", 0, "A"),
        ("0.lora_B", 0, "B"),
        ("2.0.weight", 1, None),
        ("2.0.bias", 1, None),
        ("2.1.weight", 2, None),
    ]


def test_a_module_used_at_two_places_is_one_layer():
    layer = DPLinear(6, 6)
    assert [p.name for p in cover(nn.Sequential(layer, nn.ReLU(), layer))] == ["0.weight", "0.bias"]


def test_a_frozen_stranger_is_no_matter():
    model = nn.Sequential(nn.Conv1d(2, 2, 1).requires_grad_(False), DPLinear(6, 3))
    assert [p.name for p in cover(model)] == ["1.weight", "1.bias"]


@pytest.mark.parametrize("inside", ["private", "plain"])
def test_tied_parameters_are_refused_by_both_names(inside):
    """The plain module's use would be missing from the recorded gradient."""
    head = DPLinear if inside == "private" else nn.Linear
    model = nn.Sequential(DPEmbedding(9, 4), head(4, 9, bias=False))
    model[1].weight = model[0].weight
    assert_refuses(ValueError, "'1.weight' and '0.weight' are one parameter", lambda: cover(model))


def test_unfrozen_base_weight_is_refused():
    model = mlp()
    model[0].weight.requires_grad_(True)
    assert_refuses(ValueError, "'0.weight' is the frozen weight under an adapter", lambda: cover(model))


@pytest.mark.parametrize(
    "stranger", [nn.Linear(3, 3), nn.Conv1d(3, 3, 1), nn.LayerNorm(3), nn.Embedding(3, 3), nn.PReLU()]
)
def test_uncovered_parameter_is_refused_by_name(stranger):
    model = nn.ModuleDict({"adapter": DPLoRALinear(6, 3, r=2), "tail": nn.ModuleDict({"extra": stranger})})
    assert_refuses(
        ValueError, "'tail.extra.weight' is trainable but no private layer covers it: freeze it", lambda: cover(model)
    )


def test_parameter_of_the_model_itself_is_refused_by_name():
    model = mlp()
    model.register_parameter("temperature", nn.Parameter(torch.ones(())))
    assert_refuses(ValueError, "'temperature' is trainable", lambda: cover(model))


def test_nothing_to_train_is_refused():
    assert_refuses(ValueError, "inject adapters with inject_lora first", lambda: cover(mlp().requires_grad_(False)))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_batch_norm_is_refused_by_name_unless_nothing_of_it_can_move(norm):
    for layer in (
        norm(3),
        norm(3).requires_grad_(False),
        norm(3).eval(),
        norm(3, affine=False),
        norm(3, track_running_stats=False).requires_grad_(False).eval(),
    ):
        model = nn.Sequential(DPLinear(6, 3), nn.Sequential(layer))
        assert_refuses(ValueError, f"'1.0' is a {norm.__name__}", lambda m=model: cover(m))
    for layer in (norm(3).requires_grad_(False).eval(), norm(3, affine=False).eval()):
        assert [p.name for p in cover(nn.Sequential(DPLinear(6, 3), nn.Sequential(layer)))] == ["0.weight", "0.bias"]


class FrozenBody(nn.Module):
    """A head behind an adapter and a frozen BatchNorm with statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.head = DPLinear(6, 5), nn.BatchNorm1d(5).requires_grad_(False), DPLinear(5, 3)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        self.norm.eval()

    def forward(self, x):
        return self.head(self.norm(self.body(x)).tanh())


def test_gradients_behind_a_frozen_batch_norm_are_those_of_each_example_alone():
    model, (x, y) = FrozenBody(), examples(5)
    reference = copy.deepcopy(model)
    released = take_step(model, make_private(model, batch_size=5, max_grad_norm=1e6), (x, y))
    for i in range(5):
        nn.functional.cross_entropy(reference(x[i : i + 1]), y[i : i + 1]).backward()
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(released[name], parameter.grad, rtol=1e-5, atol=1e-6)


def test_a_model_that_is_evaluated_is_made_private_as_one_that_trains():
    """What else is frozen and in evaluation is no BatchNorm."""
    model = nn.Sequential(nn.Linear(6, 6).requires_grad_(False), nn.Dropout(), FrozenBody()).eval()
    recorder = make_private(model, batch_size=5).recorder
    assert [name for name, _ in recorder.frozen_norms] == ["2.norm"]


@pytest.mark.parametrize(
    "thaw",
    [
        lambda model: model.train(),
        lambda model: model.norm.requires_grad_(True),
        lambda model: setattr(model.norm, "running_mean", None),
    ],
)
def test_a_batch_norm_that_is_frozen_no_more_is_refused_at_the_next_pass(thaw):
    model, batch = FrozenBody(), examples(5)
    optimizer = make_private(model, batch_size=5)
    take_step(model, optimizer, batch)
    mean = model.norm.running_mean.clone()
    thaw(model)
    assert_refuses(RuntimeError, "'norm' is a BatchNorm1d that was frozen", lambda: model(batch[0]))
    assert_refuses(RuntimeError, "call .eval() on every BatchNorm after model.train()", lambda: model(batch[0]))
    model.norm.requires_grad_(False).eval().running_mean = mean
    take_step(model, optimizer, batch)
    assert torch.equal(model.norm.running_mean, mean) and optimizer.ledger.steps == 2


def test_an_isolation_check_of_ones_own_leaves_a_frozen_batch_norm_in_eval():
    model, batch = FrozenBody().eval(), examples(5)
    engine = PrivacyEngine("rdp")
    make_private(model, batch_size=5, engine=engine)
    engine.check_isolation(model, batch[0])
    assert not model.training and int(model.norm.num_batches_tracked) == 0


def test_optimizer_may_hold_frozen_but_no_uncovered_parameters():
    model = mlp()
    covered = {id(p.parameter): p for p in cover(model)}
    check_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), covered)
    stranger = nn.Parameter(torch.zeros(4, 9))
    optimizer = torch.optim.SGD([{"params": [model[2].weight]}, {"params": [stranger]}], lr=0.1)
    assert_refuses(ValueError, "shape (4, 9)", lambda: check_optimizer(optimizer, covered))
    stranger.requires_grad_(False)
    check_optimizer(optimizer, covered)


@pytest.mark.parametrize(
    ("args", "kwargs", "n"),
    [
        ((torch.zeros(5, 2),), {}, 5),
        ((torch.zeros(5),), {}, 5),
        (({"x": torch.zeros(4, 2)}, torch.zeros(7)), {}, 4),
        ((), {"x": torch.zeros(3, 2)}, 3),
        ((), {"labels": torch.zeros(9), "input_ids": torch.zeros(2, 4)}, 2),
        ((), {"temperature": torch.ones(()), "pixel_values": torch.zeros(6, 1, 2, 2)}, 6),
        ((), {"input_ids": None, "position_ids": torch.zeros(1, 4), "inputs_embeds": torch.zeros(8, 4, 2)}, 8),
        ((torch.zeros(0, 2),), {}, 0),
    ],
)
def test_number_of_examples(args, kwargs, n):
    assert batch_size(args, kwargs) == n


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((3, "x"), {"y": None}), ((torch.ones(()),), {})])
def test_call_without_a_batch_is_refused(args, kwargs):
    assert_refuses(ValueError, "called without a tensor", lambda: batch_size(args, kwargs))
