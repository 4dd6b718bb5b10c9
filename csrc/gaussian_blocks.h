// Eight rounded Gaussians from each ChaCha20 block of a parameter's stream.
//
// Pair j of block b takes quadwords 2j and 2j + 1 of block b of the stream kForNoise as the leading bits of u and v, and
// those of the stream kForNoiseRest as the others. Element e of a parameter is value e mod 8 of block e / 8.
#pragma once

#include "rounded_gaussian.h"
#include "stream.h"

namespace {

// The streams of one parameter's noise in one draw.
struct NoiseStreams {
    lora_dp::Stream leading, rest;
};

LORA_DP_BOTH NoiseStreams noise_streams(const lora_dp::Stream &key, std::uint32_t parameter, std::uint64_t draw) {
    return {stream_of(key, lora_dp::kForNoise, parameter, draw), stream_of(key, lora_dp::kForNoiseRest, parameter, draw)};
}

LORA_DP_BOTH GaussianPair resolve_pair(const NoiseStreams &streams, std::uint32_t block, int pair, std::uint64_t u,
                                       std::uint64_t v, double scale) {
    std::uint32_t rest[16];
    chacha20_block(streams.rest, block, rest);
    return resolve(u, quadword(rest, 2 * pair), v, quadword(rest, 2 * pair + 1), scale);
}

}  // namespace
