// The CPU kernels for any machine, the choice of the widest, and the threads of an update.
#include "kernels.h"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu_kernels.h"
#include "secret_key.h"

namespace lora_dp {

#if defined(__GNUC__)
const Kernels kPortableKernels = {"portable", write_keystream<4>, write_gaussians<4>, write_update_tile<4>};
#else
const Kernels kPortableKernels = {"portable", write_keystream<1>, write_gaussians<1>, write_update_tile<1>};
#endif

ChaChaKey::ChaChaKey(const std::uint8_t bytes[kChaChaKeyBytes]) {
    // RFC 8439, 2.3: "expand 32-byte k", the key, the block counter, the nonce.
    stream = {{0x61707865, 0x3320646e, 0x79622d32, 0x6b206574}};
    for (int w = 0; w < 8; ++w) {
        std::uint32_t word;
        memcpy(&word, bytes + 4 * w, sizeof word);
        stream.words[4 + w] = little_endian(word);
    }
}

ChaChaKey::~ChaChaKey() {
    volatile std::uint32_t *words = stream.words;
    for (int w = 0; w < 16; ++w) words[w] = 0;
}

const Kernels *kernels_called(const char *name) {
    const auto is = [name](const Kernels &candidate) { return std::strcmp(candidate.name, name) == 0; };
#if defined(LORA_DP_X86_KERNELS)
    if (is(kAvx512Kernels)) return __builtin_cpu_supports("avx512f") ? &kAvx512Kernels : nullptr;
    if (is(kAvx2Kernels)) return __builtin_cpu_supports("avx2") ? &kAvx2Kernels : nullptr;
#endif
    return is(kPortableKernels) ? &kPortableKernels : nullptr;
}

const Kernels &kernels() {
    static const Kernels *const widest = [] {
        for (const char *name : {"avx512", "avx2"}) {
            if (const Kernels *found = kernels_called(name)) return found;
        }
        return &kPortableKernels;
    }();
    return *widest;
}

namespace {

template <typename Sum>
bool all_finite(const Row &row) {
    const typename Sum::Stored *sums = static_cast<const typename Sum::Stored *>(row.sum);
    double found = 0;  // x - x is NaN for NaN and infinity, and a sum with NaN in it stays NaN
    for (std::int64_t e = 0; e < row.size; ++e) found += Sum::load(sums[e]) - Sum::load(sums[e]);
    return found == 0;
}

}  // namespace

std::int64_t first_non_finite(const Update &update, const Row *rows) {
    for (std::int64_t p = 0; p < update.count; ++p) {
        if (rows[p].coefficients != nullptr) continue;
        if (!(rows[p].sum_dtype == kFloat32 ? all_finite<Float32>(rows[p]) : all_finite<Float64>(rows[p]))) return p;
    }
    return -1;
}

void update_on_cpu(const Kernels &chosen, const Stream &key, const Update &update, const Row *rows, const double *hyper,
                   int threads) {
    constexpr std::int64_t tile = 4096;
    std::vector<std::int64_t> first_tiles{0};
    std::int64_t most_scratch = 0;
    for (std::int64_t p = 0; p < update.count; ++p) {
        first_tiles.push_back(first_tiles.back() + (rows[p].size + tile - 1) / tile);
        const std::int64_t scratch = tile + 2 * rows[p].reach * rows[p].stride + kValuesPerBlock;
        if (scratch > most_scratch) most_scratch = scratch;
    }
    const std::int64_t tiles = first_tiles.back();
    if (tiles < threads) threads = tiles > 1 ? static_cast<int>(tiles) : 1;

    std::vector<std::int64_t> grid(static_cast<std::size_t>(most_scratch * threads));
    std::vector<double> exact(2 * grid.size());
    std::atomic<std::int64_t> next{0};
    const auto work = [&](int thread) {
        const Scratch scratch{grid.data() + most_scratch * thread, exact.data() + 2 * most_scratch * thread};
        std::int64_t p = 0;
        for (std::int64_t t; (t = next.fetch_add(1)) < tiles;) {
            while (first_tiles[static_cast<std::size_t>(p) + 1] <= t) ++p;
            const std::int64_t begin = (t - first_tiles[static_cast<std::size_t>(p)]) * tile;
            const std::int64_t end = begin + tile < rows[p].size ? begin + tile : rows[p].size;
            chosen.update_tile(key, update, rows[p], static_cast<std::uint32_t>(p), hyper + p * kHyperColumns, begin, end,
                               scratch);
        }
    };
    std::vector<std::thread> others;
    others.reserve(static_cast<std::size_t>(threads));
    try {
        for (int thread = 1; thread < threads; ++thread) {
            others.emplace_back([&work, thread] {
                work(thread);
                burn_stack();
            });
        }
    } catch (const std::system_error &) {
        // Fewer threads take the same tiles.
    }
    work(0);
    for (std::thread &other : others) other.join();
}

}  // namespace lora_dp
