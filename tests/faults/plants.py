"""What plants each fault of the engine, as small as a real mistake.

On a CPU most steps are taken by the native update (:mod:`lora_dp.engine.fused_step`), the others by torch
(``PrivateOptimizer._step_by_torch``): a fault of the noise is planted in both. Clipping is planted in what the CPU
runs, not in the Triton kernels.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from timm.models import swin_transformer
from torch import Tensor, nn
from torch.nn import functional as F

import lora_dp.engine.data_loader
import lora_dp.engine.engine
import lora_dp.engine.fused_step
import lora_dp.engine.hooks
import lora_dp.engine.optimizer
import lora_dp.engine.validation
import lora_dp.nn.per_example
import lora_dp.ops.per_example_grad
import lora_dp.privacy.clipping
import lora_dp.privacy.randomness
from lora_dp import DPLoRALinear, GaussianFilter, LoRAConfig, inject_lora
from lora_dp.engine.logical_batch import Clipped
from lora_dp.engine.optimizer import PrivateOptimizer
from lora_dp.engine.validation import PrivateParameter
from lora_dp.nn.per_example import PassRecorder, Slot
from lora_dp.privacy.accounting import PoissonGaussian
from lora_dp.privacy.adaptive_clipping import AdaptiveClipping, QuantileClipping
from lora_dp.privacy.clipping import FlatClipping, PerLayerClipping
from lora_dp.privacy.mechanism import Mechanism, total
from lora_dp.privacy.randomness import SeededSource
from lora_dp.privacy.sampling import PoissonSampler
from tests.faults.planting import Planting
from tests.models import examples, mlp
from tests.support import make_private
from tests.tiny_models import build

# Clipping


def no_clipping(planting: Planting) -> None:
    planting.replace(FlatClipping, "coefficients", lambda _: lambda self, sq_norms, *rest: torch.ones_like(sq_norms))


def clip_the_batch(planting: Planting) -> None:
    def planted(clip: Any) -> Any:
        def whole(self: PrivateOptimizer, finished: Any, mask: Tensor | None) -> Clipped:
            sums = {key: total(part) for key, part in clip(self, finished, mask).sums.items()}
            norm = math.sqrt(sum(float(part.square().sum()) for part in sums.values()))
            scale = min(1.0, self.mechanism.rule.max_grad_norm / norm)
            return Clipped({key: scale * part for key, part in sums.items()}, 0)

        return whole

    no_clipping(planting)
    planting.replace(PrivateOptimizer, "clip", planted)


def whole_bound_for_each_layer(planting: Planting) -> None:
    def planted(self: PerLayerClipping, sq_norms: Tensor, layers: Tensor, layer_count: int) -> Tensor:
        by_layer = sq_norms.new_zeros(layer_count, sq_norms.shape[1]).index_add_(0, layers, sq_norms)
        return (self.max_grad_norm / by_layer.sqrt()).clamp(max=1.0)[layers]

    planting.replace(PerLayerClipping, "coefficients", lambda _: planted)


def quantile_for_nothing(planting: Planting) -> None:
    planting.replace(AdaptiveClipping, "gradient_noise", lambda _: lambda self, noise_multiplier: noise_multiplier)


def count_without_noise(planting: Planting) -> None:
    planting.replace(QuantileClipping, "released", lambda _: lambda self, count: float(count))


def views_summed_after_the_clip(planting: Planting) -> None:
    """The batch's number of examples stays right, as whoever forgets the mean alone would leave it."""

    def planted(open_pass: Any) -> Any:
        def by_row(self: PassRecorder, rows: int) -> None:
            views, self.views = self.views, 1
            open_pass(self, rows)
            self.views = views

        return by_row

    def counted(take: Any) -> Any:
        return lambda self, clipped, *rows: take(self, clipped, *(number // self.views for number in rows))

    planting.replace(PassRecorder, "open", planted)
    planting.replace(PrivateOptimizer, "take", counted)


def nan_passes(planting: Planting) -> None:
    planting.replace(
        lora_dp.privacy.clipping, "_exclude_non_finite", lambda _: lambda coefficients, sq_norms: coefficients
    )


def norms_in_float16(planting: Planting) -> None:
    """The squares and their sum: 65504 is the largest number there is, and what overflows is put at that."""

    def planted(norms: Any) -> Any:
        return lambda self: norms(self).half().square().nan_to_num(posinf=65504.0).sqrt().float()

    planting.replace(Slot, "norms", planted)


def squares_in_float32(planting: Planting) -> None:
    """Of each number that is summed: below 1e-23 they are 0."""
    for place in (lora_dp.nn.per_example, lora_dp.ops.per_example_grad):
        planting.replace(
            place, "example_norms", lambda _: lambda values: values.flatten(1).float().square().sum(1).double().sqrt()
        )


# Noise


def half_the_noise(planting: Planting) -> None:
    planting.replace(Mechanism, "noise_std", lambda std: lambda self, size: std(self, size) / 2)


def noise_before_the_sum(planting: Planting) -> None:
    """On each example's gradient, a 1/√L of the deviation, so that it is right for a batch of the expected size."""

    def planted(clip: Any) -> Any:
        def noisy(self: PrivateOptimizer, finished: Any, mask: Tensor | None) -> Clipped:
            clipped, mechanism = clip(self, finished, mask), self.mechanism
            std = mechanism.noise_multiplier * mechanism.rule.sensitivity / math.sqrt(self.expected_batch_size)
            return Clipped(
                {
                    key: total(part) + std * torch.randn(finished.n, *total(part).shape, dtype=torch.float64).sum(0)
                    for key, part in clipped.sums.items()
                },
                clipped.non_finite,
            )

        return noisy

    planting.replace(PrivateOptimizer, "clip", planted)
    planting.replace(Mechanism, "noise_std", lambda _: lambda self, size: 0.0)


@contextlib.contextmanager
def _given(optimizer: PrivateOptimizer, mechanism: Any) -> Iterator[None]:
    """Another mechanism, which users cannot set."""
    before = optimizer.mechanism
    vars(optimizer)["_mechanism"] = mechanism
    try:
        yield
    finally:
        vars(optimizer)["_mechanism"] = before


def _silent(mechanism: Mechanism) -> Mechanism:
    return Mechanism(mechanism.rule, 0.0, mechanism.source)


def noise_only_on(planting: Planting, noisy: Callable[[PrivateParameter, Sequence[PrivateParameter]], bool]) -> None:
    """Noise for the parameters of a step for which ``noisy`` (parameter, all of this step) says so."""

    def native(step: Any) -> Any:
        def planted(optimizer: Any, trained: Any, sums: Any, mechanism: Mechanism, *rest: Any) -> None:
            for p, value in zip(trained, sums, strict=True):
                step(optimizer, [p], [value], mechanism if noisy(p, trained) else _silent(mechanism), *rest)

        return planted

    def by_torch(step: Any) -> Any:
        def planted(self: PrivateOptimizer, trained: Any, sums: Any) -> None:
            mechanism = self.mechanism

            def release(values: Sequence[Tensor]) -> list[Tensor]:
                released = mechanism.release(values)
                return [
                    new if noisy(p, trained) else old for p, new, old in zip(trained, released, values, strict=True)
                ]

            with _given(self, SimpleNamespace(release=release, noise_std=mechanism.noise_std)):
                step(self, trained, sums)

        return planted

    planting.replace(lora_dp.engine.fused_step, "_native_step", native)
    planting.replace(PrivateOptimizer, "_step_by_torch", by_torch)


def silent_release(planting: Planting, when: Callable[[PrivateOptimizer], bool]) -> None:
    """No noise on the releases for which ``when`` says so."""

    def planted(release: Any) -> Any:
        def silent(self: PrivateOptimizer) -> None:
            mechanism = _silent(self.mechanism) if when(self) else self.mechanism
            with _given(self, mechanism):
                release(self)

        return silent

    planting.replace(PrivateOptimizer, "_release", planted)


def no_noise_on_padded_batches(planting: Planting) -> None:
    padded: dict[int, bool] = {}

    def planted(clip: Any) -> Any:
        def noted(self: PrivateOptimizer, finished: Any, mask: Tensor | None) -> Clipped:
            padded[id(self)] = mask is not None and not bool(mask.all())
            return clip(self, finished, mask)

        return noted

    planting.replace(PrivateOptimizer, "clip", planted)
    silent_release(planting, lambda optimizer: padded.get(id(optimizer), False))


def no_noise_on_accumulated_batches(planting: Planting) -> None:
    parts: set[int] = set()

    def planted(take: Any) -> Any:
        def noted(self: PrivateOptimizer, *clipped: Any) -> None:
            if self.batch.more_follows:
                parts.add(id(self))
            take(self, *clipped)

        return noted

    planting.replace(PrivateOptimizer, "take", planted)
    silent_release(planting, lambda optimizer: id(optimizer) in parts)


def noise_for_each_micro_batch(planting: Planting) -> None:
    def planted(take: Any) -> Any:
        def noisy(self: PrivateOptimizer, clipped: Clipped, *counts: int) -> None:
            released = self.mechanism.release([total(part) for part in clipped.sums.values()])
            take(self, Clipped(dict(zip(clipped.sums, released, strict=True)), clipped.non_finite), *counts)

        return noisy

    planting.replace(PrivateOptimizer, "take", planted)


def same_noise_after_resuming(planting: Planting) -> None:
    def planted(self: SeededSource, state: dict[str, Tensor]) -> None:
        self._next = 0

    planting.replace(SeededSource, "load_state_dict", lambda _: planted)


def same_noise_in_each_layer(planting: Planting) -> None:
    def native(update: Any) -> Any:
        def planted(*tensors: Any, filtered: Sequence[bool], **options: Any) -> None:
            for p in range(len(tensors[0])):
                part = slice(p, p + 1)
                update(*(values[part] for values in tensors), filtered=filtered[part], **options)

        return planted

    planting.replace(lora_dp.engine.fused_step, "private_update_", native)
    planting.replace(
        lora_dp.privacy.randomness,
        "rounded_gaussian_",
        lambda draw: lambda out, key, parameter, number, scale: draw(out, key, 0, number, scale),
    )


def filter_before_the_noise(planting: Planting) -> None:
    def planted(release: Any) -> Any:
        def filtered(self: PrivateOptimizer) -> None:
            sums = self.batch._sums
            if self._options.low_pass is not None:
                for key, part in sums.items():
                    if self._covered[key].factor is not None:
                        sums[key] = GaussianFilter(float(total(part).norm()))(total(part))
                self._options = replace(self._options, low_pass=None)
            release(self)

        return filtered

    planting.replace(PrivateOptimizer, "_release", planted)


def moments_before_the_noise(planting: Planting) -> None:
    def planted(step: Any) -> Any:
        def telling(self: PrivateOptimizer, trained: Sequence[PrivateParameter], sums: Sequence[Any]) -> None:
            squares = [(total(value) / self.expected_batch_size).square().mean() for value in sums]
            step(self, trained, sums)
            for p, square in zip(trained, squares, strict=True):
                if "second" in (state := self.original_optimizer.state[p.parameter]):
                    state["second"].copy_(square)

        return telling

    planting.replace(PrivateOptimizer, "_step_by_torch", planted)


# Batches and what counts as an example


def divide_by_the_batch(planting: Planting) -> None:
    def planted(release: Any) -> Any:
        def divided(self: PrivateOptimizer) -> None:
            self._expected_batch_size = max(self.batch.examples, 1)
            release(self)

        return divided

    planting.replace(PrivateOptimizer, "_release", planted)


def shuffled_batches(planting: Planting) -> None:
    def planted(self: PoissonSampler) -> Iterator[list[int]]:
        batches: list[list[int]] = []
        for _ in range(self.steps):
            batches = batches or [
                part.tolist() for part in torch.randperm(self.size).split(round(self.size * self.sample_rate))
            ]
            yield batches.pop()

    planting.replace(PoissonSampler, "__iter__", lambda _: planted)


def everybody_in_every_batch(planting: Planting) -> None:
    planting.replace(PoissonSampler, "draw", lambda _: lambda self: list(range(self.size)))


def twice_in_a_batch(planting: Planting) -> None:
    planting.replace(PoissonSampler, "draw", lambda draw: lambda self: (batch := draw(self)) + batch[:1])


def samplers_passed_over(planting: Planting) -> None:
    planting.replace(lora_dp.engine.data_loader, "_draws_from_all", lambda _: lambda loader: True)


class Windowed(nn.Module):
    """(N, 4, 6) in windows of two tokens through an adapter, (2N, 2, 6): all rows of an example together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.head = DPLoRALinear(6, 6, r=2), nn.Linear(6, 3).requires_grad_(False)
        nn.init.normal_(self.qkv.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.qkv(x.reshape(-1, 2, 6)).tanh().view(len(x), 4, 6).mean(1))


def windows_counted(planting: Planting) -> None:
    planting.replace(lora_dp.engine.hooks, "batch_size", lambda count: lambda args, kwargs: 2 * count(args, kwargs))


def step_on_windows() -> None:
    model = Windowed().train()
    optimizer = make_private(model, batch_size=4)
    optimizer.batch.expect(4)
    F.cross_entropy(model(torch.randn(4, 4, 6)), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()


def windows_of_all_examples_first(planting: Planting) -> None:
    """In the user's model: Swin's windows in the order of their places in the image, not of the images."""

    def planted(partition: Any) -> Any:
        def mixed(x: Tensor, size: Any) -> Tensor:
            windows = partition(x, size)
            return windows.view(len(x), -1, *windows.shape[1:]).transpose(0, 1).reshape(windows.shape)

        return mixed

    def put_back(reverse: Any) -> Any:
        def sorted_again(windows: Tensor, size: Any, height: int, width: int) -> Tensor:
            count = height * width // (size[0] * size[1])
            by_example = windows.view(count, -1, *windows.shape[1:]).transpose(0, 1).reshape(windows.shape)
            return reverse(by_example, size, height, width)

        return sorted_again

    planting.replace(swin_transformer, "window_partition", planted)
    planting.replace(swin_transformer, "window_reverse", put_back)


def step_of_swin() -> None:
    model = inject_lora(build("timm_swin"), LoRAConfig(r=2, target_modules=["qkv"], trainable_modules=["head.fc"]))
    optimizer = make_private(model.train(), batch_size=4)
    optimizer.batch.expect(4)
    F.cross_entropy(model(torch.randn(4, 1, 16, 16)), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()


# What is trained, and what examples share


def uncovered_parameter(planting: Planting) -> None:
    planting.replace(lora_dp.engine.engine, "cover", lambda cover: lambda model: cover(model[0]))
    planting.replace(lora_dp.engine.optimizer, "check_optimizer", lambda _: lambda optimizer, covered: None)


def frozen_parameters_stepped(planting: Planting) -> None:
    planting.replace(lora_dp.engine.optimizer, "unfrozen", lambda _: list)


def plain_head_left_trainable(planting: Planting) -> None:
    """In the user's model."""
    planting.replace(lora_dp.engine.engine, "cover", lambda cover: lambda model: cover(model.append(nn.Linear(3, 3))))


def batch_mean_in_a_module(planting: Planting) -> None:
    """In the user's model."""
    planting.replace(nn.Tanh, "forward", lambda tanh: lambda self, x: tanh(self, x - x.mean(0)))


def train_a_step() -> None:
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    optimizer.batch.expect(4)
    x, y = examples(4)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


# The account


def ledger_behind(planting: Planting) -> None:
    """Each step enters the one before it."""
    waiting: dict[int, PoissonGaussian] = {}

    def planted(release: Any) -> Any:
        def late(self: PrivateOptimizer) -> None:
            ledger = self.ledger

            def append(event: PoissonGaussian) -> None:
                if (before := waiting.pop(id(self), None)) is not None:
                    ledger.append(before)
                waiting[id(self)] = event

            vars(self)["_ledger"] = SimpleNamespace(append=append, steps=ledger.steps)
            try:
                release(self)
            finally:
                vars(self)["_ledger"] = ledger

        return late

    planting.replace(PrivateOptimizer, "_release", planted)
