// The CPU kernels, for inclusion by one translation unit for each instruction set: loops that a compiler turns into
// vectors. Nothing of the standard library is instantiated here, so that no wide code leaks into the portable path.
#pragma once

#include "chacha20.h"
#include "gaussian_blocks.h"
#include "kernels.h"

namespace {

template <int lanes>
void write_keystream(const lora_dp::Stream &stream, std::uint32_t counter, std::uint8_t *out, std::size_t n_bytes) {
    lora_dp::Stream state = stream;
    state.words[12] = counter;
    keystream<lanes>(state.words, out, n_bytes);
}

template <int lanes>
void write_gaussians(const lora_dp::Stream &key, std::uint32_t parameter, std::uint64_t draw, double scale,
                     std::int64_t first, std::int64_t n, std::int64_t *out) {
    constexpr int blocks = 32, pairs = 4 * blocks;
    const NoiseStreams streams = noise_streams(key, parameter, draw);
    std::uint64_t bits[2 * pairs], sure[pairs];
    std::int64_t values[2 * pairs];
    std::uint32_t block = static_cast<std::uint32_t>(first / lora_dp::kValuesPerBlock);
    for (std::int64_t done = 0; done < n; done += 2 * pairs, block += blocks) {
        const std::int64_t wanted = n - done < 2 * pairs ? n - done : 2 * pairs;
        std::uint8_t *bytes = reinterpret_cast<std::uint8_t *>(bits);
        write_keystream<lanes>(streams.leading, block, bytes, 64 * static_cast<std::size_t>((wanted + 7) / 8));
        // Bits of the last, partial group of values are those of an earlier one: they are computed, not used.
        for (std::int64_t i = 8 * ((wanted + 7) / 8); i < 2 * pairs; ++i) bits[i] = 0;
        for (int p = 0; p < pairs; ++p) {
            sure[p] = decide(little_endian(bits[2 * p]), little_endian(bits[2 * p + 1]), scale, values[2 * p],
                             values[2 * p + 1]);
        }
        for (int p = 0; p < (wanted + 1) / 2; ++p) {
            if (sure[p]) continue;
            const GaussianPair pair = resolve_pair(streams, block + static_cast<std::uint32_t>(p / 4), p % 4,
                                                   little_endian(bits[2 * p]), little_endian(bits[2 * p + 1]), scale);
            values[2 * p] = pair.first;
            values[2 * p + 1] = pair.second;
        }
        memcpy(out + done, values, static_cast<std::size_t>(wanted) * sizeof *values);
    }
}

// Adds each element's sum, in steps of the grid, to what `grid` holds; without noise the sum itself to `exact`.
template <typename Sum>
void add_sums(const lora_dp::Update &update, const lora_dp::Row &row, std::int64_t begin, std::int64_t n,
              const lora_dp::Scratch &scratch) {
    const typename Sum::Stored *sums = static_cast<const typename Sum::Stored *>(row.sum) + begin;
    const double per_step = 1.0 / update.step;
    if (row.coefficients == nullptr) {
        if (update.noisy) {
            for (std::int64_t e = 0; e < n; ++e) scratch.grid[e] += on_wide_grid(Sum::load(sums[e]) * per_step);
        } else {
            for (std::int64_t e = 0; e < n; ++e) scratch.exact[e] += Sum::load(sums[e]);
        }
        return;
    }
    const double most = most_of_each(row.examples);
    for (std::int64_t i = 0; i < row.examples; ++i) {
        const double weight = row.coefficients[i];
        // Whatever an excluded example holds, 0 times NaN too, must not reach a sum.
        if (weight == 0) continue;
        const typename Sum::Stored *values = sums + i * row.size;
        if (update.noisy) {
            for (std::int64_t e = 0; e < n; ++e) {
                scratch.grid[e] += on_grid(weight * Sum::load(values[e]) * per_step, most);
            }
        } else {
            for (std::int64_t e = 0; e < n; ++e) scratch.exact[e] += weight * Sum::load(values[e]);
        }
    }
}

// gradient[e]: the low-pass filtered value of element begin + e, of `values` from element `first` on.
void filtered(const lora_dp::Update &update, const lora_dp::Row &row, const double *values, std::int64_t first,
              std::int64_t begin, std::int64_t n, double *gradient) {
    double total = update.weights[0];
    for (std::int64_t k = 1; k <= row.reach; ++k) total += 2 * update.weights[k];
    // The ends are repeated outwards. Between them all elements have their neighbours at the same distances, and near
    // them those of one position do: such a run is one loop without branches.
    std::int64_t run;
    for (std::int64_t e = 0; e < n; e += run) {
        const std::int64_t index = (begin + e) / row.stride, within = (begin + e) % row.stride;
        const std::int64_t position = index % row.length, left = row.length - 1 - position;
        const bool inner = position >= row.reach && left >= row.reach;
        run = (inner ? left - row.reach + 1 : 1) * row.stride - within;
        if (run > n - e) run = n - e;
        const double *here = values + (begin - first) + e;
        double *out = gradient + e;
        for (std::int64_t i = 0; i < run; ++i) out[i] = update.weights[0] * here[i];
        for (std::int64_t k = 1; k <= row.reach; ++k) {
            const double *before = here - (position < k ? position : k) * row.stride;
            const double *after = here + (left < k ? left : k) * row.stride;
            const double weight = update.weights[k];
            for (std::int64_t i = 0; i < run; ++i) out[i] += weight * (before[i] + after[i]);
        }
        for (std::int64_t i = 0; i < run; ++i) out[i] /= total;
    }
}

template <typename Theta, lora_dp::Optimizer optimizer>
void step_as(const lora_dp::Row &row, const double *hyper, std::int64_t begin, std::int64_t n, const double *gradient) {
    using Stored = typename Theta::Stored;
    constexpr bool has_first = optimizer != lora_dp::kSgd;
    constexpr bool has_second = optimizer == lora_dp::kAdam || optimizer == lora_dp::kAdamW;
    Stored *theta = static_cast<Stored *>(row.theta) + begin;
    Stored *first = has_first ? static_cast<Stored *>(row.first) + begin : nullptr;
    Stored *second = has_second ? static_cast<Stored *>(row.second) + begin : nullptr;
    if (row.gradient != nullptr) {
        Stored *out = static_cast<Stored *>(row.gradient) + begin;
        for (std::int64_t e = 0; e < n; ++e) out[e] = Theta::store(gradient[e]);
    }
    for (std::int64_t e = 0; e < n; ++e) {
        double one = has_first ? Theta::load(first[e]) : 0, two = has_second ? Theta::load(second[e]) : 0;
        theta[e] = Theta::store(stepped(optimizer, Theta::load(theta[e]), gradient[e], one, two, hyper));
        if (has_first) first[e] = Theta::store(one);
        if (has_second) second[e] = Theta::store(two);
    }
}

template <typename Theta>
void step_elements(const lora_dp::Update &update, const lora_dp::Row &row, const double *hyper, std::int64_t begin,
                   std::int64_t n, const double *gradient) {
    switch (update.optimizer) {
        case lora_dp::kSgd: return step_as<Theta, lora_dp::kSgd>(row, hyper, begin, n, gradient);
        case lora_dp::kMomentum: return step_as<Theta, lora_dp::kMomentum>(row, hyper, begin, n, gradient);
        case lora_dp::kAdam: return step_as<Theta, lora_dp::kAdam>(row, hyper, begin, n, gradient);
        default: return step_as<Theta, lora_dp::kAdamW>(row, hyper, begin, n, gradient);
    }
}

template <int lanes>
void write_update_tile(const lora_dp::Stream &key, const lora_dp::Update &update, const lora_dp::Row &row,
                       std::uint32_t parameter, const double *hyper, std::int64_t begin, std::int64_t end,
                       const lora_dp::Scratch &scratch) {
    // A filtered element needs its neighbours' noise too; their tiles draw the same numbers.
    const std::int64_t halo = row.reach * row.stride;
    const std::int64_t low = begin > halo ? begin - halo : 0, high = row.size - end > halo ? end + halo : row.size;
    const std::int64_t first = low - low % lora_dp::kValuesPerBlock, n = high - first;
    double *exact = scratch.exact;
    if (update.noisy) {
        write_gaussians<lanes>(key, parameter, update.draw, update.scale, first, n, scratch.grid);
    } else {
        for (std::int64_t e = 0; e < n; ++e) exact[e] = 0;
    }
    if (row.sum_dtype == lora_dp::kFloat32) {
        add_sums<Float32>(update, row, first, n, scratch);
    } else {
        add_sums<Float64>(update, row, first, n, scratch);
    }
    if (update.noisy) {
        for (std::int64_t e = 0; e < n; ++e) exact[e] = from_grid(scratch.grid[e]) * update.step;
    }
    for (std::int64_t e = 0; e < n; ++e) exact[e] /= update.expected_batch_size;
    const double *gradient = exact + (begin - first);
    if (row.reach > 0) {
        double *smooth = exact + n;
        filtered(update, row, exact, first, begin, end - begin, smooth);
        gradient = smooth;
    }
    switch (row.theta_dtype) {
        case lora_dp::kFloat32: return step_elements<Float32>(update, row, hyper, begin, end - begin, gradient);
        case lora_dp::kBFloat16: return step_elements<BFloat16>(update, row, hyper, begin, end - begin, gradient);
        case lora_dp::kFloat16: return step_elements<Float16>(update, row, hyper, begin, end - begin, gradient);
        default: return step_elements<Float64>(update, row, hyper, begin, end - begin, gradient);
    }
}

}  // namespace
