// The CUDA kernels and their launches. tests/native/emulated_cuda.cpp compiles this file for a CPU.
#include "cuda_kernels.h"

#include "gaussian_blocks.h"

namespace {

using lora_dp::kTileOnCuda;
using lora_dp::kValuesPerBlock;
using lora_dp::Row;
using lora_dp::Stream;
using lora_dp::Update;

constexpr int kThreads = 128;

#if !defined(LORA_DP_LAUNCH)
#define LORA_DP_LAUNCH(kernel, blocks, shared_bytes, stream, ...) \
    kernel<<<blocks, kThreads, shared_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

__global__ void __launch_bounds__(kThreads) keystream_kernel(Stream stream, std::uint32_t counter, std::uint32_t *out,
                                                             std::int64_t n_words) {
    const std::int64_t b = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (16 * b >= n_words) return;
    std::uint32_t words[16];
    chacha20_block(stream, counter + static_cast<std::uint32_t>(b), words);
    for (int w = 0; w < 16 && 16 * b + w < n_words; ++w) out[16 * b + w] = words[w];
}

// The rounded Gaussians of one block.
__device__ __forceinline__ void gaussians_of_block(const NoiseStreams &streams, std::uint32_t block, double scale,
                                                   std::int64_t out[8]) {
    std::uint32_t words[16];
    chacha20_block(streams.leading, block, words);
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        const std::uint64_t u = quadword(words, 2 * pair), v = quadword(words, 2 * pair + 1);
        if (!decide(u, v, scale, out[2 * pair], out[2 * pair + 1])) {
            const GaussianPair exact = resolve_pair(streams, block, pair, u, v, scale);
            out[2 * pair] = exact.first;
            out[2 * pair + 1] = exact.second;
        }
    }
}

__global__ void __launch_bounds__(kThreads) gaussians_kernel(Stream key, std::uint32_t parameter, std::uint64_t draw,
                                                             double scale, std::int64_t n, std::int64_t *out) {
    const std::int64_t b = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (b * kValuesPerBlock >= n) return;
    std::int64_t values[kValuesPerBlock];
    gaussians_of_block(noise_streams(key, parameter, draw), static_cast<std::uint32_t>(b), scale, values);
    for (int i = 0; i < kValuesPerBlock; ++i) {
        if (b * kValuesPerBlock + i < n) out[b * kValuesPerBlock + i] = values[i];
    }
}

__device__ __forceinline__ double value_of(std::int64_t bits) { return as_double(static_cast<std::uint64_t>(bits)); }

// The sum of element e, on the grid where there is noise.
template <typename Sum>
__device__ __forceinline__ double noisy_sum(const Update &update, const Row &row, std::int64_t e, std::int64_t noise) {
    const typename Sum::Stored *sums = static_cast<const typename Sum::Stored *>(row.sum) + e;
    const double per_step = 1.0 / update.step;
    if (row.coefficients == nullptr) {
        return update.noisy ? from_grid(noise + on_wide_grid(Sum::load(*sums) * per_step)) * update.step : Sum::load(*sums);
    }
    const double most = most_of_each(row.examples);
    double exact = 0;
    for (std::int64_t i = 0; i < row.examples; ++i) {
        const double weight = row.coefficients[i];
        if (weight == 0) continue;
        const double value = weight * Sum::load(sums[i * row.size]);
        if (update.noisy) {
            noise += on_grid(value * per_step, most);
        } else {
            exact += value;
        }
    }
    return update.noisy ? from_grid(noise) * update.step : exact;
}

template <typename Theta>
__device__ __forceinline__ void step_element(const Update &update, const Row &row, const double *hyper, std::int64_t e,
                                             double gradient) {
    using Stored = typename Theta::Stored;
    const bool has_first = update.optimizer != lora_dp::kSgd;
    const bool has_second = has_first && update.optimizer != lora_dp::kMomentum;
    Stored *theta = static_cast<Stored *>(row.theta) + e;
    if (row.gradient != nullptr) static_cast<Stored *>(row.gradient)[e] = Theta::store(gradient);
    double one = has_first ? Theta::load(static_cast<Stored *>(row.first)[e]) : 0;
    double two = has_second ? Theta::load(static_cast<Stored *>(row.second)[e]) : 0;
    *theta = Theta::store(stepped(update.optimizer, Theta::load(*theta), gradient, one, two, hyper));
    if (has_first) static_cast<Stored *>(row.first)[e] = Theta::store(one);
    if (has_second) static_cast<Stored *>(row.second)[e] = Theta::store(two);
}

__global__ void __launch_bounds__(kThreads) update_kernel(Stream key, Update update, const Row *__restrict__ rows,
                                                          const double *__restrict__ hyper) {
    // Integers of the grid, then the noised gradients, of a tile and its neighbours.
    extern __shared__ std::int64_t shared[];
    // The last row whose first tile is not beyond this one; rows without elements have none.
    std::int64_t p = 0, beyond = update.count;
    while (beyond - p > 1) {
        const std::int64_t middle = (p + beyond) / 2;
        if (rows[middle].first_tile <= static_cast<std::int64_t>(blockIdx.x)) {
            p = middle;
        } else {
            beyond = middle;
        }
    }
    const Row row = rows[p];
    const std::int64_t begin = (static_cast<std::int64_t>(blockIdx.x) - row.first_tile) * kTileOnCuda;
    const std::int64_t end = begin + kTileOnCuda < row.size ? begin + kTileOnCuda : row.size;
    const std::int64_t halo = row.reach * row.stride;
    const std::int64_t low = begin > halo ? begin - halo : 0, high = row.size - end > halo ? end + halo : row.size;
    const std::int64_t first = low - low % kValuesPerBlock, n = high - first;

    if (update.noisy) {
        const NoiseStreams streams = noise_streams(key, static_cast<std::uint32_t>(p), update.draw);
        for (std::int64_t b = threadIdx.x; b * kValuesPerBlock < n; b += kThreads) {
            std::int64_t values[kValuesPerBlock];
            gaussians_of_block(streams, static_cast<std::uint32_t>(first / kValuesPerBlock + b), update.scale, values);
            for (int i = 0; i < kValuesPerBlock; ++i) shared[b * kValuesPerBlock + i] = values[i];
        }
        __syncthreads();
    }
    for (std::int64_t e = threadIdx.x; e < n; e += kThreads) {
        const std::int64_t noise = update.noisy ? shared[e] : 0;
        const double value = row.sum_dtype == lora_dp::kFloat32 ? noisy_sum<Float32>(update, row, first + e, noise)
                                                                : noisy_sum<Float64>(update, row, first + e, noise);
        shared[e] = static_cast<std::int64_t>(as_bits(value / update.expected_batch_size));
    }
    __syncthreads();

    double total = row.reach > 0 ? update.weights[0] : 1.0;
    for (std::int64_t k = 1; k <= row.reach; ++k) total += 2 * update.weights[k];
    for (std::int64_t element = begin + threadIdx.x; element < end; element += kThreads) {
        double gradient = value_of(shared[element - first]);
        if (row.reach > 0) {
            const std::int64_t position = element / row.stride % row.length;
            gradient *= update.weights[0];
            for (std::int64_t k = 1; k <= row.reach; ++k) {
                const std::int64_t before = position < k ? position : k;
                const std::int64_t left = row.length - 1 - position, after = left < k ? left : k;
                gradient += update.weights[k] * (value_of(shared[element - before * row.stride - first]) +
                                                 value_of(shared[element + after * row.stride - first]));
            }
            gradient /= total;
        }
        const double *numbers = hyper + p * lora_dp::kHyperColumns;
        switch (row.theta_dtype) {
            case lora_dp::kFloat32: step_element<Float32>(update, row, numbers, element, gradient); break;
            case lora_dp::kBFloat16: step_element<BFloat16>(update, row, numbers, element, gradient); break;
            case lora_dp::kFloat16: step_element<Float16>(update, row, numbers, element, gradient); break;
            default: step_element<Float64>(update, row, numbers, element, gradient);
        }
    }
}

// Blocks that give each item a thread.
unsigned blocks_for(std::int64_t items) { return static_cast<unsigned>((items + kThreads - 1) / kThreads); }

}  // namespace

namespace lora_dp {

int keystream_on_cuda(const Stream &stream, std::uint32_t counter, std::uintptr_t out, std::int64_t n_bytes,
                      std::uintptr_t cuda_stream) {
    const std::int64_t blocks = (n_bytes + kChaChaBlockBytes - 1) / kChaChaBlockBytes;
    LORA_DP_LAUNCH(keystream_kernel, blocks_for(blocks), 0, cuda_stream, stream, counter,
                   reinterpret_cast<std::uint32_t *>(out), n_bytes / 4);
    return cudaGetLastError();
}

int gaussians_on_cuda(const Stream &key, std::uint32_t parameter, std::uint64_t draw, double scale, std::int64_t n,
                      std::uintptr_t out, std::uintptr_t cuda_stream) {
    const std::int64_t blocks = (n + kValuesPerBlock - 1) / kValuesPerBlock;
    LORA_DP_LAUNCH(gaussians_kernel, blocks_for(blocks), 0, cuda_stream, key, parameter, draw, scale, n,
                   reinterpret_cast<std::int64_t *>(out));
    return cudaGetLastError();
}

int update_on_cuda(const Stream &key, const Update &update, const Row *rows, const Row *device_rows,
                   const double *device_hyper, std::uintptr_t cuda_stream) {
    std::int64_t tiles = 0, most = 0;
    for (std::int64_t p = 0; p < update.count; ++p) {
        if (rows[p].first_tile != tiles || rows[p].reach * rows[p].stride > kMostHaloOnCuda) return cudaErrorInvalidValue;
        tiles += (rows[p].size + kTileOnCuda - 1) / kTileOnCuda;
        if (rows[p].reach * rows[p].stride > most) most = rows[p].reach * rows[p].stride;
    }
    if (tiles == 0) return cudaSuccess;
    // Values are drawn eight at a time, so a tile holds up to seven more at either end.
    const std::size_t bytes = sizeof(std::int64_t) * static_cast<std::size_t>(kTileOnCuda + 2 * most + 2 * kValuesPerBlock);
    LORA_DP_LAUNCH(update_kernel, static_cast<unsigned>(tiles), bytes, cuda_stream, key, update, device_rows,
                   device_hyper);
    return cudaGetLastError();
}

const char *cuda_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // namespace lora_dp
