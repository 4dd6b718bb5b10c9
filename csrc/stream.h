// ChaCha20 (RFC 8439) block by block, and which block belongs to which value.
//
// Word 12 of the state counts blocks. Words 13 to 15, the nonce, are what the bits are for (8 bits), the number of the
// parameter (24 bits) and the number of the draw (64 bits, low word first). A key is used for one source, which never
// draws twice with the same number: so no two values share a block, whatever the parameters, steps and processes.
// Masks alone take both numbers at random, 87 bits of the state of torch's generator: a state that comes back, as for a
// checkpoint's second forward, brings the same masks back, and two others are alike with a chance of 2^-87.
#pragma once

#include "portable.h"

namespace lora_dp {

constexpr int kChaChaKeyBytes = 32;
constexpr int kChaChaNonceBytes = 12;
constexpr int kChaChaBlockBytes = 64;

// What bits are for.
constexpr std::uint32_t kForSampling = 0;      // uniform bits
constexpr std::uint32_t kForNoise = 1;         // the leading bits of rounded Gaussians
constexpr std::uint32_t kForNoiseRest = 2;     // their other bits, rarely needed
constexpr std::uint32_t kForMasks = 3;         // what torch draws while a private model trains, such as dropout masks

constexpr std::int64_t kValuesPerBlock = 8;    // rounded Gaussians of one block of kForNoise
constexpr std::uint64_t kMaxBlocks = std::uint64_t{1} << 32;

struct Stream {
    std::uint32_t words[16];
};

}  // namespace lora_dp

namespace {

template <typename Word>
LORA_DP_BOTH Word rotate_left(Word x, int bits) {
    return (x << bits) | (x >> (32 - bits));
}

template <typename Word>
LORA_DP_BOTH void quarter_round(Word &a, Word &b, Word &c, Word &d) {
    a += b; d ^= a; d = rotate_left(d, 16);
    c += d; b ^= c; b = rotate_left(b, 12);
    a += b; d ^= a; d = rotate_left(d, 8);
    c += d; b ^= c; b = rotate_left(b, 7);
}

// On words, or on vectors of words of as many blocks.
template <typename Word>
LORA_DP_BOTH void twenty_rounds(Word x[16]) {
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
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
}

// The words of one block.
LORA_DP_BOTH void chacha20_block(const lora_dp::Stream &stream, std::uint32_t counter, std::uint32_t out[16]) {
    for (int w = 0; w < 16; ++w) out[w] = stream.words[w];
    out[12] = counter;
    twenty_rounds(out);
    for (int w = 0; w < 16; ++w) out[w] += w == 12 ? counter : stream.words[w];
}

// Quadword q of a block, its bytes in the order of RFC 8439 read as a little-endian number.
LORA_DP_BOTH std::uint64_t quadword(const std::uint32_t block[16], int q) {
    return block[2 * q] | (static_cast<std::uint64_t>(block[2 * q + 1]) << 32);
}

// The stream of one parameter in one draw; its word 12, the counter, is set where a block is made.
LORA_DP_BOTH lora_dp::Stream stream_of(const lora_dp::Stream &key, std::uint32_t purpose, std::uint32_t parameter,
                                       std::uint64_t draw) {
    lora_dp::Stream stream = key;
    stream.words[13] = purpose << 24 | parameter;
    stream.words[14] = static_cast<std::uint32_t>(draw);
    stream.words[15] = static_cast<std::uint32_t>(draw >> 32);
    return stream;
}

}  // namespace
