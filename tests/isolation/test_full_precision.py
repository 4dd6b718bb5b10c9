"""Models in half precision are tried in full: rounding is no influence, and hides none."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_dp import IsolationError, LoRAConfig, inject_lora
from lora_dp.isolation.batches.padding import narrowed, telling_masks
from lora_dp.isolation.check import check_isolation
from lora_dp.isolation.full_precision import in_full_precision
from lora_dp.isolation.trials import Trials
from lora_dp.losses import causal_lm_loss
from tests.isolation.checked_models import Made, passes
from tests.isolation.test_each_trial import neighbourly
from tests.isolation.token_models import refused
from tests.language_models import ATTENTION, FAMILIES, causal_lm, completions, stacked
from tests.models import examples

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_model_of_half_precision_is_taken(family: str) -> None:
    """Its weights are so large that rounding moves values by more than 2 % where a batch has another shape."""
    model = inject_lora(causal_lm(family, torch.bfloat16), LoRAConfig(r=2, target_modules=ATTENTION[family]))
    batch = stacked(completions(6))
    passed = check_isolation(
        model.train(),
        (),
        {"use_cache": False, **{name: values for name, values in batch.items() if name != "labels"}},
        6,
        targets=batch["labels"],
        criterion=lambda outputs, labels: causal_lm_loss(outputs.logits, labels),
    )
    assert passed.padding


@pytest.mark.parametrize("dtype", HALVES)
def test_an_influence_below_its_rounding_is_seen(dtype: torch.dtype) -> None:
    refused("example 0", Made(neighbourly(0, 1, "plain", share=1e-3)).to(dtype), 4, examples(4)[0].to(dtype))
    passes(Made().to(dtype), 4, examples(4)[0].to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_the_model_is_as_it_was_after(dtype: torch.dtype) -> None:
    model = Made().to(dtype)
    model.register_buffer("kept", torch.ones(2, dtype=dtype))
    model.again = model.inner  # tied
    before = [*model.parameters(), *model.buffers()]

    def look(call: Any) -> None:
        assert {tensor.dtype for tensor in [*model.parameters(), *model.buffers(), call]} == {torch.float32}
        assert model.again.weight is model.inner.weight and model.inner.weight.requires_grad
        raise IsolationError("found")

    with pytest.raises(IsolationError, match=r"^found$"):
        in_full_precision(model, torch.ones(2, dtype=dtype), look)
    assert all(now is then for now, then in zip([*model.parameters(), *model.buffers()], before, strict=True))


class Picky(Made):
    """A kernel that takes half precision alone."""

    def forward(self, x: Tensor) -> Any:
        if x.dtype == torch.float32:
            raise TypeError("float32 is not taken")
        return super().forward(x)


def test_a_model_that_takes_half_precision_alone_is_tried_as_it_is() -> None:
    x = examples(4)[0].bfloat16()
    passes(Picky().bfloat16(), 4, x)
    refused("example 0 .*Tried in half precision, .*TypeError", Picky(neighbourly(0, 1, "plain")).bfloat16(), 4, x)


def test_an_error_of_a_model_in_float32_is_its_own() -> None:
    calls = []

    def fails(call: Any) -> None:
        calls.append(call)
        raise TypeError("another")

    with pytest.raises(TypeError, match="another"):
        in_full_precision(nn.Linear(4, 2), torch.ones(1), fails)
    assert len(calls) == 1


@pytest.mark.parametrize("newer", [False, True])
def test_products_are_exact_in_a_trial_and_as_they_were_after(newer: bool) -> None:
    matmul = torch.backends.cuda.matmul
    if newer:
        matmul.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision("high")
    try:
        within = in_full_precision(nn.Linear(4, 2), None, lambda _: matmul.fp32_precision)
        assert (within, matmul.fp32_precision) == ("ieee", "tf32")
        with pytest.raises(IsolationError):
            in_full_precision(nn.Linear(4, 2), None, lambda _: (_ for _ in ()).throw(IsolationError("found")))
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


def test_a_mask_that_tells_of_its_own_width_alone_is_believed_of_no_other() -> None:
    """Questions with a mask, and beside them answers that are padded without one."""
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, 5] = 0
    answers = torch.tensor([[4, 5, 0, 0], [7, 8, 9, 6]])
    tree = {"attention_mask": mask, "answer_ids": answers}
    assert "answer_ids" in {parts[0].name.strip("[]'") for parts in narrowed(tree, 2, masks=telling_masks(tree, 2))}


def test_a_write_to_the_original_of_a_copy_is_refused() -> None:
    model = Made().bfloat16()
    model.centre = nn.Parameter(torch.zeros(6, dtype=torch.bfloat16), requires_grad=False)
    original = model.centre
    model.inner.register_forward_hook(lambda _, __, out: original.data.add_(out.detach().mean(0)) and None)
    refused("writes to its parameter 'centre'", model, 4, examples(4)[0].bfloat16())
    assert not original.any()


def test_no_gradient_is_left_on_an_original() -> None:
    model = Made().bfloat16()
    scales = [nn.Parameter(torch.ones(6, dtype=torch.bfloat16))]
    model.scale, model.after = scales[0], lambda out: out * scales[0]
    passes(model, 4, examples(4)[0].bfloat16())
    assert all(parameter.grad is None for parameter in model.parameters())


class Rounded(Made):
    """Attention by a kernel of half precision alone, with a mask that is kept to."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q = self.inner(x).bfloat16()
        scores = (q @ q.mT).masked_fill(~mask[:, None].bool(), -torch.inf)
        return (scores.softmax(-1) @ q).to(x.dtype)


def test_a_model_that_rounds_by_itself_is_tried_as_it_is() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(4, 30, 6).bfloat16(), torch.arange(30) < torch.tensor([[30], [11], [17], [9]])
    model = Rounded().bfloat16()
    assert check_isolation(model.train(), (x, mask.long()), {}, 4).padding
    model.after = lambda out: out
    calls: list[torch.dtype] = []

    def look(call: Tensor) -> str:
        calls.append(call.dtype)
        call.bfloat16()
        if call.dtype == torch.float32:
            raise IsolationError("rounding")
        return "taken"

    assert in_full_precision(model, torch.ones(2, dtype=torch.bfloat16), look) == "taken"
    assert calls == [torch.float32, torch.bfloat16]


class Caching(Made):
    """Keeps positions in the dtype of what it was last given more of."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = torch.zeros(1, 6, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.positions) < len(x):
            self.positions = self.positions.to(x.dtype).expand(len(x), -1)
            self.made_now = self.positions
        return self.inner(x + self.positions[: len(x)])


def test_what_a_trial_cached_is_gone_after() -> None:
    model = Caching().bfloat16()
    passes(model, 4, examples(4)[0].bfloat16())
    assert model.positions.dtype == torch.bfloat16 and not hasattr(model, "made_now")


def test_a_recurrent_layer_keeps_its_own_weights() -> None:
    torch.manual_seed(0)
    recurrent = nn.GRU(6, 6, batch_first=True).requires_grad_(False).bfloat16()
    before = list(recurrent._flat_weights)
    passes(Made(before=lambda x: recurrent(x)[0]).bfloat16(), 4, torch.randn(4, 5, 6).bfloat16())
    model = Made()
    model.recurrent, model.before = recurrent, lambda x: recurrent(x)[0]
    passes(model.bfloat16(), 4, torch.randn(4, 5, 6).bfloat16())
    assert all(one is other for one, other in zip(recurrent._flat_weights, before, strict=True))


@pytest.mark.parametrize("pass_that_fails", [0, 1, 3, 6, 9])
def test_no_memory_for_copies_is_no_pass(pass_that_fails: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even of a trial that a model may refuse for its size."""
    passes_run, run = [0], Trials.run

    def short(trials: Trials, call: Any, **options: Any) -> Any:
        passes_run[0] += 1
        if passes_run[0] > pass_that_fails and model.inner.weight.dtype == torch.float32:
            raise torch.OutOfMemoryError("no memory")
        return run(trials, call, **options)

    monkeypatch.setattr(Trials, "run", short)
    model = Made(lambda out: out.mean(1)).bfloat16()  # looks at padding
    mask = torch.arange(8) < torch.tensor([[8], [3], [5], [4]])
    with pytest.raises(IsolationError, match="changes with the padding"):
        check_isolation(model.train(), (torch.randn(4, 8, 6).bfloat16() * mask[..., None],), {}, 4, padding_varies=True)


def test_nor_is_none_for_the_copies_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(_: nn.Parameter) -> nn.Parameter:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("lora_dp.isolation.full_precision.stand_in", short)
    passes(Made().bfloat16(), 4, examples(4)[0].bfloat16())


def test_settings_of_products_that_are_read_in_a_forward_can_be() -> None:
    def reads(x: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):  # as around recurrent layers
            assert torch.get_float32_matmul_precision() == "highest"
            return x

    before = torch.backends.cudnn.allow_tf32
    passes(Made(before=reads), 4, examples(4)[0])
    assert torch.backends.cudnn.allow_tf32 == before
