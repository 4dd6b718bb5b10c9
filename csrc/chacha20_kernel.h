// The ChaCha20 kernel for any vector width: lane l of every vector belongs to block counter + l.
// Each translation unit that includes it is compiled for one instruction set. All names have internal linkage
// and nothing of the standard library is instantiated, so that no wide code leaks into the portable path.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

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

template <typename Vector>
inline Vector rotate_left(Vector x, int bits) {
    return (x << bits) | (x >> (32 - bits));
}

template <typename Vector>
inline void quarter_round(Vector &a, Vector &b, Vector &c, Vector &d) {
    a += b; d ^= a; d = rotate_left(d, 16);
    c += d; b ^= c; b = rotate_left(b, 12);
    a += b; d ^= a; d = rotate_left(d, 8);
    c += d; b ^= c; b = rotate_left(b, 7);
}

inline std::uint32_t little_endian(std::uint32_t word) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return __builtin_bswap32(word);
#else
    return word;
#endif
}

// Writes `lanes` consecutive blocks that start at state[12]. state: the 16 words of RFC 8439, 2.3.
template <int lanes>
inline void write_blocks(const std::uint32_t state[16], std::uint8_t *out) {
    using Vector = typename VectorOf<lanes>::type;
    std::uint32_t lane_index[lanes];
    for (int l = 0; l < lanes; ++l) lane_index[l] = static_cast<std::uint32_t>(l);
    Vector offset;
    std::memcpy(&offset, lane_index, sizeof offset);

    Vector start[16], x[16];
    for (int w = 0; w < 16; ++w) start[w] = Vector{} + state[w];
    start[12] += offset;
    for (int w = 0; w < 16; ++w) x[w] = start[w];

    for (int round = 0; round < 20; round += 2) {
        quarter_round(x[0], x[4], x[8], x[12]);
        quarter_round(x[1], x[5], x[9], x[13]);
        quarter_round(x[2], x[6], x[10], x[14]);
        quarter_round(x[3], x[7], x[11], x[15]);
        quarter_round(x[0], x[5], x[10], x[15]);
        quarter_round(x[1], x[6], x[11], x[12]);
        quarter_round(x[2], x[7], x[8], x[13]);
        quarter_round(x[3], x[4], x[9], x[14]);
    }

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
