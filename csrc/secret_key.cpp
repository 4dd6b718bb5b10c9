#include "secret_key.h"

#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <unordered_map>
#include <vector>

namespace lora_dp {

namespace {

struct Slot {
    std::uint8_t bytes[kChaChaKeyBytes];
};

struct Entry {
    Slot *slot;
    pid_t process;
};

struct Store {
    std::unordered_map<std::int64_t, Entry> entries;
    std::vector<Slot *> free_slots;
    std::int64_t last_number = 0;
    bool locked = true;
    pid_t process = getpid();
};

Store &store() {
    static Store *const instance = new Store;  // never destroyed: keys may be dropped while the interpreter ends
    return *instance;
}

// The keys of this process. A forked child inherits its parent's pages empty and unlocked: it begins with pages of its own.
Store &own_store() {
    Store &keys = store();
    if (keys.process != getpid()) {
        keys.free_slots.clear();
        keys.locked = true;
        keys.process = getpid();
    }
    return keys;
}

void overwrite(Slot *slot) noexcept {
    for (volatile std::uint8_t &byte : slot->bytes) byte = 0;
}

void add_page() {
    const std::size_t size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    void *page = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) throw std::bad_alloc();
    if (mlock(page, size) != 0) store().locked = false;
#if defined(MADV_DONTDUMP)
    madvise(page, size, MADV_DONTDUMP);
#endif
#if defined(MADV_WIPEONFORK)
    madvise(page, size, MADV_WIPEONFORK);
#endif
    Slot *slots = static_cast<Slot *>(page);
    for (std::size_t i = size / sizeof(Slot); i-- > 0;) store().free_slots.push_back(slots + i);
}

std::int64_t add(const std::uint8_t *bytes) {
    Store &keys = own_store();
    if (keys.free_slots.empty()) add_page();
    Slot *slot = keys.free_slots.back();
    if (bytes != nullptr) {
        std::memcpy(slot->bytes, bytes, sizeof slot->bytes);
    } else if (getentropy(slot->bytes, sizeof slot->bytes) != 0) {
        throw std::system_error(errno, std::generic_category(), "the operating system gave no random bytes");
    }
    keys.entries.emplace(keys.last_number + 1, Entry{slot, getpid()});
    keys.free_slots.pop_back();
    return ++keys.last_number;
}

}  // namespace

std::int64_t new_key() { return add(nullptr); }

std::int64_t key_from(const std::uint8_t bytes[kChaChaKeyBytes]) { return add(bytes); }

void drop_key(std::int64_t number) noexcept {
    Store &keys = own_store();
    const auto found = keys.entries.find(number);
    if (found == keys.entries.end()) return;
    overwrite(found->second.slot);
    try {
        if (found->second.process == keys.process) keys.free_slots.push_back(found->second.slot);
    } catch (const std::bad_alloc &) {
        // The slot is lost, not the key.
    }
    keys.entries.erase(found);
}

ChaChaKey load_key(std::int64_t number) {
    const auto found = store().entries.find(number);
    if (found == store().entries.end()) throw std::invalid_argument("there is no key " + std::to_string(number));
    // In a forked child the page is empty, and a stream under a key of zeros would be no secret.
    if (found->second.process != getpid()) {
        throw std::invalid_argument("key " + std::to_string(number) + " belongs to the process that made it: make another");
    }
    // A process may have the id of a grandparent that is gone: then the page is what tells.
    std::uint8_t any = 0;
    for (const std::uint8_t byte : found->second.slot->bytes) any |= byte;
    if (any == 0) {
        throw std::invalid_argument("key " + std::to_string(number) + " is empty, as in a forked process: make another");
    }
    return ChaChaKey(found->second.slot->bytes);
}

void burn_stack() noexcept {
    volatile std::uint8_t below[16384];
    for (volatile std::uint8_t &byte : below) byte = 0;
}

bool keys_are_locked() {
    Store &keys = own_store();
    if (keys.free_slots.empty()) add_page();
    return keys.locked;
}

}  // namespace lora_dp
