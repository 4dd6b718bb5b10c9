"""LoRA fine-tuning under differential privacy: private layers, an engine that keeps its ε, a federation on top."""

from lora_dp.accounting import Ledger, PrivacyBudgetExceeded
from lora_dp.adapters import LoRAConfig
from lora_dp.data_loader import PrivateDataLoader
from lora_dp.engine import PrivacyEngine
from lora_dp.errors import IsolationError
from lora_dp.filtering import GaussianFilter, LaplacianFilter
from lora_dp.injection import inject_lora
from lora_dp.layers import DPEmbedding, DPLayerNorm, DPLinear, DPLoRALinear
from lora_dp.loading import load_adapter
from lora_dp.machine import Backend, backends
from lora_dp.merging import merge_adapters, unmerge_adapters
from lora_dp.optimizer import PrivateOptimizer
from lora_dp.saving import save_adapter

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "DPEmbedding",
    "DPLayerNorm",
    "DPLinear",
    "DPLoRALinear",
    "GaussianFilter",
    "IsolationError",
    "LaplacianFilter",
    "Ledger",
    "LoRAConfig",
    "PrivacyBudgetExceeded",
    "PrivacyEngine",
    "PrivateDataLoader",
    "PrivateOptimizer",
    "backends",
    "inject_lora",
    "load_adapter",
    "merge_adapters",
    "save_adapter",
    "unmerge_adapters",
]
