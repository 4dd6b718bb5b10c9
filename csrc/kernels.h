// What runs on a CPU: each instruction set has a build of its own, and the widest that the machine has is chosen.
#pragma once

#include <cstddef>

#include "stream.h"
#include "update_math.h"

namespace lora_dp {

// A key as the words that begin a stream. The words are overwritten when it goes.
struct ChaChaKey {
    Stream stream;
    explicit ChaChaKey(const std::uint8_t bytes[kChaChaKeyBytes]);
    ~ChaChaKey();
};

// A tile's working memory, for n elements: grid holds n numbers, exact 2 n.
struct Scratch {
    std::int64_t *grid;
    double *exact;
};

struct Kernels {
    const char *name;
    // n_bytes of the stream from block `counter` on, in the byte order of RFC 8439.
    void (*keystream)(const Stream &stream, std::uint32_t counter, std::uint8_t *out, std::size_t n_bytes);
    // Rounded Gaussians n of one parameter from `first` on, a multiple of kValuesPerBlock.
    void (*gaussians)(const Stream &key, std::uint32_t parameter, std::uint64_t draw, double scale, std::int64_t first,
                      std::int64_t n, std::int64_t *out);
    // Elements [begin, end) of a row; scratch for end - begin + 2 * reach * stride + kValuesPerBlock of them.
    void (*update_tile)(const Stream &key, const Update &update, const Row &row, std::uint32_t parameter,
                        const double *hyper, std::int64_t begin, std::int64_t end, const Scratch &scratch);
};

extern const Kernels kPortableKernels;
#if defined(LORA_DP_X86_KERNELS)
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#endif

// The widest kernels that this machine runs.
const Kernels &kernels();

// The kernels called so, or null where this machine does not run them.
const Kernels *kernels_called(const char *name);

// The first row whose accumulated sum holds NaN or infinity, or -1.
std::int64_t first_non_finite(const Update &update, const Row *rows, int threads);

// The whole update, in tiles shared out among so many threads.
void update_on_cpu(const Kernels &chosen, const Stream &key, const Update &update, const Row *rows, const double *hyper,
                   int threads);

}  // namespace lora_dp
