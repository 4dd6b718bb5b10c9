"""The private data loader: batches of a data set by Poisson sampling, each of them a step."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from lora_dp.argument_checks import Fixed, check_count, check_kind
from lora_dp.engine.cycle import Cycle
from lora_dp.engine.repeated_examples import first_repeated
from lora_dp.isolation.collation.names import arguments
from lora_dp.isolation.collation.trial import check_collation, drawn_for_test
from lora_dp.privacy.cyclic_sampling import CyclicSampler, split_into_groups
from lora_dp.privacy.sampling import PoissonSampler, UniformSource
from lora_dp.privacy.secret_state import begin_fetch, collation, worker_init

_NO_MORE = object()
# So many batches of other arguments are each tried: a batch whose entries are called by its examples is always other.
_KINDS = 8
_LOADER = "call make_private again with a DataLoader that has it"
_SETTING = f"'{{name}}' would be without effect here: {_LOADER}."
_ORDER = "batches are drawn by Poisson sampling, so give make_private a Subset to train on some of the examples"
_UNFETCHED = (
    "A batch that the private loader drew ({} examples) could not be fetched ({}) and was never stepped: who goes on "
    "without it tells of one example by what is missing. Have the data set and the collate function return something "
    "for every example, leave out what is no use by optimizer.step(mask=mask), and call make_private again."
)


class _NonEmpty(Sampler[list[int]]):
    """Hands non-empty batches on and counts the empty ones before each, for workers that fetch ahead."""

    def __init__(self, sampler: PoissonSampler):
        self.sampler = sampler
        self.drawn: deque[tuple[int, list[int]]] = deque()
        self.empty_at_end = 0

    def __iter__(self) -> Iterator[list[int]]:
        self.drawn.clear()
        self.empty_at_end = 0
        for batch in self.sampler:
            if batch:
                self.drawn.append((self.empty_at_end, batch))
                self.empty_at_end = 0
                yield batch
            else:
                self.empty_at_end += 1


class _Batches(Iterator[Any]):
    """What a loader yields; a generator that has raised would end quietly when it is asked again."""

    def __init__(self, loader: "PrivateDataLoader", batches: Iterator[Any]):
        self._loader, self._batches = loader, batches

    def __next__(self) -> Any:
        self._loader.check_fetched()
        return next(self._batches)


def _draws_from_all(loader: DataLoader[Any]) -> bool:
    """Whether the loader's own order is one of those that a plain DataLoader makes: each example once."""
    if isinstance(loader, PrivateDataLoader):
        return True
    sampler = loader.sampler
    if type(loader.batch_sampler) is not BatchSampler or loader.batch_sampler.sampler is not sampler:
        return False
    if type(sampler) is RandomSampler:
        whole = not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
        return whole and sampler.data_source is loader.dataset
    return type(sampler) is SequentialSampler and sampler.data_source is loader.dataset


class PrivateDataLoader(DataLoader[Any]):
    """Iterates over Poisson batches of a data set.

    Each draw is a step of the mechanism. An empty draw cannot be shown to a model, so the loader takes that step
    itself, as pure noise, through ``on_empty``.

    Args:
        loader: the user's loader: its data set, collate function and workers are kept, its batch size gives the
            expected batch, its order is not used.
        source: of uniform draws.
        on_batch: called with the size of each batch just before it is handed out.
        on_empty: called for each empty draw, in its place among the batches.
        on_begin: called before the first draw of an iteration.
        on_end: called before each later draw, and after the last: the batch before must have been stepped by then.
        on_varying_width: called when the padding of an example turned out to depend on the others in its batch.
        cycle: whose turn it is, where batches are drawn from groups in turn; by default each is drawn from all.

    Attributes:
        sample_rate: a batch's share of the data.
        turn_rate: rate at which an example is drawn whose turn it is: the same, times the number of groups.

    Raises:
        ValueError: no examples, one twice, no batch size, a batch size above the number of examples, or an own sampler;
            or groups that are smaller than a batch.
        TypeError: an iterable data set, which cannot be Poisson sampled.

    The examples of the methods go on from this one:

    >>> import torch
    >>> from lora_dp import DPLinear, PrivacyEngine
    >>> model = DPLinear(4, 2)
    >>> model, optimizer, loader = PrivacyEngine().make_private(
    ...     model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    ...     data_loader=DataLoader(torch.randn(200, 4), batch_size=20), noise_multiplier=1.0, max_grad_norm=1.0)
    >>> loader.sample_rate, loader.expected_batch_size, len(loader)
    (0.1, 20, 10)
    """

    dataset = Fixed[Any]()
    expected_batch_size = Fixed[int]()
    sample_rate = Fixed[float]()
    turn_rate = Fixed[float]()
    source = Fixed[UniformSource]()
    batch_size, drop_last = Fixed[Any](_SETTING), Fixed[Any](f"'{{name}}' would be without effect here: {_ORDER}.")
    collate_fn, num_workers, pin_memory = Fixed[Any](_SETTING), Fixed[Any](_SETTING), Fixed[Any](_SETTING)
    timeout, worker_init_fn, prefetch_factor = Fixed[Any](_SETTING), Fixed[Any](_SETTING), Fixed[Any](_SETTING)
    multiprocessing_context, persistent_workers = Fixed[Any](_SETTING), Fixed[Any](_SETTING)
    generator, pin_memory_device, in_order = Fixed[Any](_SETTING), Fixed[Any](_SETTING), Fixed[Any](_SETTING)
    # As any loader of batches has one, and makes no use of it.
    sampler = Fixed[Any](f"'{{name}}' would be without effect here: {_ORDER}.")
    # Accelerate would make a plain loader of this one.
    _is_accelerate_prepared = True

    def __init__(
        self,
        loader: DataLoader[Any],
        source: UniformSource,
        on_batch: Callable[[int], None],
        on_empty: Callable[[], None],
        *,
        on_begin: Callable[[], None] = lambda: None,
        on_end: Callable[[], None] = lambda: None,
        on_varying_width: Callable[[], None] = lambda: None,
        cycle: Cycle | None = None,
    ):
        check_kind("data_loader", loader, DataLoader, "its batch size and data set say how to sample")
        dataset: Dataset[Any] = loader.dataset
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise TypeError("An iterable data set cannot be Poisson sampled: use a map-style one with a length.")
        size = len(dataset)
        if size == 0:
            raise ValueError("The data set is empty: a private step needs at least one example to sample from.")
        if (repeated := first_repeated(dataset)) is not None:
            raise ValueError(
                f"The data set holds an example twice (index {repeated} has come before), which would move the model "
                "twice as far as ε admits: give each once, and weigh it in the loss instead."
            )
        if loader.batch_size is None or not _draws_from_all(loader):
            raise ValueError(
                "Give a loader with a batch_size and no sampler of its own: its batches are redrawn by Poisson "
                "sampling, which the accounting describes; to train on some of the examples, give a "
                "torch.utils.data.Subset of them as the data set."
            )
        if loader.batch_size > size:
            raise ValueError(
                f"The batch size {loader.batch_size} is above the {size} examples there are: choose at most {size}."
            )
        self._cycle = cycle or Cycle()
        if loader.batch_size * self._cycle.groups > size:
            raise ValueError(
                f"{self._cycle.groups} groups of {size} examples are smaller than the batch size {loader.batch_size}: "
                f"choose at most {size // loader.batch_size} bands, or a smaller batch."
            )
        self._groups: list[Tensor] | None = None
        self.dataset = dataset
        self.expected_batch_size = self.batch_size = loader.batch_size
        self.drop_last, self.persistent_workers, self.generator = False, False, None
        self.collate_fn, self.num_workers, self.pin_memory = loader.collate_fn, loader.num_workers, loader.pin_memory
        self.timeout, self.worker_init_fn, self.prefetch_factor = (
            loader.timeout,
            loader.worker_init_fn,
            loader.prefetch_factor,
        )
        self.multiprocessing_context, self.pin_memory_device = loader.multiprocessing_context, loader.pin_memory_device
        self.sampler, self.in_order = SequentialSampler(dataset), True
        self.sample_rate = loader.batch_size / size
        self.turn_rate = loader.batch_size * self._cycle.groups / size
        self.steps_per_epoch = max(1, round(1 / self.sample_rate))
        self.source, self._on_batch, self._on_empty = source, on_batch, on_empty
        self._on_begin, self._on_end, self._on_varying_width = on_begin, on_end, on_varying_width
        self._collations_tested: set[frozenset[Any]] = set()
        self._unfetched: str | None = None
        self._options: dict[str, Any] = {
            "collate_fn": collation(loader.collate_fn, source),
            "num_workers": loader.num_workers,
            "pin_memory": loader.pin_memory,
            "pin_memory_device": loader.pin_memory_device,
            "timeout": loader.timeout,
            "worker_init_fn": worker_init(loader.worker_init_fn, source),
            "multiprocessing_context": loader.multiprocessing_context,
        }
        if loader.num_workers:
            self._options["prefetch_factor"] = loader.prefetch_factor

    @property
    def batch_sampler(self) -> Sampler[list[int]]:
        """Fresh draws of one pass. The optimizer steps what this loader has drawn, and no batch of another's.

        >>> sum(map(len, loader.batch_sampler)) > 0
        True
        """
        return self._draws(self.steps_per_epoch)

    @batch_sampler.setter
    def batch_sampler(self, value: object) -> NoReturn:
        raise AttributeError(f"'batch_sampler' would be without effect here: {_ORDER}.")

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self.take(self.steps_per_epoch)

    def take(self, steps: int, *, empty: Any = None) -> Iterator[Any]:
        """The batches of exactly ``steps`` draws. An empty one is stepped, and not yielded unless ``empty`` is given.

        Args:
            steps: how many.
            empty: what is yielded after the step of an empty draw.

        Raises:
            IsolationError: the collate function joins examples; tried on the first batch, and on some later in secret.
            RuntimeError: a batch was not stepped before the next was asked for, one could not be fetched earlier, or
                torch's generators were seeded since make_private.

        >>> for x in loader.take(3):
        ...     optimizer.backward(model(x).square().sum(1))
        ...     optimizer.step()
        >>> optimizer.steps_taken
        3
        """
        return _Batches(self, self._take(steps, empty))

    def check_fetched(self) -> None:
        """Refuse to go on after a batch that was drawn and could not be fetched: that one example cannot be read would
        take away what all others of its batch add.

        Raises:
            RuntimeError: there was one.
        """
        if self._unfetched is not None:
            raise RuntimeError(self._unfetched)

    def _take(self, steps: int, marker: Any) -> Iterator[Any]:
        check_count("steps", steps, least=0)
        step, batches = self._cycle.step, _NonEmpty(self._draws(steps))
        self._on_begin()
        fetched = iter(DataLoader(self.dataset, batch_sampler=batches, **self._options))
        while (batch := self._fetch(fetched, batches.drawn)) is not _NO_MORE:
            empty, drawn = batches.drawn.popleft()
            yield from self._step_empty(step, empty, marker)
            step += empty
            self._cycle.check(step)
            step += 1
            self._on_batch(len(drawn))
            yield batch
            self._on_end()
        yield from self._step_empty(step, batches.empty_at_end, marker)

    def _draws(self, steps: int) -> PoissonSampler:
        size, groups = len(self.dataset), self._cycle.groups
        if groups == 1:
            return PoissonSampler(size, self.sample_rate, steps, self.source)
        if self._groups is None:
            self._groups = split_into_groups(size, groups, self.source)
        return CyclicSampler(self._groups, self.turn_rate, steps, self.source, self._cycle.step)

    def _step_empty(self, step: int, count: int, marker: Any) -> Iterator[Any]:
        for number in range(step, step + count):
            self._cycle.check(number)
            self._on_empty()
            if marker is not None:
                yield marker

    def _fetch(self, fetched: Iterator[Any], drawn: deque[tuple[int, list[int]]]) -> Any:
        if not self._options["num_workers"]:  # whose own generators are secret from their start on
            begin_fetch(self.source)
        try:
            if (batch := next(fetched, _NO_MORE)) is not _NO_MORE:
                self._test_collation(drawn[0][1], batch)
            elif drawn:
                raise RuntimeError("The data set or the collate function raised StopIteration in the midst of a batch.")
            return batch
        except BaseException as error:
            if drawn:
                self._count_unfetched(len(drawn[0][1]), error)
            raise

    def _count_unfetched(self, size: int, error: BaseException) -> None:
        self._on_batch(size)  # as one that is skipped: noise alone may not take its place
        if isinstance(error, Exception):  # of the data, rather than of who interrupts
            # Without its words, by which a loop may tell errors that it passes over.
            self._unfetched = _UNFETCHED.format(size, type(error).__name__)

    def _test_collation(self, drawn: list[int], batch: Any) -> None:
        kinds, kind = self._collations_tested, arguments(batch)
        if len(drawn) < 2 or ((kind in kinds or len(kinds) >= _KINDS) and not drawn_for_test()):
            return
        if check_collation(self.dataset, self.collate_fn, drawn, batch):
            self._on_varying_width()
        kinds.add(kind)
