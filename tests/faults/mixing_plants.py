"""What plants each fault by which examples mix unnoticed, masks are known, or a node obeys its server."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lora_dp.engine.engine
import lora_dp.engine.hooks
import lora_dp.engine.optimizer
import lora_dp.fed.data.datasets
import lora_dp.fed.rounds.client
import lora_dp.hash_chain
import lora_dp.isolation.batches.lists
import lora_dp.isolation.check
import lora_dp.isolation.loss_checks.own_scales
import lora_dp.isolation.loss_checks.watch
import lora_dp.isolation.model_state.parameters
import lora_dp.isolation.model_state.parts
import lora_dp.privacy.mechanism
import lora_dp.privacy.secret_state
from lora_dp.auditing import PlantedCanaries
from lora_dp.engine.data_loader import PrivateDataLoader
from lora_dp.engine.hooks import ModelHooks
from lora_dp.engine.logical_batch import Clipped, LogicalBatch
from lora_dp.engine.optimizer import PrivateOptimizer
from lora_dp.fed.data.other_company import Ops
from lora_dp.fed.flower.policy import Policy
from lora_dp.isolation.batches.shared_arguments import SharedArguments
from lora_dp.isolation.loss_checks.watch import LossWatch
from lora_dp.isolation.model_state.buffers import KeptBuffers
from lora_dp.ops.example_rows import ExampleRows
from tests.faults.planting import Planting


def _nothing(_: Any) -> Callable[..., None]:
    return lambda *arguments, **options: None


def any_reduction_taken(planting: Planting) -> None:
    planting.replace(lora_dp.isolation.loss_checks.watch, "is_plain", lambda _: lambda *arguments: True)


def changing_divisors_taken(planting: Planting) -> None:
    planting.replace(LossWatch, "_compare", _nothing)


def losses_that_meet_taken(planting: Planting) -> None:
    planting.replace(lora_dp.isolation.loss_checks.watch, "meets", lambda _: lambda *arguments: False)
    planting.replace(lora_dp.isolation.loss_checks.watch, "meeting", lambda _: lambda *arguments: None)


def losses_of_later_batches_taken(planting: Planting) -> None:
    planting.replace(lora_dp.isolation.loss_checks.watch, "meeting", lambda _: lambda *arguments: None)


def losses_at_padding_taken(planting: Planting) -> None:
    planting.replace(lora_dp.isolation.loss_checks.watch, "reaches_padding", lambda _: lambda *arguments: False)


def losses_that_no_graph_shows_taken(planting: Planting) -> None:
    planting.replace(LossWatch, "_check_inside", _nothing)


def whole_batches_not_tried(planting: Planting) -> None:
    planting.replace(lora_dp.isolation.check, "check_whole", lambda _: lambda *arguments, **options: arguments[-1])


def backwards_not_tried(planting: Planting) -> None:
    planting.replace(lora_dp.isolation.check, "_check_backward", _nothing)


def parameters_written_to(planting: Planting) -> None:
    for look in ("check", "check_backward"):
        planting.replace(lora_dp.isolation.model_state.parameters.Versions, look, _nothing)
    planting.replace(lora_dp.isolation.model_state.parameters, "_storage", lambda _: lambda tensor: 0)


def unseen_losses_taken(planting: Planting) -> None:
    def planted(begin: Any) -> Any:
        def trusting(self: LossWatch, n: int, tested: bool, leaves: Any, **options: Any) -> None:
            begin(self, n, tested, set, **options)
            self.examined = True

        return trusting

    planting.replace(LossWatch, "begin", planted)


def parameters_beside_the_model_trained(planting: Planting) -> None:
    planting.replace(LossWatch, "_may_be_trained", lambda _: lambda *arguments: False)


def frozen_parameters_thawed(planting: Planting) -> None:
    planting.replace(lora_dp.engine.hooks, "check_frozen", _nothing)


def single_examples_not_tried(planting: Planting) -> None:
    def planted(test: Any) -> Any:
        def at_least_two(self: ModelHooks, module: Any, args: Any, kwargs: Any, call: Any, n: int) -> bool:
            return n > 1 and bool(test(self, module, args, kwargs, call, n))

        return at_least_two

    planting.replace(ModelHooks, "_test", planted)


def ops_of_parts_not_compared(planting: Planting) -> None:
    def planted(taken: Any) -> Any:
        def forgetful(self: Ops) -> list[Any]:
            taken(self)
            self.grouped = False
            return []

        return forgetful

    planting.replace(Ops, "taken", planted)


def own_losses_trusted(planting: Planting) -> None:
    planting.replace(lora_dp.isolation.loss_checks.own_scales, "own_weights", lambda _: lambda *arguments: (1.0,))


def hidden_tensors_trained(planting: Planting) -> None:
    planting.replace(lora_dp.engine.hooks, "check_strangers", _nothing)


def unfetched_batches_forgotten(planting: Planting) -> None:
    planting.replace(PrivateDataLoader, "_count_unfetched", _nothing)


def rounded_to_the_sums_dtype(planting: Planting) -> None:
    def planted(add_noise: Any) -> Any:
        def rounded(values: list[Tensor], *arguments: Any) -> list[Tensor]:
            return [noisy.to(value.dtype) for noisy, value in zip(add_noise(values, *arguments), values, strict=True)]

        return rounded

    planting.replace(lora_dp.privacy.mechanism, "add_noise", planted)


def padding_never_tried(planting: Planting) -> None:
    planting.replace(lora_dp.isolation.check, "check_padding", lambda _: lambda *arguments: False)


def first_batch_alone_tried(planting: Planting) -> None:
    planting.replace(ModelHooks, "_kind", lambda _: lambda *arguments: "a batch")
    planting.replace(lora_dp.engine.hooks, "drawn_for_test", lambda _: lambda: False)


def what_all_share_taken(planting: Planting) -> None:
    planting.replace(SharedArguments, "changed", lambda _: lambda *arguments: {})


def larger_batches_taken(planting: Planting) -> None:
    planting.replace(lora_dp.engine.hooks, "check_larger", lambda _: lambda *arguments, **options: options["losses"])


def lists_stay_as_they_are(planting: Planting) -> None:
    planting.replace(lora_dp.isolation.batches.lists, "_of_whole_batch", lambda _: lambda *arguments: True)


def same_number_of_examples_alone_tried(planting: Planting) -> None:
    planting.replace(lora_dp.isolation.check, "check_company", lambda _: lambda *arguments: frozenset({0}))
    planting.replace(lora_dp.isolation.check, "check_whole", lambda _: lambda *arguments, **options: arguments[-1])


def collation_never_tried(planting: Planting) -> None:
    planting.replace(PrivateDataLoader, "_test_collation", _nothing)


def skipped_batches_forgotten(planting: Planting) -> None:
    planting.replace(LogicalBatch, "check_stepped", lambda _: lambda self: self._drawn.clear())


def masks_of_a_short_seed(planting: Planting) -> None:
    def planted(_: Any) -> Any:
        def seeded() -> None:
            seed = random.SystemRandom().getrandbits(32)
            lora_dp.privacy.secret_state._seeds.add(seed)
            torch.manual_seed(seed)
            np.random.seed(seed)

        return seeded

    planting.replace(lora_dp.engine.engine, "renew", planted)


def seeds_taken(planting: Planting) -> None:
    planting.replace(lora_dp.privacy.secret_state, "_check", _nothing)


def lookups_measured_in_float32(planting: Planting) -> None:
    """The norm is of rows that were added up in float32, the sum of rows in float64."""
    found: list[tuple[Tensor, Tensor]] = []

    def planted(of: Any) -> Any:
        def kept(ids: Tensor, gradient: Tensor, shape: torch.Size) -> ExampleRows:
            found.append((ids, gradient))
            return of(ids, gradient, shape)

        return kept

    def narrow(_: Any) -> Any:
        def norms(self: ExampleRows) -> Tensor:
            ids, gradient = found[-1]
            table = torch.zeros(self.n, *self.shape)
            for i in range(self.n):
                table[i].index_add_(0, ids[i], gradient[i].float())
            return table.flatten(1).norm(dim=1).double()

        return norms

    planting.replace(ExampleRows, "of", planted)
    planting.replace(ExampleRows, "norms", narrow)


def failing_batches_left_out(planting: Planting) -> None:
    def planted(accumulate: Any) -> Any:
        def whole(optimizer: PrivateOptimizer, rows: Any, backward: Any, failures: Any, size: int) -> None:
            recorder = optimizer.recorder
            try:
                backward(rows)
                clipped = optimizer.clip(recorder.take(), None)
            except Exception as error:
                recorder.discard()
                failures.add(error, 1)
                clipped = Clipped({}, 0)
            optimizer.take(clipped, len(rows), len(rows))

        return whole

    planting.replace(lora_dp.fed.rounds.client, "accumulate", planted)


def servers_obeyed(planting: Planting) -> None:
    planting.replace(Policy, "check", _nothing)


def damaged_lines_read(planting: Planting) -> None:
    planting.replace(lora_dp.hash_chain, "link", lambda _: lambda before, entry: "0" * 64)


def refusals_forgotten(planting: Planting) -> None:
    planting.replace(LogicalBatch, "check_not_lost", _nothing)


def buffers_of_rare_batches_taken(planting: Planting) -> None:
    planting.replace(KeptBuffers, "unknown", lambda _: lambda self: False)


def pairs_with_all_others_taken(planting: Planting) -> None:
    planting.replace(LossWatch, "_check_paired", _nothing)


def settings_not_looked_at(planting: Planting) -> None:
    planting.replace(lora_dp.isolation.model_state.parts, "_state", _nothing)


def generators_left_as_a_pass_left_them(planting: Planting) -> None:
    planting.replace(lora_dp.engine.optimizer, "end_pass", _nothing)


def splits_told_by_any_word(planting: Planting) -> None:
    planting.replace(lora_dp.fed.data.datasets, "split_files", _nothing)
    planting.replace(lora_dp.fed.data.datasets, "check_apart", _nothing)


def canaries_may_miss_steps(planting: Planting) -> None:
    planting.replace(PlantedCanaries, "steps_taken", lambda _: lambda self: self.steps)
