// ChaCha20 (RFC 8439): the initial state, and the choice of the widest kernel that this machine runs.
#include "chacha20.h"

#include "chacha20_kernel.h"

namespace lora_dp {

#if defined(LORA_DP_X86_KERNELS)
void chacha20_keystream_avx2(std::uint32_t state[16], std::uint8_t *out, std::size_t n_bytes);
void chacha20_keystream_avx512(std::uint32_t state[16], std::uint8_t *out, std::size_t n_bytes);
#endif

namespace {

std::uint32_t load_word(const std::uint8_t *bytes) {
    std::uint32_t word;
    std::memcpy(&word, bytes, sizeof word);
    return little_endian(word);
}

using Kernel = void (*)(std::uint32_t state[16], std::uint8_t *out, std::size_t n_bytes);

Kernel widest_kernel() {
#if defined(LORA_DP_X86_KERNELS)
    if (__builtin_cpu_supports("avx512f")) return chacha20_keystream_avx512;
    if (__builtin_cpu_supports("avx2")) return chacha20_keystream_avx2;
#endif
#if defined(__GNUC__)
    return keystream<4>;
#else
    return keystream<1>;
#endif
}

}  // namespace

void chacha20_keystream(const std::uint8_t key[kChaChaKeyBytes], const std::uint8_t nonce[kChaChaNonceBytes],
                        std::uint32_t counter, std::uint8_t *out, std::size_t n_bytes) {
    static const Kernel kernel = widest_kernel();
    // RFC 8439, 2.3: "expand 32-byte k", the key, the block counter, the nonce.
    std::uint32_t state[16] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
    for (int w = 0; w < 8; ++w) state[4 + w] = load_word(key + 4 * w);
    state[12] = counter;
    for (int w = 0; w < 3; ++w) state[13 + w] = load_word(nonce + 4 * w);
    kernel(state, out, n_bytes);
}

}  // namespace lora_dp
