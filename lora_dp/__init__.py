"""LoRA fine-tuning under differential privacy: private layers, an engine that keeps its ε, a federation on top."""

import lazy_loader

# The names and their homes are in __init__.pyi. Each is imported, and torch with it, when it is first asked for.
_find, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    try:
        return _find(name)
    except AttributeError:
        from lora_dp.opacus_names import OF_PACKAGE

        if name in OF_PACKAGE:
            # "from lora_dp import …" has words of its own for an AttributeError.
            raise ImportError(f"'{name}' is Opacus' name: write {OF_PACKAGE[name]}.") from None
        raise


__version__ = "0.1.0"
