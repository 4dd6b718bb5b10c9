"""The hooks on a private model as a whole: a recorded pass begins with each training forward.

They stay outside what torch.compile compiles: a pass is ordinary Python, and only its leaves are seen by the graph.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lora_dp.coverage import batch_size
from lora_dp.isolation import check_isolation, has_uneven_tokens
from lora_dp.recording import Pass, Recorder
from lora_dp.secret_state import begin_pass

_REASON = ("a private pass begins outside the compiled graph: to compile a bare container of torch, such as "
           "nn.Sequential, put it into a module of your own")


class Passes:
    """Methods rather than closures, so that a copy of the model has hooks of its own."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder

    @torch.compiler.disable(reason=_REASON)
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder = self.recorder
        if not (module.training and torch.is_grad_enabled()):
            recorder.suspended = True
            return
        if recorder.owner is None:
            raise RuntimeError("This is a copy of a private model: call make_private for it before training it.")
        begin_pass(recorder.owner)
        n = batch_size(args, kwargs)
        uneven = not recorder.uneven_checked and has_uneven_tokens(kwargs)
        if n > 1 and (uneven or not recorder.isolation_checked):
            check_isolation(module, args, kwargs, n)
            recorder.isolation_checked = True
            recorder.uneven_checked |= uneven
        recorder.open(n)

    @torch.compiler.disable(reason=_REASON)
    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        recorder = self.recorder
        if not recorder.suspended and recorder.current is not None and recorder.current.reentrant:
            _tie(output, recorder, recorder.current)
        recorder.suspended = False


def _tie(output: Any, recorder: Recorder, found: Pass) -> None:
    """Have every backward from the model's output tell whose it is, before checkpointed layers run again."""
    for leaf in pytree.tree_leaves(dict(output) if isinstance(output, dict) else output):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            leaf.register_hook(lambda gradient: recorder.check_current(found))


def watch(model: nn.Module, recorder: Recorder) -> None:
    """Put the hooks on ``model``."""
    passes = Passes(recorder)
    model.register_forward_pre_hook(passes.before, with_kwargs=True)
    model.register_forward_hook(passes.after, always_call=True)
