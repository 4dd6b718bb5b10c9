// What lets one header serve the C++ and the CUDA compiler.
#pragma once

#if defined(__CUDACC__)
#define LORA_DP_BOTH __host__ __device__ __forceinline__
#else
#define LORA_DP_BOTH inline
#endif

#include <cstdint>
#include <cstring>

// Internal linkage: each translation unit is compiled for its own instruction set, and none may borrow another's code.
namespace {

LORA_DP_BOTH double as_double(std::uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

LORA_DP_BOTH std::uint64_t as_bits(double value) {
    std::uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

}  // namespace
