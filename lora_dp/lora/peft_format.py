"""Adapters on disk as PEFT keeps them: ``adapter_config.json`` and ``adapter_model.safetensors``.

Only files and names are handled here, no model. A parameter that our models call ``x.lora_A`` is stored as
``base_model.model.x.lora_A.weight``.
"""

import json
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Settings of PEFT's that say nothing about what the adapted model computes, or that the layers themselves tell.
_NOTES = {
    "auto_mapping",
    "fan_in_fan_out",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}
_READ = {
    "base_model_name_or_path",
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "target_modules",
    "use_rslora",
}
# Other ways to initialise also change the weights beneath the adapter.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal")


@dataclass
class StoredAdapter:
    """What the two files of an adapter say.

    Attributes:
        r: rank.
        alpha: numerator of the scaling.
        target_modules: names or name endings of the adapted layers, or a regular expression for their full names.
        modules_to_save: name endings of the modules that are trained whole.
        dropout: probability on the adapter's input.
        rslora: whether the scaling is alpha / √r.
        bias: "none", "all" or "lora_only".
        fan_in_fan_out: whether the adapted layers are GPT-2's Conv1D.
        base_model: name or path of the model beneath, if known.
        tensors: by PEFT's keys.
    """

    r: int
    alpha: float
    target_modules: list[str] | str
    modules_to_save: list[str]
    dropout: float
    rslora: bool
    bias: str
    fan_in_fan_out: bool
    base_model: str | None
    tensors: dict[str, Tensor]


def write(folder: str | os.PathLike[str], adapter: StoredAdapter) -> None:
    """Write an adapter to ``folder``, which is made if need be.

    A new folder appears whole; in one that exists each of the two files is replaced in one piece.
    """
    target = Path(folder).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    config = {
        "base_model_name_or_path": adapter.base_model,
        "bias": adapter.bias,
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "inference_mode": True,
        "lora_alpha": int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "modules_to_save": adapter.modules_to_save or None,
        "peft_type": "LORA",
        "r": adapter.r,
        "target_modules": adapter.target_modules,
        "task_type": None,
        "use_rslora": adapter.rslora,
    }
    tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in adapter.tensors.items()}
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        staged = Path(scratch) / "adapter"
        staged.mkdir()
        (staged / WEIGHTS_NAME).write_bytes(save(tensors, metadata={"format": "pt"}))
        (staged / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            _flush(staged / name)
        if target.exists():
            for name in (WEIGHTS_NAME, CONFIG_NAME):
                os.replace(staged / name, target / name)
        else:
            os.rename(staged, target)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read(folder: str | os.PathLike[str]) -> StoredAdapter:
    """Read an adapter that PEFT or :func:`write` stored.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: it is not a LoRA adapter, or has an option that is not supported here; by name.
    """
    source = Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (source / name).is_file():
            raise FileNotFoundError(
                f"{source} holds no {name}: give a folder written by save_adapter, or by PEFT's save_pretrained "
                "with safetensors."
            )
    try:
        config: dict[str, Any] = json.loads((source / CONFIG_NAME).read_text())
    except ValueError as error:
        raise ValueError(f"{source / CONFIG_NAME} is not JSON ({error}): save the adapter again.") from error
    _check_types(config, str(source / CONFIG_NAME))
    again = "save the adapter again with PEFT or save_adapter"
    _check_supported(config, str(source / CONFIG_NAME), "train a plain LoRA adapter without it", again)
    targets, bias = config["target_modules"], config.get("bias", "none")
    try:
        tensors = load_file(source / WEIGHTS_NAME)
    except SafetensorError as error:
        raise ValueError(f"{source / WEIGHTS_NAME} is damaged ({error}): save the adapter again.") from error
    tensors = {key: tensor for key, tensor in tensors.items() if not _is_repeated(key, tensors)}
    return StoredAdapter(
        r=config.get("r", 8),
        alpha=float(config.get("lora_alpha", 8)),
        target_modules=targets if isinstance(targets, str) else sorted(targets),
        modules_to_save=list(config.get("modules_to_save") or []),
        dropout=float(config.get("lora_dropout", 0.0)),
        rslora=bool(config.get("use_rslora", False)),
        bias=bias,
        fan_in_fan_out=bool(config.get("fan_in_fan_out", False)),
        base_model=config.get("base_model_name_or_path"),
        tensors=tensors,
    )


def settings_of(config: Any) -> dict[str, Any]:
    """What a ``peft.LoraConfig`` sets, by the names that :class:`lora_dp.LoRAConfig` takes.

    Raises:
        ValueError: an option that is not supported here; by name.
    """
    given = {name: list(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    given["peft_type"] = str(getattr(given["peft_type"], "value", given["peft_type"]))
    what = f"The {type(config).__name__}"
    init = given.get("init_lora_weights", True)
    if init not in (True, "orthogonal"):
        raise ValueError(
            f"{what} sets init_lora_weights={init!r}, which get_peft_model does: give its model to make_private."
        )
    peft_does = "give make_private the model of get_peft_model"
    _check_supported(
        given,
        what,
        f"leave it out, or, for patterns of ranks and scalings, {peft_does}",
        f"name the layers, or {peft_does}, which knows them by the model",
        also_read=("exclude_modules", "layers_to_transform"),
    )
    names = ("r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "target_modules", "modules_to_save")
    settings = {name: given[name] for name in (*names, "exclude_modules", "layers_to_transform")}
    return {**settings, "init_a": "orthonormal" if init == "orthogonal" else "kaiming"}


def _check_types(config: Any, path: str) -> None:
    if not isinstance(config, dict):
        raise ValueError(f"{path} does not describe an adapter: save the adapter again.")
    names = "a list of names"
    for key, kinds, what in (
        ("r", int, "a whole number"),
        ("lora_alpha", int | float, "a number"),
        ("lora_dropout", int | float, "a number"),
        ("bias", str, "a word"),
        ("use_rslora", bool, "true or false"),
        ("target_modules", list | str | None, names),
        ("modules_to_save", list | None, names),
    ):
        if key not in config:
            continue
        value = config[key]
        right = isinstance(value, kinds) and isinstance(value, bool) == (kinds is bool)
        if not right or (isinstance(value, list) and not all(isinstance(name, str) for name in value)):
            raise ValueError(f"{path} sets {key} to {value!r}, which is not {what}: save the adapter again.")


def _is_repeated(key: str, keys: Collection[str]) -> bool:
    """Biases and embeddings of modules_to_save may be stored again as they were, and under a wrapper's name."""
    parts = re.split(r"\.(?:original_module|modules_to_save)\.", key)
    if len(parts) != 2:
        return False
    module, leaf = parts
    return f"{module}.{leaf}" in keys or f"{module}.{leaf.partition('.')[2]}" in keys  # without the adapter's name


def _check_supported(
    config: dict[str, Any], what: str, remedy: str, without_targets: str, also_read: Collection[str] = ()
) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{what} describes a {config.get('peft_type')!r} adapter: only 'LORA' is supported.")
    init = config.get("init_lora_weights", True)
    unsupported = {} if init in _PLAIN_INITS else {"init_lora_weights": init}
    for key, value in config.items():
        # Not plain falsehood: 0 is a layer's number.
        unset = value is None or value is False or value in ("", [], {})
        if key not in {*_READ, *_NOTES, *also_read} and not unset:
            unsupported[key] = value
    if unsupported:
        options = ", ".join(f"{key}={value!r}" for key, value in sorted(unsupported.items()))
        raise ValueError(f"{what} sets {options}, which is not supported: {remedy}.")
    # Ours may adapt nothing beside modules that are trained whole; PEFT itself has no such adapter.
    if not (config.get("target_modules") or (config.get("target_modules") == [] and config.get("modules_to_save"))):
        raise ValueError(f"{what} names no target_modules: {without_targets}.")


def peft_key(name: str, adapted: Collection[str]) -> str:
    """PEFT's key for the parameter ``name``, where ``adapted`` are the layers that carry an adapter."""
    owner, _, leaf = name.rpartition(".")
    if owner in adapted:
        name = f"{name}.weight" if leaf in ("lora_A", "lora_B") else f"{owner}.base_layer.{leaf}"
    return PREFIX + name


def parameter_name(key: str) -> str:
    """The inverse of :func:`peft_key` for what is no LoRA factor."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")


def _endings(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(len(parts)))


def matches_target(name: str, targets: Collection[str] | str) -> bool:
    """PEFT's rule for target_modules: an ending from dot to dot, or a regular expression for the whole name."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(ending in targets for ending in _endings(name))


def matches_saved_module(name: str, modules_to_save: Iterable[str]) -> bool:
    """PEFT's rule for modules_to_save: any ending, even within a word."""
    return any((PREFIX + name).endswith(entry) for entry in modules_to_save)


def target_modules_for(adapted: Sequence[str], names: Iterable[str]) -> list[str] | str:
    """How to make PEFT adapt exactly ``adapted`` of all module ``names``."""
    exact = set(adapted)
    if all(name in exact or not matches_target(name, exact) for name in names):
        return sorted(exact)
    return "|".join(re.escape(name) for name in sorted(exact))


def modules_to_save_for(roots: Sequence[str], names: Sequence[str]) -> list[str]:
    """How to make PEFT train exactly the modules ``roots`` of all module ``names``."""
    return [
        root if all(name == root or not matches_saved_module(name, [root]) for name in names) else PREFIX + root
        for root in roots
    ]
