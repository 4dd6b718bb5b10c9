"""Where adapters and private layers can go in a model: names are looked up, layers checked, before any moves."""

import contextlib
import difflib
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import nn

from lora_dp.lora import peft_format
from lora_dp.lora.bypassed_layers import always_bypassed, runs_once, sometimes_bypassed
from lora_dp.lora.config import ALL_LINEAR, LoRAConfig
from lora_dp.nn.layers import DPEmbedding, DPLayerNorm, DPLinear
from lora_dp.nn.private_module import PrivateModule, linear_features

_HEAD_NAMES = ("score", "classifier", "qa_outputs")  # those that PEFT trains whole for its classification tasks
# Subclasses with a forward of their own that computes what their base class does.
_SAME_FORWARD = {
    "timm.layers.linear.Linear",
    "timm.layers.norm.LayerNorm",
    "transformers.models.falcon.modeling_falcon.FalconLinear",
}


@dataclass
class Modules:
    """The modules of a model by name; one that stands in several places has several names.

    Attributes:
        names: every name of every module but the model itself.
        own: the first name of each module, by id.
        obstacles: why a module cannot be replaced, by id.
        doubtful: ids of modules that are sometimes not called, or run once for a whole batch: "all-linear" passes
            them over.
    """

    names: dict[str, nn.Module]
    own: dict[int, str]
    obstacles: dict[int, str]
    doubtful: set[int]

    @classmethod
    def of(cls, model: nn.Module) -> "Modules":
        names = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
        own: dict[int, str] = {}
        obstacles: dict[int, str] = {}
        doubtful: set[int] = set()
        for name, module in names.items():
            own.setdefault(id(module), name)
            path, _, child = name.rpartition(".")
            parent = model.get_submodule(path)
            obstacle = _obstacle(module, parent, child)
            if obstacle:
                obstacles[id(module)] = obstacle
            if sometimes_bypassed(parent, child):
                doubtful.add(id(module))
            if runs_once(parent, child):
                doubtful.update(id(beneath) for beneath in module.modules())
        return cls(names, own, obstacles, doubtful)

    def beneath(self, roots: Iterable[nn.Module]) -> dict[int, str]:
        """The given modules and all their descendants: name by id."""
        return {id(m): self.own[id(m)] for root in roots for m in root.modules()}


def is_linear(module: nn.Module) -> bool:
    """Whether it is an ``nn.Linear``, or Transformers' ``Conv1D``, told by name so as not to import Transformers."""
    kind = type(module)
    return isinstance(module, nn.Linear) or (kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."))


def _obstacle(module: nn.Module, parent: nn.Module, child: str) -> str | None:
    """Why the private kin of a Linear, Conv1D, LayerNorm or Embedding could not take its place."""
    if isinstance(module, PrivateModule):
        return None
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight without calling it"
    if isinstance(parent, nn.TransformerEncoderLayer) and is_linear(module):
        return "nn.TransformerEncoderLayer reads its weight without calling it in evaluation"
    if is_linear(module) and always_bypassed(parent, child):
        return f"{type(parent).__name__} reads its weight without calling it"
    kind = type(module)
    base = next((base for base in (nn.Linear, nn.LayerNorm, nn.Embedding) if isinstance(module, base)), None)
    if base is None and not is_linear(module):
        return None
    inherited = base is None or kind.forward is base.forward or f"{kind.__module__}.{kind.__name__}" in _SAME_FORWARD
    if not inherited or "forward" in vars(module):
        return f"its class {kind.__name__} has a forward of its own"
    if "weight" not in module._parameters:
        return "its weight is computed by a parametrization or by pruning: remove that first"
    return None


def _nearest(name: str, candidates: Iterable[str]) -> str:
    """The remedy after a wrong name: names like it, or some that there are."""
    depth = name.count(".") + 1
    endings = {".".join(c.split(".")[-k:]) for c in candidates for k in range(1, depth + 1)}
    close = difflib.get_close_matches(name, sorted(endings), n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    some = sorted(ending for ending in endings if not ending.isdigit() and "." not in ending)[:8]
    return "there are " + ", ".join(repr(c) for c in some) + "." if some else "there are none."


def find_roots(modules: Modules, names: Iterable[str]) -> list[str]:
    """The modules to train whole, by full name.

    Raises:
        ValueError: a name that matches nothing, or nothing with parameters.
    """
    holders = {n: m for n, m in modules.names.items() if next(m.parameters(), None) is not None}
    found: set[str] = set()
    for name in names:
        matches = [n for n in modules.names if peft_format.matches_target(n, [name])]
        if not matches:
            raise ValueError(f"trainable_modules: no module is named {name!r}; {_nearest(name, holders)}")
        trainable = [n for n in matches if n in holders]
        if not trainable:
            raise ValueError(f"trainable_modules: {name!r} has no parameters to train; leave it out.")
        found.update(modules.own[id(holders[n])] for n in trainable)
    return outermost(found)


def outermost(names: Iterable[str]) -> list[str]:
    """Those names that lie beneath no other."""
    kept: list[str] = []
    for name in sorted(names):
        if not any(name.startswith(f"{root}.") for root in kept):
            kept.append(name)
    return kept


def _output_heads(model: nn.Module) -> list[nn.Module]:
    """The output layer: Transformers' output embeddings, timm's classifier, or what PEFT takes for a head."""
    for getter in ("get_output_embeddings", "get_classifier"):
        with contextlib.suppress(NotImplementedError):
            found = getattr(model, getter, lambda: None)()
            heads = [head for head in (found if isinstance(found, tuple) else (found,)) if isinstance(head, nn.Module)]
            if heads:
                return heads
    return [head for name in _HEAD_NAMES if isinstance(head := getattr(model, name, None), nn.Module)]


def find_targets(model: nn.Module, modules: Modules, config: LoRAConfig, whole: Collection[int]) -> list[str]:
    """The layers to adapt, by full name, in the model's order.

    Args:
        model: the model.
        modules: its modules.
        config: whose ``target_modules``, ``exclude_modules`` and ``layers_to_transform`` say which.
        whole: ids of the modules to train whole.

    Raises:
        ValueError: a name that matches no linear layer, or only such as are trained whole; or nothing is left.
    """
    named = _named_targets(model, modules, config.target_modules, whole)
    excluded, blocks = config.exclude_modules, config.layers_to_transform
    for entry in excluded if isinstance(excluded, list) else []:
        if not any(peft_format.matches_target(name, [entry]) for name in modules.names):
            raise ValueError(f"exclude_modules: no module is named {entry!r}; {_nearest(entry, modules.names)}")
    left = [
        name
        for name in named
        if not peft_format.matches_target(name, excluded) and (blocks is None or _block_of(name) in blocks)
    ]
    if named and not left:
        raise ValueError(
            "exclude_modules and layers_to_transform leave none of the layers that target_modules names, the first "
            f"'{named[0]}': name fewer to leave out, or other blocks."
        )
    return left


def _block_of(name: str) -> int | None:
    """The number of a layer's block: the last in its name, as PEFT takes it."""
    found = re.match(r"(?:.*\.)?(\d+)\.", name)
    return int(found[1]) if found else None


def _named_targets(model: nn.Module, modules: Modules, wanted: list[str] | str, whole: Collection[int]) -> list[str]:
    linear = {n: m for n, m in modules.names.items() if is_linear(m)}
    if wanted == ALL_LINEAR:
        skipped = {*whole, *modules.beneath(_output_heads(model)), *modules.obstacles, *modules.doubtful}
        found = [n for n, m in linear.items() if id(m) not in skipped]
        if not found:
            refused = [
                f": '{n}' is none, since {modules.obstacles[id(m)]}"
                for n, m in linear.items()
                if id(m) in modules.obstacles
            ]
            raise ValueError(
                f"There is no linear layer to adapt outside trainable_modules and the head{''.join(refused[:1])}."
            )
        return _own_names(found, modules)
    found = []
    for entry in [wanted] if isinstance(wanted, str) else wanted:
        pattern = entry if isinstance(wanted, str) else [entry]
        matches = [n for n in linear if peft_format.matches_target(n, pattern)]
        if not matches:
            hint = f" (a regular expression for full names; for a name write [{entry!r}])" if pattern is entry else ""
            raise ValueError(f"target_modules: no Linear or Conv1D is named {entry!r}{hint}; {_nearest(entry, linear)}")
        matches = [n for n in matches if id(linear[n]) not in whole]
        if not matches:
            raise ValueError(f"target_modules: {entry!r} lies within trainable_modules; leave it out of one of them.")
        found += matches
    return _own_names(found, modules)


def _own_names(names: Iterable[str], modules: Modules) -> list[str]:
    own = {modules.own[id(modules.names[name])] for name in names}
    return [name for name in modules.names if name in own]


def check_targets(targets: Iterable[str], modules: Modules) -> None:
    """Raise ValueError for a layer that cannot be adapted."""
    for name in targets:
        module = modules.names[name]
        obstacle = modules.obstacles.get(id(module))
        if obstacle:
            raise ValueError(f"'{name}' cannot carry an adapter, since {obstacle}: leave it out of target_modules.")


def check_rank_fits(targets: Iterable[str], modules: Modules, r: int) -> None:
    """Raise ValueError for a layer whose updates have no rank as high as ``r``."""
    for name in targets:
        in_features, out_features = linear_features(modules.names[name])
        if r > min(in_features, out_features):
            raise ValueError(
                f"Rank {r} is above the size of '{name}' ({in_features} → {out_features}): choose r ≤ "
                f"{min(in_features, out_features)}, or name target_modules without it."
            )


def private_kin(name: str, module: nn.Module, modules: Modules) -> PrivateModule:
    """The private layer that trains ``module`` whole.

    Raises:
        ValueError: there is none.
    """
    if isinstance(module, PrivateModule):
        return module
    obstacle = modules.obstacles.get(id(module))
    try:
        if obstacle is None and is_linear(module):
            return DPLinear.from_linear(module)
        if obstacle is None and isinstance(module, nn.LayerNorm):
            return DPLayerNorm.from_layer_norm(module)
        if obstacle is None and isinstance(module, nn.Embedding):
            return DPEmbedding.from_embedding(module)
    except ValueError as error:
        raise ValueError(f"'{name}' cannot be trained in private: {error}") from error
    own = ", ".join(leaf for leaf, parameter in module._parameters.items() if parameter is not None)
    reason = obstacle or (
        f"no private layer covers {own} of a {type(module).__name__} (one does for Linear, LayerNorm and Embedding)"
    )
    raise ValueError(f"'{name}' cannot be trained in private, since {reason}: leave it out of trainable_modules.")


def check_untied(model: nn.Module, trained: Collection[int]) -> None:
    """Raise ValueError for a parameter to train (by id) that stands in two modules: one would give plain gradients."""
    owners: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None or id(parameter) not in trained:
                continue
            name = f"{prefix}.{leaf}" if prefix else leaf
            if id(parameter) in owners:
                raise ValueError(
                    f"'{owners[id(parameter)]}' and '{name}' are one parameter (tied weights), which cannot be trained "
                    "in private: untie them, or leave them frozen."
                )
            owners[id(parameter)] = name


def has_private_bias(module: nn.Module, modules: Modules) -> bool:
    """Whether a private layer can train the bias that ``module`` has."""
    if id(module) in modules.obstacles:
        return False
    if isinstance(module, nn.LayerNorm):
        return len(module.normalized_shape) == 1
    return is_linear(module) or isinstance(module, DPLinear | DPLayerNorm)
