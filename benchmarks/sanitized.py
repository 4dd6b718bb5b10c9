"""Every kernel once at sizes that no block divides, in little memory: what compute-sanitizer watches.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m benchmarks.sanitized
"""

import torch

from benchmarks.kernel_cases import (
    DTYPES,
    clip_case,
    gradient_case,
    gram_case,
    native_case,
    noise_case,
    product_case,
    skinny_case,
    update_case,
)
from lora_dp.ops.native import native

ADAPTERS = (3, (37, 5), 3)


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda")
    cases = [clip_case(ADAPTERS)]
    for dtype in DTYPES:
        cases += [
            skinny_case(70, 83, 5, dtype),
            update_case(70, 83, 5, dtype),
            product_case(70, 83, 75, 5, dtype),
            gradient_case(3, 37, 83, 5, True, dtype),
            gradient_case(3, 37, 83, 5, False, dtype),
            gradient_case(1, 600, 83, 5, True, dtype),
            gram_case(3, 37, 41, 5, dtype),
            noise_case(ADAPTERS, dtype),
        ]
    if native.cuda:
        cases += [native_case(ADAPTERS, dtype) for dtype in DTYPES]
    for case in cases:
        next(iter(case.ways.values()))(*case.inputs(device))
        torch.cuda.synchronize()
    print(f"{len(cases)} launches of kernels ended")


if __name__ == "__main__":
    main()
