// Python bindings of lora_dp._native: pointers and sizes that the Python side has checked, no torch headers.
#include <nanobind/nanobind.h>

#include <cstring>
#include <string>

#include "chacha20.h"

namespace nb = nanobind;

namespace {

constexpr std::uint64_t kMaxBlocks = std::uint64_t{1} << 32;

void require_length(const char *name, const nb::bytes &value, std::size_t expected) {
    if (value.size() != expected) {
        throw nb::value_error((std::string(name) + " must be " + std::to_string(expected) + " bytes long, got " +
                               std::to_string(value.size()))
                                  .c_str());
    }
}

void chacha20_keystream(const nb::bytes &key, const nb::bytes &nonce, std::int64_t counter, std::uintptr_t out_ptr,
                        std::int64_t n_bytes) {
    require_length("key", key, lora_dp::kChaChaKeyBytes);
    require_length("nonce", nonce, lora_dp::kChaChaNonceBytes);
    if (n_bytes < 0) throw nb::value_error(("n_bytes must not be negative, got " + std::to_string(n_bytes)).c_str());
    if (counter < 0 || static_cast<std::uint64_t>(counter) >= kMaxBlocks) {
        throw nb::value_error(("counter must lie in [0, 2**32), got " + std::to_string(counter)).c_str());
    }
    const std::uint64_t blocks = (static_cast<std::uint64_t>(n_bytes) + lora_dp::kChaChaBlockBytes - 1) /
                                 lora_dp::kChaChaBlockBytes;
    if (blocks > kMaxBlocks - static_cast<std::uint64_t>(counter)) {
        throw nb::value_error(("the block counter would pass 2**32: " + std::to_string(n_bytes) +
                               " bytes from block " + std::to_string(counter) + "; draw less, or use another nonce")
                                  .c_str());
    }
    if (n_bytes == 0) return;
    if (out_ptr == 0) throw nb::value_error("out_ptr is null: pass the address of a buffer of n_bytes bytes");

    // Copied, because the Python objects may not be touched without the interpreter lock.
    std::uint8_t key_bytes[lora_dp::kChaChaKeyBytes], nonce_bytes[lora_dp::kChaChaNonceBytes];
    std::memcpy(key_bytes, key.c_str(), sizeof key_bytes);
    std::memcpy(nonce_bytes, nonce.c_str(), sizeof nonce_bytes);
    nb::gil_scoped_release unlocked;
    lora_dp::chacha20_keystream(key_bytes, nonce_bytes, static_cast<std::uint32_t>(counter),
                                reinterpret_cast<std::uint8_t *>(out_ptr), static_cast<std::size_t>(n_bytes));
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Native operations of lora_dp";
    m.def("chacha20_keystream", &chacha20_keystream, nb::arg("key"), nb::arg("nonce"), nb::arg("counter"),
          nb::arg("out_ptr"), nb::arg("n_bytes"),
          "Writes n_bytes of the ChaCha20 (RFC 8439) keystream from block `counter` on to the address out_ptr.\n\n"
          "Raises ValueError for a wrong length, a negative size, a null address or a counter past 2**32.");
}
