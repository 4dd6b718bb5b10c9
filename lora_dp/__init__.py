"""LoRA fine-tuning under differential privacy: private layers, an engine that keeps its ε, a federation on top."""

import lazy_loader

# The names and their homes are in __init__.pyi. Each is imported, and torch with it, when it is first asked for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
