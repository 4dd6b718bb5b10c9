from . import losses as losses
from .auditing.audit import audit as audit
from .capabilities import Backend as Backend
from .capabilities import backends as backends
from .engine.cuda_graphs import GraphedStep as GraphedStep
from .engine.data_loader import PrivateDataLoader as PrivateDataLoader
from .engine.engine import PrivacyEngine as PrivacyEngine
from .engine.optimizer import PrivateOptimizer as PrivateOptimizer
from .errors import IsolationError as IsolationError
from .lora.config import LoRAConfig as LoRAConfig
from .lora.injection import inject_lora as inject_lora
from .lora.loading import load_adapter as load_adapter
from .lora.merging import merge_adapters as merge_adapters
from .lora.merging import unmerge_adapters as unmerge_adapters
from .lora.saving import save_adapter as save_adapter
from .nn.layers import DPEmbedding as DPEmbedding
from .nn.layers import DPLayerNorm as DPLayerNorm
from .nn.layers import DPLinear as DPLinear
from .nn.lora_linear import DPLoRALinear as DPLoRALinear
from .optim.adam_bc import AdamBC as AdamBC
from .optim.iterate_average import IterateAverage as IterateAverage
from .privacy.accounting import Ledger as Ledger
from .privacy.accounting import PrivacyBudgetExceeded as PrivacyBudgetExceeded
from .privacy.accounting import calibrate_noise_multiplier as calibrate_noise_multiplier
from .privacy.filtering import GaussianFilter as GaussianFilter
from .privacy.filtering import LaplacianFilter as LaplacianFilter

__version__: str
