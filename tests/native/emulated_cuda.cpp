// csrc/cuda_kernels.cu on a CPU: a block is 128 threads with a barrier, blocks run one after the other. It shows that the
// kernels compute what they should; not what nvcc makes of them, nor how fast.
#include <atomic>
#include <barrier>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __restrict__
#define __shared__

struct Index {
    unsigned x;
};
thread_local Index threadIdx, blockIdx;

using cudaError_t = int;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1;
int cudaGetLastError() { return cudaSuccess; }
const char *cudaGetErrorString(cudaError_t status) { return status == cudaSuccess ? "no error" : "invalid value"; }

std::barrier<> *block_barrier;
void __syncthreads() { block_barrier->arrive_and_wait(); }

namespace {

// A real block has at most 48 KiB without asking for more; what lies beyond must stay as it is.
constexpr std::size_t kSharedBytes = 48 * 1024;
constexpr std::int64_t kUntouched = 0x5a5a5a5a5a5a5a5a;
std::int64_t shared[kSharedBytes / 8 + 1024];
std::atomic<bool> out_of_bounds{false};

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, unsigned blocks, std::size_t shared_bytes, Arguments... arguments) {
    constexpr int threads = 128;
    if (shared_bytes > kSharedBytes) out_of_bounds = true;
    for (std::int64_t &word : shared) word = kUntouched;
    std::barrier<> barrier(threads);
    block_barrier = &barrier;
    std::vector<std::thread> team;
    for (unsigned t = 0; t < threads; ++t) {
        team.emplace_back([=, &barrier] {
            threadIdx.x = t;
            for (unsigned block = 0; block < blocks; ++block) {
                blockIdx.x = block;
                kernel(arguments...);
                barrier.arrive_and_wait();
            }
        });
    }
    for (std::thread &member : team) member.join();
    for (std::size_t i = (shared_bytes + 7) / 8; i < sizeof shared / 8; ++i) {
        if (shared[i] != kUntouched) out_of_bounds = true;
    }
}

}  // namespace

#define LORA_DP_LAUNCH(kernel, blocks, shared_bytes, stream, ...) \
    (static_cast<void>(stream), launch(kernel, blocks, shared_bytes, __VA_ARGS__))

#include "../../csrc/cuda_kernels.cu"

namespace {

lora_dp::Stream key_stream(const std::uint8_t *key) {
    lora_dp::Stream stream = {{0x61707865, 0x3320646e, 0x79622d32, 0x6b206574}};
    memcpy(stream.words + 4, key, 32);
    return stream;
}

}  // namespace

extern "C" {

int emulated_keystream(const std::uint8_t *key, const std::uint8_t *nonce, std::uint32_t counter, std::uint8_t *out,
                       std::int64_t n_bytes) {
    lora_dp::Stream stream = key_stream(key);
    memcpy(stream.words + 13, nonce, 12);
    return lora_dp::keystream_on_cuda(stream, counter, reinterpret_cast<std::uintptr_t>(out), n_bytes, 0);
}

int emulated_gaussians(const std::uint8_t *key, std::uint32_t parameter, std::uint64_t draw, double scale, std::int64_t n,
                       std::int64_t *out) {
    return lora_dp::gaussians_on_cuda(key_stream(key), parameter, draw, scale, n, reinterpret_cast<std::uintptr_t>(out),
                                      0);
}

int emulated_update(const std::uint8_t *key, std::uint64_t draw, const void *rows, const double *hyper, std::int64_t count,
                    std::int64_t optimizer, int noisy, double scale, double step, double expected_batch_size,
                    const double *weights) {
    const lora_dp::Update update{count, optimizer, draw, noisy != 0, scale, step, expected_batch_size, weights};
    const auto *table = static_cast<const lora_dp::Row *>(rows);
    const int status = lora_dp::update_on_cuda(key_stream(key), update, table, table, hyper, 0);
    return out_of_bounds ? -1 : status;
}

}  // extern "C"
