"""The federated methods, by name."""

import difflib

from lora_dp.fed.methods.base import Aggregation, Method, Phases, State, WeightedAverage, factor
from lora_dp.fed.methods.dp_lora import DPLoRA
from lora_dp.fed.methods.ffa_lora import FFALoRA
from lora_dp.fed.methods.la_lora import LALoRA
from lora_dp.fed.methods.rolora import RoLoRA

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (LALoRA, DPLoRA, FFALoRA, RoLoRA)}


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"There is no method {name!r}: choose {', '.join(METHODS)}.{hint}")
    return METHODS[name]()


__all__ = [
    "METHODS", "Aggregation", "DPLoRA", "FFALoRA", "LALoRA", "Method", "Phases", "RoLoRA", "State", "WeightedAverage",
    "factor", "get_method",
]
