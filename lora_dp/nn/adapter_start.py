"""Which adapter there is, and how its factor A starts, by name; read without torch."""

from typing import Literal, TypeAlias, get_args

Adapter: TypeAlias = Literal["lora", "xs", "tangent"]
InitA: TypeAlias = Literal["kaiming", "orthonormal"]


def check_init_a(init_a: object) -> None:
    """Refuse what is no start of A.

    Raises:
        ValueError: it is none.
    """
    if init_a not in get_args(InitA):
        raise ValueError(f"init_a must be 'kaiming' or 'orthonormal', got {init_a!r}.")
