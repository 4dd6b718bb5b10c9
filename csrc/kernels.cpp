// The CPU kernels for any machine, the choice of the widest, and the threads of an update.
#include "kernels.h"

#include <algorithm>
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
    memcpy(stream.words + 4, bytes, kChaChaKeyBytes);
    for (int w = 4; w < 12; ++w) stream.words[w] = little_endian(stream.words[w]);
}

ChaChaKey::~ChaChaKey() {
    for (volatile std::uint32_t &word : stream.words) word = 0;
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

constexpr std::int64_t kTile = 4096;

// Calls work(row, first element, end, thread) for every tile of every row, shared out among so many threads.
template <typename Work>
void for_tiles(const Update &update, const Row *rows, int threads, const Work &work) {
    std::vector<std::int64_t> first_tiles{0};
    for (std::int64_t p = 0; p < update.count; ++p) {
        first_tiles.push_back(first_tiles.back() + (rows[p].size + kTile - 1) / kTile);
    }
    const std::int64_t tiles = first_tiles.back();
    if (tiles < threads) threads = tiles > 1 ? static_cast<int>(tiles) : 1;
    std::atomic<std::int64_t> next{0};
    const auto share = [&](int thread) {
        std::int64_t p = 0;
        for (std::int64_t t; (t = next.fetch_add(1)) < tiles;) {
            while (first_tiles[static_cast<std::size_t>(p) + 1] <= t) ++p;
            const std::int64_t begin = (t - first_tiles[static_cast<std::size_t>(p)]) * kTile;
            work(p, begin, begin + kTile < rows[p].size ? begin + kTile : rows[p].size, thread);
        }
    };
    std::vector<std::thread> others;
    others.reserve(static_cast<std::size_t>(threads));
    try {
        for (int thread = 1; thread < threads; ++thread) {
            others.emplace_back([&share, thread] {
                share(thread);
                burn_stack();
            });
        }
    } catch (const std::system_error &) {
        // Fewer threads take the same tiles.
    }
    share(0);
    for (std::thread &other : others) other.join();
}

template <typename Sum>
bool all_finite(const void *sum, std::int64_t begin, std::int64_t end) {
    const typename Sum::Stored *sums = static_cast<const typename Sum::Stored *>(sum);
    double found = 0;  // x - x is NaN for NaN and infinity, and a sum with NaN in it stays NaN
    for (std::int64_t e = begin; e < end; ++e) found += Sum::load(sums[e]) - Sum::load(sums[e]);
    return found == 0;
}

}  // namespace

std::int64_t first_non_finite(const Update &update, const Row *rows, int threads) {
    std::vector<std::atomic<bool>> bad(static_cast<std::size_t>(update.count));
    for_tiles(update, rows, threads, [&](std::int64_t p, std::int64_t begin, std::int64_t end, int) {
        if (rows[p].coefficients != nullptr) return;
        const bool finite = rows[p].sum_dtype == kFloat32 ? all_finite<Float32>(rows[p].sum, begin, end)
                                                          : all_finite<Float64>(rows[p].sum, begin, end);
        if (!finite) bad[static_cast<std::size_t>(p)] = true;
    });
    const auto first = std::find(bad.begin(), bad.end(), true);
    return first == bad.end() ? -1 : first - bad.begin();
}

void update_on_cpu(const Kernels &chosen, const Stream &key, const Update &update, const Row *rows, const double *hyper,
                   int threads) {
    std::int64_t most = 0;
    for (std::int64_t p = 0; p < update.count; ++p) {
        const std::int64_t halo = rows[p].reach * rows[p].stride, size = rows[p].size;
        const std::int64_t needed = kTile + 2 * (halo < size ? halo : size) + kValuesPerBlock;
        if (needed > most) most = needed;
    }
    std::vector<std::int64_t> grid(static_cast<std::size_t>(most * threads));
    std::vector<double> exact(2 * grid.size());
    for_tiles(update, rows, threads, [&](std::int64_t p, std::int64_t begin, std::int64_t end, int thread) {
        chosen.update_tile(key, update, rows[p], static_cast<std::uint32_t>(p), hyper + p * kHyperColumns, begin, end,
                           Scratch{grid.data() + most * thread, exact.data() + 2 * most * thread});
    });
}

}  // namespace lora_dp
