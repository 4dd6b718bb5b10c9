"""The kernels' own runs: in Triton's interpreter (TRITON_INTERPRET=1, on a CPU), or compiled, on a GPU."""

import pytest
import torch

from lora_dp.kernels.launching import INTERPRETED


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    if INTERPRETED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("kernels run on an NVIDIA GPU, or on a CPU with TRITON_INTERPRET=1")
    return torch.device("cuda")
