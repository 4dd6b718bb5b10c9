// ChaCha20 (RFC 8439) in vectors of any width: lane l of every vector belongs to block counter + l.
// Each translation unit that includes it is compiled for one instruction set. All names have internal linkage
// and nothing of the standard library is instantiated, so that no wide code leaks into the portable path.
#pragma once

#include <cstddef>

#include "stream.h"

namespace {

#if defined(__GNUC__)
template <int lanes>
struct VectorOf {
    typedef std::uint32_t type __attribute__((vector_size(lanes * 4)));
};
#else
template <int lanes>
struct VectorOf {
    static_assert(lanes == 1, "vectors need the extensions of GCC and Clang");
    using type = std::uint32_t;
};
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
inline std::uint32_t little_endian(std::uint32_t word) { return __builtin_bswap32(word); }
inline std::uint64_t little_endian(std::uint64_t word) { return __builtin_bswap64(word); }
#else
inline std::uint32_t little_endian(std::uint32_t word) { return word; }
inline std::uint64_t little_endian(std::uint64_t word) { return word; }
#endif

// Writes `lanes` consecutive blocks that start at state[12]. state: the 16 words of RFC 8439, 2.3.
template <int lanes>
inline void write_blocks(const std::uint32_t state[16], std::uint8_t *out) {
    using Vector = typename VectorOf<lanes>::type;
    std::uint32_t lane_index[lanes] = {};
    for (int l = 1; l < lanes; ++l) lane_index[l] = static_cast<std::uint32_t>(l);
    Vector offset;
    std::memcpy(&offset, lane_index, sizeof offset);

    Vector start[16], x[16];
    for (int w = 0; w < 16; ++w) start[w] = Vector{} + state[w];
    start[12] += offset;
    for (int w = 0; w < 16; ++w) x[w] = start[w];

    twenty_rounds(x);

    std::uint32_t words[16][lanes];
    for (int w = 0; w < 16; ++w) {
        x[w] += start[w];
        std::memcpy(words[w], &x[w], sizeof x[w]);
    }
    for (int l = 0; l < lanes; ++l) {
        std::uint32_t block[16];
        for (int w = 0; w < 16; ++w) block[w] = little_endian(words[w][l]);
        std::memcpy(out + 64 * l, block, sizeof block);
    }
}

template <int lanes>
inline void keystream(std::uint32_t state[16], std::uint8_t *out, std::size_t n_bytes) {
    constexpr std::size_t stride = 64 * lanes;
    for (; n_bytes >= stride; n_bytes -= stride, out += stride, state[12] += lanes) write_blocks<lanes>(state, out);
    if (n_bytes > 0) {
        std::uint8_t last[stride];
        write_blocks<lanes>(state, last);
        std::memcpy(out, last, n_bytes);
    }
}

}  // namespace
