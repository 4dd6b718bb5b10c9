"""LoRA fine-tuning under differential privacy: private layers, an engine that keeps its ε, a federation on top."""

from lora_dp.capabilities import Backend, backends
from lora_dp.engine.data_loader import PrivateDataLoader
from lora_dp.engine.engine import PrivacyEngine
from lora_dp.engine.optimizer import PrivateOptimizer
from lora_dp.errors import IsolationError
from lora_dp.lora.adapters import LoRAConfig
from lora_dp.lora.injection import inject_lora
from lora_dp.lora.loading import load_adapter
from lora_dp.lora.merging import merge_adapters, unmerge_adapters
from lora_dp.lora.saving import save_adapter
from lora_dp.nn.layers import DPEmbedding, DPLayerNorm, DPLinear, DPLoRALinear
from lora_dp.privacy.accounting import Ledger, PrivacyBudgetExceeded
from lora_dp.privacy.filtering import GaussianFilter, LaplacianFilter

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
