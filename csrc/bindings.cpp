// Python bindings of lora_dp._native: addresses and sizes that the Python side has checked, no torch headers. What can
// be checked here, is; an address that is not null is believed.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "cuda_kernels.h"
#include "kernels.h"
#include "secret_key.h"

namespace nb = nanobind;

namespace {

using lora_dp::Row;
using lora_dp::Update;

[[noreturn]] void refuse(const std::string &message) { throw std::invalid_argument(message); }

void require(bool holds, const char *what, const char *must, long long given) {
    if (!holds) refuse(std::string(what) + " must " + must + ", got " + std::to_string(given));
}

void require_length(const char *name, const nb::bytes &value, int expected) {
    if (value.size() != static_cast<std::size_t>(expected)) {
        refuse(std::string(name) + " must be " + std::to_string(expected) + " bytes long, got " +
               std::to_string(value.size()));
    }
}

void require_address(const char *name, std::uintptr_t address, std::int64_t size) {
    if (address == 0 && size > 0) refuse(std::string(name) + " is null: pass the address of its data");
}

// Blocks of a stream that this many bytes from block `counter` on take.
void require_blocks(std::int64_t counter, std::int64_t n_bytes) {
    require(n_bytes >= 0, "n_bytes", "not be negative", n_bytes);
    require(counter >= 0 && static_cast<std::uint64_t>(counter) < lora_dp::kMaxBlocks, "counter", "lie in [0, 2**32)",
            counter);
    const std::uint64_t blocks = (static_cast<std::uint64_t>(n_bytes) + 63) / 64;
    if (blocks > lora_dp::kMaxBlocks - static_cast<std::uint64_t>(counter)) {
        refuse("the block counter would pass 2**32: " + std::to_string(n_bytes) + " bytes from block " +
               std::to_string(counter) + "; draw less, or use another nonce");
    }
}

void require_stream(std::int64_t parameter, std::int64_t draw) {
    require(parameter >= 0 && parameter < (1 << 24), "parameter", "lie in [0, 2**24)", parameter);
    require(draw >= 0, "draw", "not be negative", draw);
}

void require_gaussians(std::int64_t parameter, std::int64_t draw, double scale, std::int64_t n) {
    require_stream(parameter, draw);
    require(n >= 0 && static_cast<std::uint64_t>(n) <= lora_dp::kValuesPerBlock * lora_dp::kMaxBlocks, "n",
            "lie in [0, 2**35]", n);
    if (!(scale >= 1 && scale < 8589934592.0)) refuse("scale must lie in [1, 2**33), got " + std::to_string(scale));
}

// The rows of a table, checked one by one.
void require_rows(const Update &update, const Row *rows) {
    constexpr std::int64_t most = std::int64_t{1} << 35;
    for (std::int64_t p = 0; p < update.count; ++p) {
        const Row &row = rows[p];
        require(row.size >= 0 && row.size <= most, "size", "lie in [0, 2**35]", row.size);
        require(row.examples >= 0 && row.examples <= most, "examples", "lie in [0, 2**35]", row.examples);
        require(row.theta_dtype >= lora_dp::kFloat32 && row.theta_dtype <= lora_dp::kFloat64, "theta_dtype",
                "be 0, 1, 2 or 3", row.theta_dtype);
        require(row.sum_dtype == lora_dp::kFloat32 || row.sum_dtype == lora_dp::kFloat64, "sum_dtype", "be 0 or 3",
                row.sum_dtype);
        require(row.stride >= 1 && row.length >= 1 && row.reach >= 0, "stride, length and reach",
                "be at least 1, 1 and 0; the least", std::min({row.stride, row.length, row.reach}));
        require(row.stride <= most && row.length <= most && row.reach <= (1 << 20) &&
                    (row.reach == 0 || row.size % row.stride == 0) &&
                    (row.reach == 0 || row.size / row.stride % row.length == 0) &&
                    row.reach * row.stride <= lora_dp::kMostHalo,
                "the filtered dimension", "divide the parameter and have a halo of at most 2**24 elements; its reach",
                row.reach);
        require_address("theta", reinterpret_cast<std::uintptr_t>(row.theta), row.size);
        require_address("sum", reinterpret_cast<std::uintptr_t>(row.sum),
                        row.coefficients == nullptr ? row.size : row.size * std::min<std::int64_t>(row.examples, 1));
        const bool has_first = update.optimizer != lora_dp::kSgd;
        const bool has_second = has_first && update.optimizer != lora_dp::kMomentum;
        require_address("first", reinterpret_cast<std::uintptr_t>(row.first), has_first ? row.size : 0);
        require_address("second", reinterpret_cast<std::uintptr_t>(row.second), has_second ? row.size : 0);
    }
}

Update make_update(const Row *rows, std::int64_t count, std::int64_t optimizer, std::int64_t draw, bool noisy,
                   double scale, double step, double expected_batch_size, const double *weights,
                   std::int64_t n_weights) {
    require(count >= 0 && count < (1 << 24), "count", "lie in [0, 2**24)", count);
    require(optimizer >= lora_dp::kSgd && optimizer <= lora_dp::kAdamW, "optimizer", "be 0, 1, 2 or 3", optimizer);
    require(draw >= 0, "draw", "not be negative", draw);
    if (noisy && !(scale >= 1 && scale < 8589934592.0)) {
        refuse("scale must lie in [1, 2**33), got " + std::to_string(scale));
    }
    int exponent;
    if (noisy && !(std::isnormal(step) && step > 0 && std::frexp(step, &exponent) == 0.5)) {
        refuse("step must be a power of two, got " + std::to_string(step));
    }
    if (!(std::isfinite(expected_batch_size) && expected_batch_size > 0)) {
        refuse("expected_batch_size must be finite and above 0, got " + std::to_string(expected_batch_size));
    }
    const Update update{count, optimizer, static_cast<std::uint64_t>(draw), noisy, scale, noisy ? step : 1.0,
                        expected_batch_size, weights};
    if (count > 0 && rows == nullptr) refuse("rows is null: pass the address of its data");
    require_rows(update, rows);
    for (std::int64_t p = 0; p < count; ++p) {
        require(rows[p].reach == 0 || (weights != nullptr && rows[p].reach < n_weights), "reach",
                "be below the number of weights", rows[p].reach);
    }
    return update;
}

// A binding whose callees' stack is overwritten when it ends, since streams hold a key's words.
template <auto function>
struct Burned;

template <typename... Arguments, void (*function)(Arguments...)>
struct Burned<function> {
    static void call(Arguments... arguments) {
        struct Burn {
            ~Burn() { lora_dp::burn_stack(); }
        } burn;
        function(arguments...);
    }
};

template <typename T>
T *at(std::uintptr_t address) {
    return reinterpret_cast<T *>(address);
}

lora_dp::ChaChaKey key_of(const nb::bytes &key) {
    require_length("key", key, lora_dp::kChaChaKeyBytes);
    return lora_dp::ChaChaKey(reinterpret_cast<const std::uint8_t *>(key.c_str()));
}

// The stream of RFC 8439 for any nonce.
lora_dp::Stream with_nonce(const lora_dp::ChaChaKey &key, const nb::bytes &nonce) {
    require_length("nonce", nonce, lora_dp::kChaChaNonceBytes);
    lora_dp::Stream stream = key.stream;
    for (int w = 0; w < 3; ++w) {
        const auto *bytes = reinterpret_cast<const std::uint8_t *>(nonce.c_str()) + 4 * w;
        stream.words[13 + w] = bytes[0] | bytes[1] << 8 | bytes[2] << 16 | static_cast<std::uint32_t>(bytes[3]) << 24;
    }
    return stream;
}

const lora_dp::Kernels &kernels_named(const std::string &name) {
    if (name.empty()) return lora_dp::kernels();
    const lora_dp::Kernels *found = lora_dp::kernels_called(name.c_str());
    if (found == nullptr) refuse("this machine runs no kernels called '" + name + "'");
    return *found;
}

[[gnu::noinline]]
void keystream(const nb::bytes &key, const nb::bytes &nonce, std::int64_t counter, std::uintptr_t out,
               std::int64_t n_bytes, const std::string &instructions) {
    const lora_dp::ChaChaKey held = key_of(key);
    const lora_dp::Stream stream = with_nonce(held, nonce);
    require_blocks(counter, n_bytes);
    require_address("out", out, n_bytes);
    const lora_dp::Kernels &chosen = kernels_named(instructions);
    if (n_bytes == 0) return;
    nb::gil_scoped_release unlocked;
    chosen.keystream(stream, static_cast<std::uint32_t>(counter), at<std::uint8_t>(out),
                     static_cast<std::size_t>(n_bytes));
}

[[gnu::noinline]]
void sampling_bits(std::int64_t key, std::int64_t draw, std::uintptr_t out, std::int64_t n_bytes) {
    const lora_dp::ChaChaKey held = lora_dp::load_key(key);
    require_stream(0, draw);
    require_blocks(0, n_bytes);
    require_address("out", out, n_bytes);
    if (n_bytes == 0) return;
    nb::gil_scoped_release unlocked;
    lora_dp::kernels().keystream(stream_of(held.stream, lora_dp::kForSampling, 0, static_cast<std::uint64_t>(draw)), 0,
                                 at<std::uint8_t>(out), static_cast<std::size_t>(n_bytes));
}

[[gnu::noinline]]
void mask_bits(std::int64_t key, std::int64_t parameter, std::int64_t draw, std::uintptr_t out, std::int64_t n_bytes) {
    const lora_dp::ChaChaKey held = lora_dp::load_key(key);
    require_stream(parameter, draw);
    require_blocks(0, n_bytes);
    require_address("out", out, n_bytes);
    if (n_bytes == 0) return;
    nb::gil_scoped_release unlocked;
    lora_dp::kernels().keystream(stream_of(held.stream, lora_dp::kForMasks, static_cast<std::uint32_t>(parameter),
                                           static_cast<std::uint64_t>(draw)), 0,
                                 at<std::uint8_t>(out), static_cast<std::size_t>(n_bytes));
}

[[gnu::noinline]]
void rounded_gaussians(std::int64_t key, std::int64_t parameter, std::int64_t draw, double scale, std::uintptr_t out,
                       std::int64_t n, const std::string &instructions) {
    const lora_dp::ChaChaKey held = lora_dp::load_key(key);
    require_gaussians(parameter, draw, scale, n);
    require_address("out", out, n);
    const lora_dp::Kernels &chosen = kernels_named(instructions);
    if (n == 0) return;
    nb::gil_scoped_release unlocked;
    chosen.gaussians(held.stream, static_cast<std::uint32_t>(parameter), static_cast<std::uint64_t>(draw), scale, 0, n,
                     at<std::int64_t>(out));
}

nb::tuple gaussian_pair(std::uint64_t u_high, std::uint64_t u_low, std::uint64_t v_high, std::uint64_t v_low,
                        double scale) {
    require_gaussians(0, 0, scale, 0);
    std::int64_t first, second;
    const std::uint64_t sure = decide(u_high, v_high, scale, first, second);
    const GaussianPair exact = resolve(u_high, u_low, v_high, v_low, scale);
    const nb::object decided = sure ? nb::object(nb::make_tuple(first, second)) : nb::object(nb::none());
    return nb::make_tuple(decided, nb::make_tuple(exact.first, exact.second));
}

[[gnu::noinline]]
void private_update(std::int64_t key, std::int64_t draw, std::uintptr_t rows, std::uintptr_t hyper, std::int64_t count,
                    std::int64_t optimizer, bool noisy, double scale, double step, double expected_batch_size,
                    std::uintptr_t weights, std::int64_t n_weights, std::int64_t threads,
                    const std::string &instructions) {
    const lora_dp::Kernels &chosen = kernels_named(instructions);
    const Update update = make_update(at<Row>(rows), count, optimizer, draw, noisy, scale, step, expected_batch_size,
                                      at<double>(weights), n_weights);
    require_address("hyper", hyper, count);
    require(threads >= 1 && threads <= 1024, "threads", "lie in [1, 1024]", threads);
    // Without noise no key is needed: any stands in.
    const std::uint8_t nothing[lora_dp::kChaChaKeyBytes] = {};
    const lora_dp::ChaChaKey held = noisy ? lora_dp::load_key(key) : lora_dp::ChaChaKey(nothing);
    nb::gil_scoped_release unlocked;
    const std::int64_t bad = lora_dp::first_non_finite(update, at<Row>(rows), static_cast<int>(threads));
    if (bad >= 0) refuse("the sum of parameter " + std::to_string(bad) + " holds NaN or infinity: nothing was changed");
    lora_dp::update_on_cpu(chosen, held.stream, update, at<Row>(rows), at<double>(hyper), static_cast<int>(threads));
}

#if defined(LORA_DP_CUDA_KERNELS)

void check_launch(int status) {
    if (status != 0) throw std::runtime_error("CUDA: " + std::string(lora_dp::cuda_error(status)));
}

[[gnu::noinline]]
void keystream_cuda(const nb::bytes &key, const nb::bytes &nonce, std::int64_t counter, std::uintptr_t out,
                    std::int64_t n_bytes, std::uintptr_t stream) {
    const lora_dp::ChaChaKey held = key_of(key);
    const lora_dp::Stream words = with_nonce(held, nonce);
    require_blocks(counter, n_bytes);
    require(n_bytes % 4 == 0, "n_bytes", "be a multiple of 4 on a GPU", n_bytes);
    require_address("out", out, n_bytes);
    if (n_bytes > 0) {
        check_launch(lora_dp::keystream_on_cuda(words, static_cast<std::uint32_t>(counter), out, n_bytes, stream));
    }
}

[[gnu::noinline]]
void sampling_bits_cuda(std::int64_t key, std::int64_t draw, std::uintptr_t out, std::int64_t n_bytes,
                        std::uintptr_t stream) {
    const lora_dp::ChaChaKey held = lora_dp::load_key(key);
    require_stream(0, draw);
    require_blocks(0, n_bytes);
    require(n_bytes % 4 == 0, "n_bytes", "be a multiple of 4 on a GPU", n_bytes);
    require_address("out", out, n_bytes);
    const lora_dp::Stream words = stream_of(held.stream, lora_dp::kForSampling, 0, static_cast<std::uint64_t>(draw));
    if (n_bytes > 0) check_launch(lora_dp::keystream_on_cuda(words, 0, out, n_bytes, stream));
}

[[gnu::noinline]]
void rounded_gaussians_cuda(std::int64_t key, std::int64_t parameter, std::int64_t draw, double scale,
                            std::uintptr_t out, std::int64_t n, std::uintptr_t stream) {
    const lora_dp::ChaChaKey held = lora_dp::load_key(key);
    require_gaussians(parameter, draw, scale, n);
    require_address("out", out, n);
    if (n > 0) {
        check_launch(lora_dp::gaussians_on_cuda(held.stream, static_cast<std::uint32_t>(parameter),
                                                static_cast<std::uint64_t>(draw), scale, n, out, stream));
    }
}

[[gnu::noinline]]
void private_update_cuda(std::int64_t key, std::int64_t draw, std::uintptr_t rows, std::uintptr_t device_rows,
                         std::uintptr_t device_hyper, std::int64_t count, std::int64_t optimizer, bool noisy,
                         double scale, double step, double expected_batch_size, std::uintptr_t weights,
                         std::uintptr_t device_weights, std::int64_t n_weights, std::uintptr_t stream) {
    Update update = make_update(at<Row>(rows), count, optimizer, draw, noisy, scale, step, expected_batch_size,
                                at<double>(weights), n_weights);
    require_address("device_rows", device_rows, count);
    require_address("device_hyper", device_hyper, count);
    require_address("device_weights", device_weights, n_weights);
    update.weights = at<double>(device_weights);
    const std::uint8_t nothing[lora_dp::kChaChaKeyBytes] = {};
    const lora_dp::ChaChaKey held = noisy ? lora_dp::load_key(key) : lora_dp::ChaChaKey(nothing);
    if (count > 0) {
        check_launch(lora_dp::update_on_cuda(held.stream, update, at<Row>(rows), at<Row>(device_rows),
                                             at<double>(device_hyper), stream));
    }
}

#endif

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Native operations of lora_dp. ValueError where an argument is out of range.";
    m.def("new_key", &lora_dp::new_key,
          "A new secret key of the operating system; what comes back only stands for it.");
    m.def("key_from", [](const nb::bytes &bytes) {
        require_length("key", bytes, lora_dp::kChaChaKeyBytes);
        return lora_dp::key_from(reinterpret_cast<const std::uint8_t *>(bytes.c_str()));
    }, nb::arg("bytes"), "A key of these 32 bytes.");
    m.def("drop_key", &lora_dp::drop_key, nb::arg("key"), "Overwrites a key.");
    m.def("keys_are_locked", &lora_dp::keys_are_locked, "Whether keys are locked in memory, hence never swapped out.");
    m.def("instructions", [] { return std::string(lora_dp::kernels().name); }, "The CPU kernels that run here.");
    m.def("keystream", &Burned<&keystream>::call, nb::arg("key"), nb::arg("nonce"), nb::arg("counter"), nb::arg("out"),
          nb::arg("n_bytes"), nb::arg("instructions") = "",
          "n_bytes of the ChaCha20 (RFC 8439) keystream from block `counter` on.");
    m.def("sampling_bits", &Burned<&sampling_bits>::call, nb::arg("key"), nb::arg("draw"), nb::arg("out"),
          nb::arg("n_bytes"),
          "n_bytes uniform bytes of one draw.");
    m.def("mask_bits", &Burned<&mask_bits>::call, nb::arg("key"), nb::arg("parameter"), nb::arg("draw"), nb::arg("out"),
          nb::arg("n_bytes"), "n_bytes uniform bytes of one call that torch draws for.");
    m.def("rounded_gaussians", &Burned<&rounded_gaussians>::call, nb::arg("key"), nb::arg("parameter"), nb::arg("draw"),
          nb::arg("scale"), nb::arg("out"), nb::arg("n"), nb::arg("instructions") = "",
          "n integers round(scale * z), int64, of one parameter in one draw.");
    m.def("gaussian_pair", &gaussian_pair, nb::arg("u_high"), nb::arg("u_low"), nb::arg("v_high"), nb::arg("v_low"),
          nb::arg("scale"), "A pair of rounded Gaussians of these bits: from the leading ones (None: undecided), from all.");
    m.def("private_update", &Burned<&private_update>::call, nb::arg("key"), nb::arg("draw"), nb::arg("rows"), nb::arg("hyper"),
          nb::arg("count"), nb::arg("optimizer"), nb::arg("noisy"), nb::arg("scale"), nb::arg("step"),
          nb::arg("expected_batch_size"), nb::arg("weights"), nb::arg("n_weights"), nb::arg("threads"), nb::arg("instructions") = "",
          "The private update of all rows, in place.");
#if defined(LORA_DP_CUDA_KERNELS)
    m.attr("cuda") = true;
    m.def("keystream_cuda", &Burned<&keystream_cuda>::call, nb::arg("key"), nb::arg("nonce"), nb::arg("counter"), nb::arg("out"),
          nb::arg("n_bytes"), nb::arg("stream"));
    m.def("sampling_bits_cuda", &Burned<&sampling_bits_cuda>::call, nb::arg("key"), nb::arg("draw"), nb::arg("out"), nb::arg("n_bytes"),
          nb::arg("stream"));
    m.def("rounded_gaussians_cuda", &Burned<&rounded_gaussians_cuda>::call, nb::arg("key"), nb::arg("parameter"), nb::arg("draw"),
          nb::arg("scale"), nb::arg("out"), nb::arg("n"), nb::arg("stream"));
    m.def("private_update_cuda", &Burned<&private_update_cuda>::call, nb::arg("key"), nb::arg("draw"), nb::arg("rows"),
          nb::arg("device_rows"), nb::arg("device_hyper"), nb::arg("count"), nb::arg("optimizer"), nb::arg("noisy"),
          nb::arg("scale"), nb::arg("step"), nb::arg("expected_batch_size"), nb::arg("weights"),
          nb::arg("device_weights"), nb::arg("n_weights"), nb::arg("stream"));
#else
    m.attr("cuda") = false;
#endif
}
