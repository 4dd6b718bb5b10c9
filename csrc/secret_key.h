// 256-bit keys that never leave this library: Python holds a number that stands for one.
//
// All keys lie in pages of their own that are locked in memory (never swapped, where the system's limit allows), left out
// of core dumps, and empty in a forked child. A key that is dropped is overwritten.
//
// Called with Python's interpreter lock held, which is what orders the calls.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace lora_dp {

// A new key from the operating system's generator. Throws std::system_error where that fails.
std::int64_t new_key();

// A key made of these bytes.
std::int64_t key_from(const std::uint8_t bytes[kChaChaKeyBytes]);

// Overwrites a key; unknown numbers are ignored.
void drop_key(std::int64_t number) noexcept;

// The key's words. Throws std::invalid_argument for an unknown number, or a key that another process has made.
ChaChaKey load_key(std::int64_t number);

// Overwrites what functions that have returned left on the stack: streams hold a key's words. Never inlined.
[[gnu::noinline]] void burn_stack() noexcept;

// Whether all pages of keys are locked in memory.
bool keys_are_locked();

}  // namespace lora_dp
