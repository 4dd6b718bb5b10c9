"""What an engine keeps of one private model between passes: the recorded gradients, and what its batches were like."""

from collections.abc import Callable, Hashable
from typing import Any

from torch import nn

from lora_dp.isolation.batches.padding import narrowed
from lora_dp.isolation.batches.shared_arguments import SharedArguments
from lora_dp.isolation.batches.sizes import Sizes
from lora_dp.isolation.loss_checks.watch import LossWatch
from lora_dp.isolation.model_state.buffers import KeptBuffers
from lora_dp.isolation.model_state.parameters import Held, Versions
from lora_dp.isolation.model_state.parts import ModelParts
from lora_dp.nn.per_example import Pass, PassRecorder
from lora_dp.nn.private_module import pass_recorder_of
from lora_dp.privacy.accounting.history import History


class Recorder(PassRecorder):
    """Connects the private layers of one model with the engine: says what to record, holds what came.

    Attributes:
        frozen: name of each parameter that required no gradient when the model was made private, and what holds it.
        frozen_norms: name and module of each BatchNorm of the model, all of them frozen.
        owner: the private optimizer for which the model records; ``on_pass``, called as a training forward begins.
        losses: what is followed of the losses that are differentiated; ``versions``, how often parameters were written
            to; ``parts``, which modules it is made of; ``buffers``, to which buffers forwards wrote.
        tested: structures of batches that have passed the isolation check, with the losses of the model's that did.
        tested_sizes: lengths in bits of the numbers of examples that these batches had.
        most_tried: the largest number of examples of which the whole batch was compared with a part of it; None where
            that cannot be.
        sizes_fixed: whether neither the number of rows of a batch nor the padding of an example hangs on others: then
            neither is tried.
        padding_varies: whether batches are padded to different widths, as far as is known; ``padding_tried``, whether
            a batch came in which that could be tried.
        widths: of the sequences of the last batch.
        sizes, shared: of the arguments of all batches; what among them all examples share.
        released: whose steps have moved the model, or None; the last engine's.
        capturing: inside the capture of a CUDA graph, in which nothing can be tried.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frozen: list[Held] = []
        self.frozen_norms: list[tuple[str, nn.Module]] = []
        self.owner: object | None = None
        self.released: History | None = None
        self.on_pass: Callable[[], None] = lambda: None
        self.losses = LossWatch()
        self.losses.after_backward = lambda: self.versions.check_backward()
        self.versions, self.parts, self.buffers = Versions(), ModelParts(), KeptBuffers()
        self.sizes_fixed = self.capturing = False
        self.forget_batches()

    def __reduce__(self) -> tuple[type["Recorder"], tuple[()]]:
        # A copied or unpickled model starts unowned: what is recorded belongs to one optimizer and these very tensors.
        return Recorder, ()

    def take(self) -> Pass:
        """As :meth:`~lora_dp.nn.per_example.PassRecorder.take`; losses that were followed are forgotten with it."""
        self.losses.forget()
        return super().take()

    def discard(self) -> None:
        """As :meth:`~lora_dp.nn.per_example.PassRecorder.discard`; losses that were followed are forgotten with it."""
        super().discard()
        self.losses.forget()

    def forget_batches(self) -> None:
        """Forget what is remembered of earlier batches and of their losses."""
        self.tested: dict[Hashable, frozenset[int]] = {}
        self.tested_sizes: dict[Hashable, set[int]] = {}
        self.most_tried: int | None = None
        self.padding_varies = self.padding_tried = False
        self.widths: Hashable = None
        self.sizes = Sizes()
        self.shared = SharedArguments()
        self.losses.forget_batches()

    def padding_untried(self, call: Any, n: int) -> bool:
        """Whether this batch is the first in which less padding can be tried."""
        wanted = self.padding_varies and not (self.padding_tried or self.sizes_fixed)
        return wanted and n > 1 and next(narrowed(call, n, masks=self.sizes.masks), None) is not None

    def expect_padding(self) -> None:
        """Told by the loader: its batches are padded to different widths."""
        self.padding_varies = True


def recorder_of(model: nn.Module) -> Recorder | None:
    """The recorder that an engine gave the private layers of ``model``, if any."""
    found = pass_recorder_of(model)
    assert found is None or isinstance(found, Recorder)
    return found
