"""Every op of torch that draws on a CPU: refused from a seed inside a forward, and still where nothing may draw."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_dp.privacy import cpu_draws, secret_state
from tests.drawing_calls import DRAWING, REFUSED, forward, moves, seeded
from tests.drawing_ops import FOR_OTHER_DEVICES, NO_OPS, WITHOUT_DRAWS, call, schemas, takes_generator


@pytest.fixture(autouse=True)
def secret() -> Iterator[None]:
    with secret_state.secret_generators():
        yield


# What there is


def test_schemas_still_say_what_draws():
    """Else torch has learnt to say it otherwise."""
    assert not set(FOR_OTHER_DEVICES) & WITHOUT_DRAWS.keys()
    assert {"aten::bernoulli_.float", "aten::normal.Tensor_Tensor_out", "aten::binomial"} <= DRAWING.keys()
    assert len(DRAWING) > 100


@pytest.mark.parametrize("name", NO_OPS)
def test_what_is_no_op_cannot_be_dispatched(name):
    try:
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    except RuntimeError as error:
        assert "does not exist" in str(error)


@pytest.mark.parametrize("name", [name for name in FOR_OTHER_DEVICES if name in schemas()])
def test_what_is_for_other_devices_has_no_kernel_for_this_one(name):
    for key in ("CPU", "CompositeImplicitAutograd"):
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd"):
        # Made of the op without out, or of none.
        base = name.rpartition(".")[0] or name
        assert (
            name.endswith(".out")
            and base in FOR_OTHER_DEVICES
            or name in ("aten::_scaled_dot_product_fused_attention_overrideable", "rngprims::philox_rand")
        )


def test_attention_without_dropout_alone_has_a_kernel_of_its_own():
    x = torch.ones(2, 2, 4, 8)
    with pytest.raises(RuntimeError, match="dropout"):
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x, 0.5)


@pytest.mark.parametrize("name", DRAWING)
def test_each_kernel_for_the_cpu_that_draws_is_replaced_or_asks_first(name):
    """Not only the calls that are tried below: whatever the arguments."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU") and name != "aten::native_dropout":
        [line] = re.findall(r"(?m)^CPU: registered at (.*?):\d+ ::", torch._C._dispatch_dump(name))
        assert line == cpu_draws.__file__
    # Other layouts of a CPU's tensors, all of which draw by one of those above.
    keys = set(re.findall(rf"(?m)^({LAYOUTS})\b.*: registered", torch._C._dispatch_dump(name)))
    assert keys <= OTHER_LAYOUTS.get(name, {}).keys()


LAYOUTS = "SparseCPU|SparseCsrCPU|NestedTensorCPU|QuantizedCPU|MkldnnCPU|CompositeImplicitAutogradNestedTensor"
NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
OTHER_LAYOUTS: dict[str, dict[str, Callable[[], Any]]] = {
    "aten::normal_": {
        "SparseCsrCPU": lambda: torch.eye(3).to_sparse_csr().normal_(),
        "NestedTensorCPU": lambda: NESTED.normal_(),
    },
    "aten::native_dropout": {"NestedTensorCPU": lambda: torch.native_dropout(NESTED, 0.5, True)},
    "aten::randn_like": {"CompositeImplicitAutogradNestedTensor": lambda: torch.randn_like(NESTED)},
    "aten::randn_like.generator": {
        "CompositeImplicitAutogradNestedTensor": lambda: torch.ops.aten.randn_like.generator(NESTED, generator=None)
    },
}
CALLS: dict[str, Callable[[], Any]] = {name: call(schema) for name, schema in DRAWING.items()} | {
    f"{name} {key}": draw for name, layouts in OTHER_LAYOUTS.items() for key, draw in layouts.items()
}

# Refused


@pytest.mark.parametrize("name", CALLS)
def test_a_seed_inside_a_forward_is_refused_whatever_draws(name):
    draw = CALLS[name]
    with seeded():
        assert moves(draw, torch.default_generator)  # so that it is a draw that is refused
    with forward():
        assert moves(draw, torch.default_generator)
        with seeded(), pytest.raises(RuntimeError, match=REFUSED):
            draw()
        with seeded(), torch.inference_mode(), pytest.raises(RuntimeError, match=REFUSED):
            draw()


@pytest.mark.parametrize("name", [name for name, schema in DRAWING.items() if takes_generator(schema)])
def test_a_generator_of_the_models_own_is_refused_whatever_draws(name):
    own = torch.Generator().manual_seed(7)
    draw = call(DRAWING[name], generator=own)
    assert moves(draw, own)
    with forward(), pytest.raises(RuntimeError, match=REFUSED):
        draw()


@pytest.mark.parametrize("name", DRAWING)
def test_a_seed_outside_of_a_forward_gives_the_same_values_again(name):
    def drawn(seed: int) -> list[Tensor]:
        with seeded(seed):
            return [leaf for leaf in pytree.tree_leaves(call(DRAWING[name])()) if isinstance(leaf, Tensor)]

    assert all(torch.equal(one, other) for one, other in zip(drawn(1), drawn(1), strict=True))
    # Among 12 numbers or more: of an order of six, five seeds are enough.
    assert any(
        not torch.equal(one, other) for seed in range(2, 7) for one, other in zip(drawn(1), drawn(seed), strict=True)
    )


def test_bernoulli_into_another_tensor_is_that_of_the_secret_key(monkeypatch):
    state, p = torch.get_rng_state(), torch.full((4, 50), 0.5)
    drawn = torch.bernoulli(p, out=torch.empty(0, dtype=torch.float64))
    assert drawn.shape == p.shape and drawn.dtype == torch.float64 and 0 < drawn.mean() < 1
    torch.set_rng_state(state)
    assert torch.equal(torch.bernoulli(p), drawn.float())
    torch.set_rng_state(state)
    monkeypatch.setattr(cpu_draws, "_secret_key", lambda: None)
    assert not torch.equal(torch.bernoulli(p, out=torch.empty(0)), drawn.float())
