// The CPU kernels in 512-bit vectors; compiled for AVX512.
#include "cpu_kernels.h"

namespace lora_dp {

const Kernels kAvx512Kernels = {"avx512", write_keystream<16>, write_gaussians<16>, write_update_tile<16>};

}  // namespace lora_dp
