"""A pytest plugin for PEFT's own tests: models that ``get_peft_model`` gives LoRA are made private in place.

``nox -s peft-tests`` runs them. Of all tests those of plain ``LoraConfig`` are kept. A model that is refused by name
skips its test, with the refusal as the reason.
"""

from typing import Any

import peft
import pytest

from lora_dp.lora.peft_layers import DPPeftLinear, adopt_peft_layers

_LORA = ("-LoraConfig", "[LoraConfig")
_get_peft_model = peft.get_peft_model
adopted = 0


def _get_private_model(model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
    global adopted
    made = _get_peft_model(model, peft_config, *args, **kwargs)
    if isinstance(peft_config, peft.LoraConfig):
        try:
            adopt_peft_layers(made)
        except ValueError as refusal:
            pytest.skip(f"refused: {refusal}")
        adopted += any(isinstance(module, DPPeftLinear) for module in made.modules())
    return made


def pytest_configure() -> None:
    for module in (peft, peft.mapping_func, peft.auto):
        if hasattr(module, "get_peft_model"):
            module.get_peft_model = _get_private_model


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if any(name in item.nodeid for name in _LORA)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"models with private layers: {adopted}")
