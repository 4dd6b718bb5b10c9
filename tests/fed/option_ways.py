"""The ways in which options of a run are given."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from lora_dp.fed.config import RunConfig
from lora_dp.fed.flower.server import options_of

GROUPS: dict[str, Any] = {group.name: group.default_factory for group in dataclasses.fields(RunConfig)}
HINTS = {name: (group, hint) for group in GROUPS.values() for name, hint in get_type_hints(group).items()}


def choices(hint: Any) -> tuple[str, ...]:
    """The words among which an option is one, if it is; none where it may be a list as well."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if any(get_origin(part) is list for part in get_args(hint)):
        return ()
    return tuple(word for part in get_args(hint) for word in choices(part))


def written(name: str) -> str:
    return "model" if name == "name" else name


def by_constructor(name: str, value: Any) -> Any:
    return HINTS[name][0](**{name: value})


def by_flat(name: str, value: Any) -> Any:
    return RunConfig.from_flat({written(name): value})


def by_yaml(name: str, value: Any) -> Any:
    return RunConfig.from_flat(yaml.safe_load(yaml.safe_dump({written(name): value})))


def by_flower(name: str, value: Any) -> Any:
    return options_of({written(name).replace("_", "-"): value})


WAYS: list[Callable[[str, Any], Any]] = [by_constructor, by_flat, by_yaml, by_flower]
CHOSEN = sorted(name for name, (_, hint) in HINTS.items() if choices(hint))
