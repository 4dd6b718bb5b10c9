// ChaCha20 (RFC 8439): the keystream as a source of cryptographic random bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lora_dp {

constexpr std::size_t kChaChaKeyBytes = 32;
constexpr std::size_t kChaChaNonceBytes = 12;
constexpr std::size_t kChaChaBlockBytes = 64;

// Writes n_bytes of the keystream that starts at block `counter` into out, in the byte order of RFC 8439.
// The caller guarantees that counter + ceil(n_bytes / 64) <= 2^32.
void chacha20_keystream(const std::uint8_t key[kChaChaKeyBytes], const std::uint8_t nonce[kChaChaNonceBytes],
                        std::uint32_t counter, std::uint8_t *out, std::size_t n_bytes);

}  // namespace lora_dp
