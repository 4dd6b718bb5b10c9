"""A private step of fixed size whose device work is captured once, as a CUDA graph, and replayed.

Poisson sampling draws another number of examples for every batch; a graph wants one. So each batch is padded to a
fixed size and a mask says who was drawn. Forward, backward, norms, clipping and the sum are in the graph. Noise and
update, one launch more, are not: each replay must have noise of its own, and its entry in the ledger beforehand.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_dp.argument_checks import check_count, check_kind
from lora_dp.engine.logical_batch import Clipped
from lora_dp.engine.optimizer import PrivateOptimizer
from lora_dp.isolation.batches.kinds import structure
from lora_dp.isolation.collation.trial import drawn_for_test
from lora_dp.nn.layers import DPEmbedding
from lora_dp.ops.clip_and_sum import tables_captured
from lora_dp.optim.disk import DiSK
from lora_dp.privacy.adaptive_clipping import QuantileClipping

# As torch.cuda.make_graphed_callables: libraries set themselves up in the first calls, which no graph may hold.
_WARMUP = 3


@dataclass
class _Captured:
    """A graph (None on a CPU, where the step just runs again), what it reads, and what it leaves where."""

    graph: Any
    tables: Any
    loss: Tensor
    clipped: Clipped


class GraphedStep:
    """Private steps on padded batches, replayed as CUDA graphs: one for each set of factors that a phase trains.

    On a CPU it takes the same steps without a graph.

    Args:
        model: the model that ``make_private`` returned, in training mode; not compiled.
        optimizer: its private optimizer.
        loss: ``loss(model, *batch)``, (N,) with one loss for each example, or a scalar with the reduction that
            ``make_private`` was told; without any synchronisation with the host.
        batch_size: examples after padding. A larger batch is taken as an ordinary step: choose it some deviations above
            the expected size, which Poisson sampling rarely passes.

    Raises:
        ValueError: batch_size below 1, or a trainable embedding, by name; or the optimizer wraps :class:`lora_dp.DiSK`,
            its bound moves (:class:`lora_dp.AdaptiveClipping`), or it takes several views of an example.
        TypeError: batch_size is no whole number, or another argument is of another kind.

    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from lora_dp import DPLinear, PrivacyEngine
    >>> from lora_dp.losses import classification_loss
    >>> model = DPLinear(4, 3)
    >>> data = DataLoader(TensorDataset(torch.randn(64, 4), torch.randint(3, (64,))), batch_size=16)
    >>> model, optimizer, loader = PrivacyEngine().make_private(
    ...     model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=data,
    ...     noise_multiplier=1.0, max_grad_norm=1.0)
    >>> step = GraphedStep(model, optimizer, lambda model, x, y: classification_loss(model(x), y), batch_size=32)
    >>> for x, y in loader:
    ...     loss = step(x, y)
    >>> optimizer.steps_taken
    4
    """

    def __init__(self, model: nn.Module, optimizer: PrivateOptimizer, loss: Callable[..., Tensor], *, batch_size: int):
        check_count("batch_size", batch_size)
        check_kind("model", model, nn.Module, "give the one that make_private returned")
        check_kind("optimizer", optimizer, PrivateOptimizer, "give the one that make_private returned")
        if not callable(loss):
            raise TypeError(f"loss must be a function loss(model, *batch), got a {type(loss).__name__}.")
        if isinstance(optimizer.original_optimizer, DiSK):
            raise ValueError(
                "DiSK has no graphed step, for a replayed graph does not move the model ahead: call step()."
            )
        if isinstance(optimizer.mechanism.rule, QuantileClipping):
            raise ValueError(
                "AdaptiveClipping has no graphed step, for a replayed graph would clip at the bound that it was "
                "captured with: call step()."
            )
        if optimizer.views > 1:
            raise ValueError("Several views of each example have no graphed step: call step().")
        for name, module in model.named_modules():
            if isinstance(module, DPEmbedding) and module.private_parameters():
                raise ValueError(f"'{name}' is a trainable embedding, which no graph can record: freeze it.")
        self.model, self.optimizer, self.loss, self.batch_size = model, optimizer, loss, batch_size
        self._inputs: list[Tensor] = []
        self._mask = torch.zeros(0, dtype=torch.bool)
        self._captured: dict[frozenset[int], _Captured] = {}
        self._tested: set[Hashable] = set()

    def __call__(self, *batch: Tensor) -> Tensor:
        """Take one step on a batch that the private loader drew.

        Args:
            batch: tensors whose first dimension is the number of examples, at least 1; shapes and dtypes beyond it are
                the same in every call.

        Returns:
            The loss over the padded batch, a mean of losses (N,): it weighs padding too, and depends on private data.

        Raises:
            TypeError: something else than tensors, such as a dict.
            ValueError: no tensor, an empty or uneven batch, or other shapes or dtypes than in the first call.
            PrivacyBudgetExceeded, RuntimeError: as for :meth:`PrivateOptimizer.step`; or a logical batch of several
                micro-batches is under way.
        """
        if not all(isinstance(tensor, Tensor) and tensor.dim() for tensor in batch):
            raise TypeError("Give the batch as tensors by position, step(input_ids, labels): a graph takes no dict.")
        sizes = {len(tensor) for tensor in batch}
        if len(sizes) != 1 or not (n := sizes.pop()):
            raise ValueError("Give tensors of one batch, all with the same number of examples, at least one.")
        self._check_alike(batch)
        self.optimizer.batch.check_whole()
        self.optimizer.activate()
        if n > self.batch_size or self._needs_check(batch):
            device = next(self.model.parameters()).device
            loss = self._backward(tensor.to(device) for tensor in batch)
            self.optimizer.step()
            self._allocate(batch)
            return loss
        self._allocate(batch)
        self._fill(batch, n)
        trained = self.optimizer.recorder.trained
        if trained not in self._captured:
            self._captured[trained] = self._capture()
        captured = self._captured[trained]
        if captured.graph is None:
            captured.loss, captured.clipped = self._run()
        else:
            captured.graph.replay()
        self.optimizer.take(captured.clipped, n, n)
        self.optimizer.release()
        return captured.loss.clone()

    def _needs_check(self, batch: tuple[Tensor, ...]) -> bool:
        """Whether the hooks on the model must see this batch itself: padding repeats an example, which proves nothing
        about isolation, and a replay runs no hooks."""
        if len(batch[0]) < 2:
            return not self._tested
        kind = structure(batch, len(batch[0]))
        new = kind not in self._tested or drawn_for_test()
        self._tested.add(kind)
        return new

    def _allocate(self, batch: tuple[Tensor, ...]) -> None:
        if not self._inputs:
            device = next(self.model.parameters()).device
            self._inputs = [torch.empty((self.batch_size, *t.shape[1:]), dtype=t.dtype, device=device) for t in batch]
            self._mask = torch.zeros(self.batch_size, dtype=torch.bool, device=device)

    def _fill(self, batch: tuple[Tensor, ...], n: int) -> None:
        for held, given in zip(self._inputs, batch, strict=True):
            held[:n].copy_(given, non_blocking=True)
            # Any valid example will do; the mask gives it no weight.
            held[n:].copy_(given[:1].expand_as(held[n:]), non_blocking=True)
        self._mask.fill_(False)
        self._mask[:n].fill_(True)

    def _check_alike(self, batch: tuple[Tensor, ...]) -> None:
        if not self._inputs:
            return
        same = len(batch) == len(self._inputs) and all(
            given.shape[1:] == held.shape[1:] and given.dtype == held.dtype
            for given, held in zip(batch, self._inputs, strict=True)
        )
        if not same:
            held_shapes = ", ".join(f"(·, {', '.join(map(str, held.shape[1:]))}) {held.dtype}" for held in self._inputs)
            raise ValueError(f"A graph takes the shapes and dtypes of the first call, {held_shapes}: pad to them.")

    def _run(self) -> tuple[Tensor, Clipped]:
        return self._backward(self._inputs), self.optimizer.clip(self.optimizer.recorder.take(), self._mask)

    def _backward(self, batch: Iterable[Tensor]) -> Tensor:
        loss = self.loss(self.model, *batch)
        if loss.dim() == 0:
            loss.backward()
            return loss.detach()
        self.optimizer.backward(loss)
        return loss.detach().mean()

    def _capture(self) -> _Captured:
        if self._mask.device.type != "cuda":
            return _Captured(None, None, torch.empty(0), Clipped({}, 0))
        recorder = self.optimizer.recorder
        # Trials would wait for the device; a batch that needs them is an ordinary step.
        recorder.capturing = True
        try:
            return self._capture_graph()
        finally:
            recorder.capturing = False
            recorder.discard()

    def _capture_graph(self) -> _Captured:
        # Nothing that these passes find is noised or released: they only warm up.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next((held.graph.pool() for held in self._captured.values()), None)
        with tables_captured(self._mask.device) as tables, torch.cuda.graph(graph, pool=pool):
            loss, clipped = self._run()
        return _Captured(graph, tables, loss, clipped)
