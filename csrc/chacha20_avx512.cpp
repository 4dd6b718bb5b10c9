// ChaCha20, 16 blocks at once in 512-bit vectors; compiled for AVX512.
#include "chacha20_kernel.h"

namespace lora_dp {

void chacha20_keystream_avx512(std::uint32_t state[16], std::uint8_t *out, std::size_t n_bytes) {
    keystream<16>(state, out, n_bytes);
}

}  // namespace lora_dp
