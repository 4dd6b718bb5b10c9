"""The hooks on a private model as a whole: a recorded pass begins with each training forward.

They stay outside what torch.compile compiles: a pass is ordinary Python, and only its leaves are seen by the graph.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from lora_dp.engine.recorder import Recorder
from lora_dp.engine.validation import batch_size, check_frozen, check_frozen_norms, check_statistics, check_strangers
from lora_dp.errors import IsolationError
from lora_dp.isolation.batches.calls import Call, argument_names, named, of_whole_batch, take, tensors_in, widths
from lora_dp.isolation.batches.kinds import structure
from lora_dp.isolation.batches.lists import as_tensors
from lora_dp.isolation.batches.padding import used_tokens
from lora_dp.isolation.batches.tables import set_apart
from lora_dp.isolation.check import check_isolation, check_larger
from lora_dp.isolation.collation.trial import drawn_for_test
from lora_dp.isolation.other_batches import FEW, check_written
from lora_dp.isolation.trials import Trials
from lora_dp.nn.per_example import Pass
from lora_dp.nn.private_module import PrivateModule
from lora_dp.privacy.secret_state import begin_pass, forward_begins, forward_ends

_REASON = (
    "a private pass begins outside the compiled graph: to compile a bare container of torch, such as "
    "nn.Sequential, put it into a module of your own"
)

# Of a model that draws, the first batch is tried with so many random states: what happens in half of all passes is
# missed by one batch in 16.
_FIRST_DRAWS = 4
# By more than this part of it a batch has to be larger than any that was tried, to be compared with its parts.
_GROWN = 16


class ModelHooks:
    """Methods rather than closures, so that a copy of the model has hooks of its own."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self._names: dict[int, tuple[str, ...]] = {}

    @torch.compiler.disable(reason=_REASON)
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder = self.recorder
        if recorder.tried:
            return
        if not (module.training and torch.is_grad_enabled()):
            if module.training:
                check_statistics(recorder, module)
            recorder.suspended = True
            return
        if recorder.owner is None:
            raise RuntimeError("This is a copy of a private model: call make_private for it before training it.")
        if recorder.buffers.refused is not None:
            raise IsolationError(recorder.buffers.refused)
        begin_pass(recorder.owner, capturing=recorder.capturing)
        check_frozen_norms(recorder)
        check_frozen(recorder)
        recorder.on_pass()  # before whatever may refuse this batch for what it holds
        n = batch_size(args, kwargs)
        call = self._named(module, args, kwargs, n)
        if any(recorder.losses.trained_before(leaf, n) for leaf in tensors_in(call)):
            raise IsolationError(
                "The private model was given a tensor that requires a gradient: nothing clips or noises what trains "
                "the module before it. Make that module part of the private model, freeze it, or detach() the tensor."
            )
        recorder.parts.begin()
        tested = recorder.per_example and not recorder.capturing and self._test(module, args, kwargs, call, n)
        recorder.open(n)
        recorder.losses.begin(
            n, tested, recorder.leaves, looks=not recorder.capturing, per_example=recorder.per_example
        )
        recorder.losses.used = used_tokens(call, n) if recorder.padding_varies and not recorder.sizes_fixed else None
        forward_begins(recorder.owner)
        recorder.versions.begin()
        recorder.buffers.begin()

    def _test(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], call: Call, n: int) -> bool:
        """Try whether examples keep to themselves, where the batch is of a new kind or its turn has come.

        ``call`` is the same call with the names of all arguments.
        """
        recorder, seen = self.recorder, self.recorder.sizes.look(call, n)
        # What the model takes in no other number, may pass as long as there is no other.
        number = seen.number and bool(of_whole_batch(call, n))
        for name, place in seen.sideways.items():
            raise IsolationError(
                f"The argument {name} is as long as the batch in dimension {place}, and examples are expected in the "
                "first: move them there (transpose)."
            )
        call = set_apart(call, seen.tables)
        kind, earlier = self._kind(module, call, n, number), recorder.shared.changed(call, n) if n else {}
        # A loss of the model's own may choose among more examples than there were; others are followed in every batch.
        sizes, size = recorder.tested_sizes.setdefault(kind, set()), n.bit_length()
        wanted = kind not in recorder.tested or (bool(recorder.tested[kind]) and size not in sizes)
        if not wanted and recorder.padding_varies and not recorder.padding_tried:
            wanted = recorder.padding_untried(*((take(call, [0, 0], 1), 2) if n == 1 else (call, n)))
        if n == 0 or not (wanted or earlier or drawn_for_test()):
            if recorder.most_tried is not None and n > recorder.most_tried + recorder.most_tried // _GROWN:
                recorder.tested[kind] = check_larger(
                    module,
                    args,
                    kwargs,
                    n,
                    reduction=recorder.losses.reduction,
                    losses=recorder.tested[kind],
                    seen=seen,
                )
                recorder.most_tried = n
            recorder.losses.proven = recorder.tested.get(kind, frozenset())
            return False
        single = n == 1
        if single:
            # Micro-batches of one meet nobody, but are padded to the whole batch's width and may leave traces.
            (args, kwargs), n = take(as_tensors((args, kwargs), 1, seen.lists), [0, 0], 1), 2
        passed = check_isolation(
            module,
            args,
            kwargs,
            n,
            reduction=recorder.losses.reduction,
            padding_varies=recorder.padding_varies and not recorder.sizes_fixed,
            earlier=earlier,
            number_varies=not recorder.sizes_fixed,
            draws=1 if recorder.tested else _FIRST_DRAWS,
            copies=single,
            seen=seen,
            one_width=not (recorder.padding_varies or recorder.sizes_fixed or recorder.tested),
        )
        recorder.losses.proven = recorder.tested[kind] = passed.losses & recorder.tested.get(kind, passed.losses)
        sizes.add(size)
        recorder.most_tried = max(n, FEW, recorder.most_tried or 0) if passed.whole else None
        recorder.padding_tried |= passed.padding
        return True

    def _named(self, module: nn.Module, args: Any, kwargs: Any, n: int) -> Call:
        args, kwargs = as_tensors((args, kwargs), n, self.recorder.sizes.lists)
        if len(args) not in self._names:
            self._names[len(args)] = argument_names(module.forward, len(args))
        return named(self._names[len(args)], (args, kwargs))

    def _kind(self, model: nn.Module, call: Call, n: int, number: bool) -> Hashable:
        """The structure of the batch and of the model, and whether another ``number`` of examples must be taken."""
        recorder = self.recorder
        seen = widths(call, n)
        recorder.padding_varies |= recorder.widths is not None and seen != recorder.widths
        recorder.widths = seen
        return (
            structure(call, n),
            number,
            recorder.padding_varies,
            n == 1,
            n >= FEW,
            _standing(model),
            recorder.parts.standing(),
        )

    @torch.compiler.disable(reason=_REASON)
    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        recorder = self.recorder
        if recorder.tried:
            return
        forward_ends(recorder.owner)
        if not recorder.suspended and output is not None:
            recorder.versions.check()
            recorder.parts.check()
            self._test_rows(module, args, kwargs)
            self._test_buffers(module, args, kwargs)
            recorder.losses.returned(output)
            if recorder.losses.tested or recorder.losses.doubts:
                check_strangers(recorder)
            if recorder.current is not None and recorder.current.reentrant:
                _tie(output, recorder, recorder.current)
        recorder.suspended = False

    def _test_rows(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Where layers are given flattened rows, try again whenever an example has another number of them: examples of
        different length whose padding was taken out are told apart by nothing else. Try again, too, where a layer is
        the first time called, or left out: one example may have decided that for all."""
        found = self.recorder.current
        if found is None or found.rows < 2 or self.recorder.capturing or not self.recorder.per_example:
            return
        n = found.rows
        rows = tuple((slot.name, slot.rows // n) for slot in found.slots.values() if slot.rows > n)
        # By layer: the next phase trains another factor of the same.
        kinds: set[Hashable] = {(slot.name.rpartition(".")[0], slot.rows > 0) for slot in found.slots.values()}
        if rows:
            kinds.add((rows, widths((args, kwargs), n)))
        if unknown := kinds - self.recorder.tested.keys():
            if not self.recorder.losses.tested:
                seen = self.recorder.sizes.look(self._named(module, args, kwargs, n), n)
                check_isolation(
                    module,
                    args,
                    kwargs,
                    n,
                    reduction=self.recorder.losses.reduction,
                    number_varies=not self.recorder.sizes_fixed,
                    seen=seen,
                )
            self.recorder.tested.update(dict.fromkeys(unknown, frozenset()))

    def _test_buffers(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Try again where a forward has written to a buffer as none did before: its batch may hold something rare."""
        recorder = self.recorder
        if recorder.capturing or not recorder.per_example or not (written := recorder.buffers.unknown()):
            return
        if (n := batch_size(args, kwargs)) == 0:
            return
        call: Any = (*self._named(module, args, kwargs, n), None)
        try:
            for fill in (None, 0, 1):  # what is set for good shows beside one of the numbers
                with recorder.buffers.put_back(fill), Trials(module, None, self._names[len(args)]) as trials:
                    check_written(trials, call, n, ragged=fill is not None)
        except IsolationError as error:
            recorder.buffers.refused = str(error)
            raise
        recorder.buffers.know(written)


def _standing(model: nn.Module) -> Hashable:
    """What of a model decides what runs: which modules are in training, which private layers train, whose hooks."""
    modules = list(model.modules())
    return (
        bytes(module.training for module in modules),
        bytes(bool(module.private_parameters()) for module in modules if isinstance(module, PrivateModule)),
        *model._forward_pre_hooks,
        *model._forward_hooks,
    )


def _tie(output: Any, recorder: Recorder, found: Pass) -> None:
    """Have every backward from the model's output tell whose it is, before checkpointed layers run again."""
    for leaf in tensors_in(output):
        if leaf.requires_grad:
            leaf.register_hook(lambda gradient: recorder.check_current(found))


def is_watched(model: nn.Module) -> bool:
    """Whether it has the hooks, rather than a module in it or around it."""
    return any(isinstance(getattr(hook, "__self__", None), ModelHooks) for hook in model._forward_pre_hooks.values())


def watch(model: nn.Module, recorder: Recorder) -> None:
    """Put the hooks on ``model``."""
    passes = ModelHooks(recorder)
    before = model.register_forward_pre_hook(passes.before, with_kwargs=True)
    after = model.register_forward_hook(passes.after, with_kwargs=True, always_call=True)
    recorder.on_leave = [before.remove, after.remove]
