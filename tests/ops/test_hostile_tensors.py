"""Hostile tensors and options given to the ops: refused with nothing changed, or the work is done, and nothing else."""

import math
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_dp.kernels.optimizer_rows import adam_row, sgd_row
from lora_dp.ops.private_update import ExampleSum, private_update_
from lora_dp.ops.rounded_gaussian import rounded_gaussian_
from tests.ops.hostile_values import BAD_DRAWS, BAD_KEYS, FILLING, HOSTILE_FLOATS, KEY, REFUSALS, accepts, arguments

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MARGIN = 64


def amid(values: Tensor) -> Tensor:
    """A copy of these values amid a larger storage."""
    storage = torch.full((values.numel() + 2 * MARGIN,), 3, dtype=values.dtype)
    storage[MARGIN : MARGIN + values.numel()] = values.flatten()
    return storage[MARGIN : MARGIN + values.numel()].view(values.shape)


def storage_of(tensor: Tensor) -> np.ndarray:
    """All bytes behind a tensor."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage()).numpy()


class Step:
    """A valid update of three parameters by :func:`private_update_`; every tensor lies amid a larger storage."""

    def __init__(self, optimizer: str, dtype: torch.dtype, *, examples: bool, noisy: bool, strength: float):
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return amid(torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype))

        shapes = [(5, 3), (7,), (2, 2)]
        n = (4,) if examples else ()
        self.lists: dict[str, list[Any]] = {
            "parameters": [random(*shape) for shape in shapes],
            "sums": [random(*n, *shape, dtype=torch.float32) for shape in shapes],
            "coefficients": [random(*n, dtype=torch.float64) for _ in shapes] if examples else [],
            "first": [] if optimizer == "sgd" else [random(*shape) for shape in shapes],
            "second": [random(*shape) for shape in shapes] if optimizer.startswith("adam") else [],
            "gradients": [random(*shape) for shape in shapes],
        }
        row = adam_row(0.1, step=2, weight_decay=0.1) if optimizer.startswith("adam") else sgd_row(0.1, momentum=0.9)
        self.hyper: Any = [list(row) for _ in shapes]
        self.options: dict[str, Any] = {
            "optimizer": optimizer,
            "key": KEY,
            "draw": 3,
            "scale": 2.0**31 if noisy else 0.0,
            "step": 2.0**-31,
            "expected_batch_size": 4.0,
            "filtered": [True, False, True],
            "filter_strength": strength,
        }
        self.tensors = [tensor for values in self.lists.values() for tensor in values]
        self.before = [storage_of(tensor).copy() for tensor in self.tensors]

    def take(self) -> None:
        lists = dict(self.lists)
        kept = lists.pop("coefficients")
        if kept:
            lists["sums"] = [ExampleSum(*pair) for pair in zip(lists["sums"], kept, strict=True)]
        private_update_(*lists.values(), self.hyper, **self.options)

    def unchanged(self) -> bool:
        return all(
            (storage_of(tensor) == before).all() for tensor, before in zip(self.tensors, self.before, strict=True)
        )

    def unchanged_outside(self) -> bool:
        """Whether inputs, and what surrounds the other tensors, are as they were."""
        inputs = {id(tensor) for name in ("sums", "coefficients") for tensor in self.lists[name]}
        for tensor, before in zip(self.tensors, self.before, strict=True):
            same = (storage_of(tensor) == before).reshape(-1, tensor.element_size())
            if not (same.all() if id(tensor) in inputs else same[:MARGIN].all() and same[-MARGIN:].all()):
                return False
        return True


STEPS = st.builds(
    Step,
    st.sampled_from(["sgd", "momentum", "adam", "adamw"]),
    st.sampled_from(DTYPES),
    examples=st.booleans(),
    noisy=st.booleans(),
    strength=st.sampled_from([0.0, 0.7]),
)


@settings(max_examples=40, deadline=None)
@given(step=STEPS)
def test_a_step_writes_inside_its_tensors_alone(step: Step) -> None:
    step.take()
    assert step.unchanged_outside()
    assert not step.unchanged()


DAMAGES: dict[str, Callable[[Tensor], Any]] = {
    "integers": lambda t: t.to(torch.int32),
    "complex": lambda t: t.to(torch.complex64),
    "flags": lambda t: t > 0,
    "quarter precision": lambda t: t.to(torch.float8_e4m3fn),
    "one less": lambda t: t.flatten()[:-1],
    "a dimension more": lambda t: t.unsqueeze(0),
    "no element": lambda t: t[:0],
    "a number": lambda t: t.flatten()[0],
    "every other one": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t.flatten()[:1].expand(t.numel()).view(t.shape) if t.dim() == 1 else t[:1].expand(t.shape),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "oneDNN's": lambda t: t.float().to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t.flatten()], layout=torch.jagged),
    "list": lambda t: t.tolist(),
    "array": lambda t: t.double().numpy(),
    "none": lambda t: None,
    "type": lambda t: Tensor,
}
if torch.cuda.is_available():
    DAMAGES["on a GPU"] = lambda t: t.cuda()


@pytest.mark.parametrize("name", ["parameters", "sums", "coefficients", "first", "second", "gradients"])
@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_tensor_that_does_not_fit_is_refused_and_nothing_changes(damage: str, name: str) -> None:
    for p, examples in [(0, True), (2, True), (1, False)]:
        step = Step("adam", torch.float32, examples=examples, noisy=True, strength=0.7)
        if step.lists[name]:
            step.lists[name][p] = DAMAGES[damage](step.lists[name][p])
            with pytest.raises((*REFUSALS, NotImplementedError)):  # torch's own for kinds that no op knows
                step.take()
            assert step.unchanged()


def bad_options() -> Iterator[tuple[str, st.SearchStrategy[Any]]]:
    yield "optimizer", st.sampled_from(["", "SGD", "adagrad", None, 0, b"sgd", ["sgd"]])
    yield "draw", BAD_DRAWS
    yield "scale", st.one_of(HOSTILE_FLOATS, st.floats(0, 1, exclude_min=True, exclude_max=True))
    yield "step", HOSTILE_FLOATS
    yield "expected_batch_size", HOSTILE_FLOATS
    yield "filtered", st.sampled_from([None, [], [True], [True] * 3, [False] * 4, True])
    yield "filter_strength", HOSTILE_FLOATS.filter(lambda s: not (isinstance(s, float) and 1e3 < s < math.inf))
    yield "key", BAD_KEYS


OPTIONS = dict(bad_options())


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(step=STEPS, name=st.sampled_from(sorted(OPTIONS)), data=st.data())
def test_options_out_of_range_change_nothing(step: Step, name: str, data: st.DataObject) -> None:
    step.options[name] = data.draw(OPTIONS[name])
    try:
        step.take()
    except (*REFUSALS, RuntimeError):  # RuntimeError: torch's, of an argument that no schema takes
        assert step.unchanged()
    else:
        assert step.unchanged_outside()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "0.1", 1j, 10**400, [1.0]])
def test_hyperparameters_that_are_not_finite_change_nothing(value: Any, optimizer: str) -> None:
    step = Step(optimizer, torch.float32, examples=True, noisy=True, strength=0.0)
    step.hyper[2][0] = value
    with pytest.raises(REFUSALS):
        step.take()
    assert step.unchanged()


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    step=STEPS,
    where=st.sampled_from(["sums", "coefficients"]),
    p=st.integers(0, 2),
    element=st.integers(0, 3),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_sums_that_are_not_finite(step: Step, where: str, p: int, element: int, value: float) -> None:
    assume(step.lists[where])
    step.lists[where][p].view(-1)[element] = value
    step.before = [storage_of(tensor).copy() for tensor in step.tensors]
    try:
        step.take()
    except REFUSALS:
        assert step.unchanged()
    else:
        assert step.lists["coefficients"], "an accumulated sum was accepted"
        assert step.unchanged_outside()


class Subclass(Tensor):
    pass


# Of the same value as the tensor, which is zero for the last.
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "requires grad": lambda t: t.requires_grad_(),
    "parameter": lambda t: torch.nn.Parameter(t),
    "subclass": lambda t: t.as_subclass(Subclass),
    "negated": lambda t: torch._neg_view(t.neg()),
    "lazy copy": lambda t: torch._lazy_clone(t),
    "no storage": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
}


@pytest.mark.parametrize("name", ["parameters", "sums", "coefficients", "second"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_other_kinds_of_tensors_are_refused_or_give_the_same_bits(kind: str, name: str) -> None:
    step, plain = (Step("adam", torch.float32, examples=True, noisy=True, strength=0.0) for _ in range(2))
    if kind == "no storage":
        step.lists[name][0].zero_()
        plain.lists[name][0].zero_()
    step.lists[name][0] = KINDS[kind](step.lists[name][0])
    with torch.no_grad():
        plain.take()
        try:
            step.take()
        except (*REFUSALS, RuntimeError):
            assert kind in ("negated", "no storage")
            return
    for left, right in zip(step.lists["parameters"], plain.lists["parameters"], strict=True):
        assert torch.equal(left, right)


def test_no_examples_are_a_step_of_noise() -> None:
    step, plain = (Step("sgd", torch.float32, examples=True, noisy=True, strength=0.0) for _ in range(2))
    step.lists["sums"] = [values[:0] for values in step.lists["sums"]]
    step.lists["coefficients"] = [values[:0] for values in step.lists["coefficients"]]
    for values in plain.lists["coefficients"]:
        values.zero_()
    step.take()
    plain.take()
    for left, right in zip(step.lists["parameters"], plain.lists["parameters"], strict=True):
        assert torch.equal(left, right)


def test_many_absurd_examples_end_in_a_finite_number() -> None:
    """Each stops at the grid's end, 2⁵¹ steps; so many of them pass 2⁶³."""
    theta = torch.zeros(3)
    total = ExampleSum(torch.full((5000, 3), 1e30), torch.ones(5000, dtype=torch.float64))
    private_update_(
        [theta],
        [total],
        [],
        [],
        [],
        [sgd_row(1.0)],
        optimizer="sgd",
        key=KEY,
        draw=0,
        scale=2.0**20,
        step=2.0**-20,
        expected_batch_size=1.0,
        filtered=[False],
        filter_strength=0.0,
    )
    assert theta.isfinite().all()


@pytest.mark.parametrize("mode", ["inside", "outside"])
def test_inference_tensors(mode: str) -> None:
    with torch.inference_mode():
        step = Step("adam", torch.float32, examples=False, noisy=True, strength=0.0)
        if mode == "inside":
            step.take()
    if mode == "inside" or accepts(step.take):
        assert step.unchanged_outside()
    else:
        assert step.unchanged()


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize("examples", [False, True])
def test_what_is_only_read_may_lie_in_read_only_memory(examples: bool, tmp_path: Path) -> None:
    """A write there would be the end of the process."""
    step, plain = (Step("adamw", torch.float32, examples=examples, noisy=True, strength=0.7) for _ in range(2))
    for name in ("sums", "coefficients"):
        for p, tensor in enumerate(step.lists[name]):
            path = tmp_path / f"{name}{p}"
            path.write_bytes(tensor.contiguous().numpy().tobytes())
            with path.open("rb") as file:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            step.lists[name][p] = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
    step.take()
    plain.take()
    for left, right in zip(step.lists["parameters"], plain.lists["parameters"], strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", ["", "key", "parameter", "draw", "scale"])
@settings(max_examples=40, deadline=None)
@given(data=st.data(), shape=st.sampled_from([(), (0,), (1,), (7,), (3, 5), (600, 3)]))
def test_rounded_gaussian(name: str, data: st.DataObject, shape: tuple[int, ...]) -> None:
    of_native = (
        {each: values[each] for each in ("key", "parameter", "draw", "scale")}
        for values in FILLING["rounded_gaussians"]
    )
    chosen, worst = arguments(data.draw, *of_native, name)
    out = amid(torch.full(shape, 2**62))
    before = storage_of(out).copy()
    try:
        rounded_gaussian_(out, **chosen)
    except (*REFUSALS, RuntimeError):
        assert worst
        assert (storage_of(out) == before).all()
        return
    assert worst <= {"scale"} and 1 <= chosen["scale"] < 2**33
    same = (storage_of(out) == before).reshape(-1, 8)
    assert same[:MARGIN].all() and same[-MARGIN:].all()
    assert bool((out != 2**62).all())


@pytest.mark.parametrize(
    "damage", sorted(DAMAGES.keys() - {"one less", "a dimension more", "no element", "a number", "meta"})
)
def test_rounded_gaussian_refuses_other_tensors(damage: str) -> None:
    out = amid(torch.full((5, 3), 9))
    before = storage_of(out).copy()
    with pytest.raises((*REFUSALS, RuntimeError)):
        rounded_gaussian_(DAMAGES[damage](out), KEY, 0, 0, 1.0)
    assert (storage_of(out) == before).all()
