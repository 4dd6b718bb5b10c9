// The arithmetic of one element of the private update, in double precision: on a CPU and on a GPU the same operations in
// the same order, none fused, so that both give the same bits.
#pragma once

#include <cmath>

#include "rounded_gaussian.h"

namespace lora_dp {

enum Dtype : std::int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
enum Optimizer : std::int64_t { kSgd = 0, kMomentum = 1, kAdam = 2, kAdamW = 3 };

constexpr int kHyperColumns = 8;
// Neighbours on either side of an element that a filter reaches at most, in elements.
constexpr std::int64_t kMostHalo = std::int64_t{1} << 24;

// One parameter of an update: a row of the table that Python fills, all entries 64 bits wide.
struct Row {
    void *theta;                // size elements of theta_dtype
    const void *sum;            // size elements of sum_dtype; with coefficients: examples times as many, example-major
    const double *coefficients;  // of every example, or null: sum is the accumulated one
    void *first, *second;       // the optimizer's states, of theta_dtype; null where it has none
    void *gradient;             // where the noised, filtered gradient goes, of theta_dtype; null: nowhere
    std::int64_t size, examples;
    std::int64_t theta_dtype, sum_dtype;
    std::int64_t stride, length, reach;  // of the filtered dimension; reach 0: no filter
    std::int64_t first_tile;             // on a GPU: the number of the parameter's first tile
};
constexpr int kRowColumns = 14;
static_assert(sizeof(Row) == 8 * kRowColumns, "Python packs a row as so many 64-bit integers");

// What all parameters of an update have in common.
struct Update {
    std::int64_t count;         // of rows
    std::int64_t optimizer;
    std::uint64_t draw;
    bool noisy;
    double scale;               // deviation of the noise in steps of the grid
    double step;                // of the grid, a power of two; without noise unused
    double expected_batch_size;
    const double *weights;      // of the filter, by distance from 0 to the largest reach
};

}  // namespace lora_dp

namespace {

LORA_DP_BOTH float as_float(std::uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

LORA_DP_BOTH std::uint32_t float_bits(float value) {
    std::uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// How the elements of a tensor are read and written. Half precision is rounded from float32, as torch does.
struct Float32 {
    using Stored = float;
    LORA_DP_BOTH static double load(float value) { return value; }
    LORA_DP_BOTH static float store(double value) { return static_cast<float>(value); }
};

struct Float64 {
    using Stored = double;
    LORA_DP_BOTH static double load(double value) { return value; }
    LORA_DP_BOTH static double store(double value) { return value; }
};

struct BFloat16 {
    using Stored = std::uint16_t;
    LORA_DP_BOTH static double load(std::uint16_t value) { return as_float(static_cast<std::uint32_t>(value) << 16); }
    LORA_DP_BOTH static std::uint16_t store(double value) {
        const std::uint32_t bits = float_bits(static_cast<float>(value));
        if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
        return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
};

struct Float16 {
    using Stored = std::uint16_t;
    LORA_DP_BOTH static double load(std::uint16_t value) {
        const std::uint32_t shifted = (value & 0x7fffu) << 13, exponent = shifted & 0x0f800000u;
        const std::uint32_t sign = (value & 0x8000u) << 16;
        if (exponent == 0x0f800000u) return as_float(sign | 0x7f800000u | (shifted & 0x007fffffu));
        if (exponent != 0) return as_float(sign | (shifted + 0x38000000u));
        const float magnitude = as_float(shifted + 0x38800000u) - as_float(0x38800000u);  // subnormal
        return sign ? -magnitude : magnitude;
    }
    LORA_DP_BOTH static std::uint16_t store(double value) {
        const std::uint32_t bits = float_bits(static_cast<float>(value));
        const std::uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
        if (magnitude >= 0x47800000u) return static_cast<std::uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u));
        if (magnitude < 0x38800000u) {  // subnormal in half precision: the addition rounds
            return static_cast<std::uint16_t>(sign | (float_bits(as_float(magnitude) + 0.5f) - 0x3f000000u));
        }
        return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13));
    }
};

// The nearest integer to a number of grid steps, 0 for NaN; what is larger than `most` < 2^51 stops there.
LORA_DP_BOTH std::int64_t on_grid(double steps, double most) {
    const double upper = steps < most ? steps : (steps != steps ? 0.0 : most);
    const double bounded = upper > -most ? upper : -most;
    return static_cast<std::int64_t>(as_bits(bounded + kRounder) - as_bits(kRounder));
}

// The same up to 2^62, in two parts: multiples of 2^24, and the rest.
LORA_DP_BOTH std::int64_t on_wide_grid(double steps) {
    constexpr double most = 4611686018427387904.0, part = 16777216.0;
    const double upper = steps < most ? steps : (steps != steps ? 0.0 : most);
    const double bounded = upper > -most ? upper : -most;
    const double high = (bounded / part + kRounder) - kRounder;
    const double low = bounded - high * part;
    return static_cast<std::int64_t>(((as_bits(high + kRounder) - as_bits(kRounder)) << 24) +
                                     (as_bits(low + kRounder) - as_bits(kRounder)));
}

// How far one of so many examples may reach, in steps, so that no sum of theirs and the noise leaves 64 bits. An example
// that is clipped has at most 2^41 (lora_dp/privacy/noise.py).
LORA_DP_BOTH double most_of_each(std::int64_t examples) {
    const double share = 4611686018427387904.0 / static_cast<double>(examples > 0 ? examples : 1);
    return share < 2251799813685247.0 ? share : 2251799813685247.0;
}

// An integer as a double, rounded once.
LORA_DP_BOTH double from_grid(std::int64_t value) {
    const std::uint64_t sign = static_cast<std::uint64_t>(value) & 0x8000000000000000u;
    const std::uint64_t mask = 0 - (sign >> 63);
    return as_double(as_bits(to_double((static_cast<std::uint64_t>(value) ^ mask) - mask)) | sign);
}

// The new value of an element, as torch's optimizers compute it. hyper: kHyperColumns numbers; for SGD the learning rate,
// weight decay, momentum, 1 - dampening, whether Nesterov's, whether the buffer holds nothing yet; for Adam and AdamW the
// learning rate, weight decay, 1 - beta1, beta2, 1 - beta2, eps, lr / (1 - beta1^t), sqrt(1 - beta2^t).
LORA_DP_BOTH double stepped(std::int64_t optimizer, double theta, double gradient, double &first, double &second,
                            const double *hyper) {
    if (optimizer == lora_dp::kSgd || optimizer == lora_dp::kMomentum) {
        gradient += hyper[1] * theta;
        if (optimizer == lora_dp::kMomentum) {
            first = hyper[5] != 0 ? gradient : hyper[2] * first + hyper[3] * gradient;
            gradient = hyper[4] != 0 ? gradient + hyper[2] * first : first;
        }
        return theta - hyper[0] * gradient;
    }
    if (optimizer == lora_dp::kAdamW) {
        theta *= 1 - hyper[0] * hyper[1];
    } else {
        gradient += hyper[1] * theta;
    }
    first += hyper[2] * (gradient - first);
    second = hyper[3] * second + hyper[4] * gradient * gradient;
    return theta - hyper[6] * first / (sqrt(second) / hyper[7] + hyper[5]);
}

}  // namespace
