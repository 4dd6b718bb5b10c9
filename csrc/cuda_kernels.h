// What runs on a GPU: the same streams, the same numbers and the same arithmetic as on a CPU. Every function queues one
// launch on a stream and returns CUDA's status. The key travels as a kernel's argument, in no buffer of ours.
#pragma once

#include "kernels.h"

namespace lora_dp {

constexpr std::int64_t kTileOnCuda = 1024;
// Neighbours on either side that a tile's shared memory has room for: reach * stride.
constexpr std::int64_t kMostHaloOnCuda = 2048;

// A whole number of words.
int keystream_on_cuda(const Stream &stream, std::uint32_t counter, std::uintptr_t out, std::int64_t n_bytes,
                      std::uintptr_t cuda_stream);

int gaussians_on_cuda(const Stream &key, std::uint32_t parameter, std::uint64_t draw, double scale, std::int64_t n,
                      std::uintptr_t out, std::uintptr_t cuda_stream);

// device_rows holds what rows does, on the device, and so do device_hyper and update.weights.
int update_on_cuda(const Stream &key, const Update &update, const Row *rows, const Row *device_rows,
                   const double *device_hyper, std::uintptr_t cuda_stream);

const char *cuda_error(int status);

}  // namespace lora_dp
