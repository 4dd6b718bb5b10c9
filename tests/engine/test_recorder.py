"""What one pass records, until the private step takes it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import DPLinear, IsolationError
from lora_dp.engine.recorder import Recorder
from tests.models import assert_refuses, examples, mlp
from tests.nn.slots import give
from tests.support import assert_close, make_private


def test_all_leaves_are_known():
    """A loss that comes to one of them beside the model's outputs is refused by them."""
    parameter = nn.Parameter(torch.zeros(3, 6))
    recorder = Recorder()
    assert recorder.leaves() == set()
    recorder.parameters, recorder.trained = {id(parameter): ("p", parameter)}, frozenset({id(parameter)})
    recorder.open(4)
    slot = recorder.slot(parameter)
    leaves = [slot.leaf]
    for slot.method in ("direct", "ghost"):
        leaves += slot.receive(torch.zeros(4, 2, 3), 3, 6)[1:]
    leaves += [
        slot.receive_whole(torch.zeros(4, 2, 6)),
        slot.receive_lookup(torch.zeros(4, 2, dtype=torch.long), torch.float32)[1],
    ]
    assert {id(leaf) for leaf in leaves} == recorder.leaves() and len(recorder.leaves()) == 5


def test_when_less_padding_is_tried():
    """Where widths vary, in the first batch that has some and more than one example."""
    mask = (torch.arange(9) < torch.tensor([9, 4, 3, 6]).unsqueeze(1)).long()
    padded, whole = {"input_ids": mask.clone(), "attention_mask": mask}, {"x": torch.ones(4, 3)}
    recorder = Recorder()
    assert not recorder.padding_untried(padded, 4)
    recorder.expect_padding()
    assert recorder.padding_untried(padded, 4) and not recorder.padding_untried(whole, 4)
    two, alone = ({name: value[:n] for name, value in padded.items()} for n in (2, 1))
    assert recorder.padding_untried(two, 2) and not recorder.padding_untried(alone, 1)
    one_padded = {name: value[1:2] for name, value in padded.items()}
    assert not recorder.padding_untried(one_padded, 1)
    recorder.padding_tried = True
    assert not recorder.padding_untried(padded, 4)


def test_passes_hand_over_what_was_filled():
    parameter = nn.Parameter(torch.zeros(2, 5))
    recorder = Recorder()
    recorder.parameters, recorder.trained = {id(parameter): ("p", parameter)}, frozenset({id(parameter)})
    assert recorder.slot(parameter) is None and not recorder.recording
    recorder.open(2)
    assert recorder.recording
    assert recorder.slot(nn.Parameter(torch.zeros(2))) is None
    give(recorder.slot(parameter), torch.ones(2, 1, 2), torch.ones(2, 1, 5))
    assert recorder.take().slots[id(parameter)].filled
    assert recorder.current is None
    recorder.open(0)
    assert recorder.take().n == 0
    recorder.open(2)
    recorder.discard()
    assert_refuses(RuntimeError, "No per-example gradient was recorded", recorder.take)


def test_what_earlier_losses_were_like_is_forgotten_with_their_batches():
    model, (x, y) = mlp(), examples(4)
    recorder = make_private(model, batch_size=4).recorder

    def backward(constant: float) -> None:
        (constant * F.cross_entropy(model(x), y)).backward()
        recorder.discard()

    backward(1.0)
    assert_refuses(IsolationError, "that of an earlier one", lambda: backward(0.5))
    recorder.discard()
    recorder.forget_batches()
    backward(0.5)


class Packed(nn.Module):
    """Gives its layer rows that are not as many of each example."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = DPLinear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.cat([x, x[:3]])).tanh().mean()


def test_where_a_whole_client_is_protected_a_batch_is_one_gradient():
    model, plain, x = Packed().train(), Packed(), torch.randn(4, 3)
    recorder = make_private(model, batch_size=4).recorder
    recorder.per_example = False
    model(x).backward()
    plain(x).backward()
    slots = {slot.name: slot for slot in recorder.take().slots.values()}
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None and slots[name].norms().shape == (1,)
        assert_close(slots[name].norms()[0], parameter.grad.norm())
    recorder.per_example = True
    assert_refuses(IsolationError, "works on (7, 2) in a batch of 4 examples", lambda: model(x))
