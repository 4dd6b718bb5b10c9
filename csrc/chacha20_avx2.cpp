// ChaCha20, 8 blocks at once in 256-bit vectors; compiled for AVX2.
#include "chacha20_kernel.h"

namespace lora_dp {

void chacha20_keystream_avx2(std::uint32_t state[16], std::uint8_t *out, std::size_t n_bytes) {
    keystream<8>(state, out, n_bytes);
}

}  // namespace lora_dp
