"""Batches of one shape, in which the arithmetic of a row hangs on that row alone.

*The attack.* A library takes another algorithm for another number of rows, so that one example more changes the
rounding of all others: by 1e-7 of their gradients. Whoever chooses the model can amplify that to the whole clip bound:
a head whose weights cancel leaves nothing but rounding, times a large number, and every gradient is normalised.

*What is done.* The examples of a drawn batch are given to the model in parts of one number of rows, which is public.
Each holds examples of one width: their own, never that of the longest; and those that fill their width are by
themselves, since models leave out a mask that has nothing to say. A part that is not full has copies of its own
examples, which a mask keeps out of the sum. So no example decides the shape of a product in which another stands.

*What remains is tried.* A row's arithmetic could still hang on its place, as where rows are not aligned in memory, or
on the values of others, as where each expert of a mixture is given the rows that are sent to it. So each shape is tried
on this very machine, before an example of that shape is trained on: made-up inputs, with random numbers in adapters and
head, moved by a row, in other company, and beside copies of itself. The same ops must work on tensors of the same
shapes, none of them told by a tensor which rows belong together, and every number that is kept of an example stay the
same to the last bit. Nothing of the trial comes from private data or from a server. Where it fails, each example is
trained on by itself, which has neither place nor company.
"""

import logging
import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_dp.engine.optimizer import PrivateOptimizer
from lora_dp.engine.recorder import Recorder
from lora_dp.fed.data.examples import Batch, Examples, Shape
from lora_dp.fed.data.other_company import Ops, in_other_company, rows_stayed
from lora_dp.fed.models.feature_models import vocabulary_of
from lora_dp.fed.models.options import Precision
from lora_dp.fed.rounds.contained_failures import Failures
from lora_dp.fed.rounds.local_training import LocalSteps
from lora_dp.fed.rounds.messages import Workspace
from lora_dp.fed.safe_text import described
from lora_dp.isolation.deterministic import Still
from lora_dp.nn.lora_linear import DPLoRALinear

_LOG = logging.getLogger(__name__)
_SEED = 20261129
_ROWS = 8


def rows_of_a_part(batch_size: int, examples: int, shapes_vary: bool) -> int:
    """The public number of rows that the model is given at once, a multiple of 8.

    Two deviations above the expected size, so that most batches are one part; a quarter of it where examples differ in
    shape, and each shape has parts of its own.

    Args:
        batch_size: the expected size of a Poisson-sampled batch.
        examples: how many the client has.
        shapes_vary: whether they are of several shapes.
    """
    wanted = batch_size / 4 if shapes_vary else min(batch_size + 2 * math.sqrt(batch_size), examples)
    return _ROWS * math.ceil(wanted / _ROWS)


class OneShape:
    """Cuts a client's batches into parts of one shape.

    Args:
        workspace: the model, private by ``optimizer``.
        optimizer: active.
        examples: the client's.
        steps: how a batch of the client's is trained on.
        precision: in which the model runs.
        failures: takes note of a model that cannot be tried.
    """

    def __init__(
        self,
        workspace: Workspace,
        optimizer: PrivateOptimizer,
        examples: Examples,
        steps: LocalSteps,
        precision: Precision,
        failures: Failures,
    ) -> None:
        self._steps = steps
        self._workspace, self._optimizer, self._examples = workspace, optimizer, examples
        self._precision, self._failures = precision, failures
        self._rows = rows_of_a_part(steps.rows, len(examples), examples.shapes_vary)

    def parts(self, rows: Sequence[int]) -> Iterator[tuple[list[int], int]]:
        """The examples of one batch, some at a time, and with how many rows the model is to be called for them."""
        by_shape: dict[Shape, list[int]] = {}
        for row, shape in zip(rows, self._examples.shapes(rows), strict=True):
            by_shape.setdefault(shape, []).append(row)
        for shape, alike in sorted(by_shape.items()):
            size = self._rows if self._apart(shape) else 1
            for start in range(0, len(alike), size):
                yield alike[start : start + size], size

    def _apart(self, shape: Shape) -> bool:
        model = self._workspace.model
        device = next(model.parameters()).device
        ranks = tuple(layer.r for layer in model.modules() if isinstance(layer, DPLoRALinear))
        kind: Hashable = (
            self._rows,
            self._steps.views.count,
            shape,
            ranks,
            self._optimizer.recorder.trained,
            self._precision,
            device,
            torch.get_num_threads(),
        )
        known = self._workspace.rows_apart
        if kind not in known:
            known[kind] = self._try(shape, device)
        return known[kind]

    def _try(self, shape: Shape, device: torch.device) -> bool:
        generator = torch.Generator().manual_seed(_SEED)
        try:
            # A reproducible turn draws the same, whether its shape was tried before or not.
            with torch.random.fork_rng([device] if device.type == "cuda" else []), self._workspace.at_random(generator):
                self._optimizer.activate()  # what regulates a step is worked out from the factors
                if self._stays(shape, device, generator):
                    return True
            reason = "a row's rounding hangs on its place or its company"
        except Exception as error:
            self._failures.add(error, self._rows)
            reason = described(error)
        finally:
            self._optimizer.recorder.discard()
            # What made-up inputs have passed, private ones have not.
            self._optimizer.recorder.tested.clear()
            self._optimizer.activate()
        _LOG.warning(
            "Batches of %d rows cannot be given to this model, so each example is by itself, which takes longer: %s.",
            self._rows,
            reason,
        )
        return False

    def _stays(self, shape: Shape, device: torch.device, generator: torch.Generator) -> bool:
        vocabulary = vocabulary_of(self._workspace.whole)
        views = self._steps.views
        batch, others = (
            {
                name: views.gathered(tensor.to(device))
                for name, tensor in self._examples.made_up(
                    self._rows * views.count, shape, vocabulary, generator
                ).items()
            }
            for _ in range(2)
        )
        labels = self._examples.made_up_targets(self._rows, shape, vocabulary, generator).to(device)
        companies = in_other_company({**batch, "labels": labels}, {**others, "labels": labels.roll(1)})
        with TrainingOps(self._workspace.model, self._optimizer.recorder) as ops:
            found = [(self._found(views.spread(company)), ops.taken()) for company in companies]
        kept, (_, done) = [tensors for tensors, _ in found], found[0]
        return (
            not ops.grouped
            and all(again == done for _, again in found)
            and all(rows_stayed(tensors) for tensors in zip(*kept, strict=True))
        )

    def _found(self, batch: Batch) -> list[Tensor]:
        """All that the private step would keep of each row."""
        with Still():
            losses = self._steps.losses(self._workspace.model, batch, self._precision, made_up=True)
            self._optimizer.backward(losses)
            finished = self._optimizer.recorder.take()
            return [tensor for slot in finished.slots.values() if slot.filled for tensor in slot.by_example()]


class TrainingOps(Ops):
    """The ops of a model's forward, but for those of trials of isolation."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        super().__init__(noting=False)
        self._hooks = (
            # Behind the hook that tries isolation.
            model.register_forward_pre_hook(lambda *_: self._set(not recorder.tried)),
            model.register_forward_hook(lambda *_: self._set(False), prepend=True),
        )

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for hook in self._hooks:
            hook.remove()

    def _set(self, noting: bool) -> None:
        self.noting = noting
