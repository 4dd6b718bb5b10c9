// The CPU kernels in 256-bit vectors; compiled for AVX2.
#include "cpu_kernels.h"

namespace lora_dp {

const Kernels kAvx2Kernels = {"avx2", write_keystream<8>, write_gaussians<8>, write_update_tile<8>};

}  // namespace lora_dp
