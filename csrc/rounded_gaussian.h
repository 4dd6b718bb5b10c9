// round(scale · z) for standard normals z by Box and Muller (1958), correctly rounded: the integer depends on the random
// bits alone, not on the processor, the compiler or its options.
//
// A pair is a function of 256 bits: u, an odd multiple of 2^-128 in (0, 1), and v, a multiple of 2^-128 in [0, 1);
// r = sqrt(-2 ln u), z = r cos 2 pi v and r sin 2 pi v. The first 64 bits of each decide nearly always: `decide` works in
// double precision with a margin for all its errors, and says so where a multiple of 1/2 lies within the margin (about
// eight pairs in ten thousand). `resolve` then takes all 256 bits in fixed point with 120 fractional bits. Its truncations
// add up to less than 2^-111 (1 + 1/r) of a deviation, hence 2^-78 (1 + 1/r) of a unit, scale being below 2^33: averaged
// over r, the integer is wrong with probability below 2^-75.
#pragma once

#include <cmath>

#include "portable.h"

namespace {

struct GaussianPair {
    std::int64_t first, second;
};

// Adding and subtracting it rounds a double below 2^51 to an integer.
constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52

// An unsigned integer as a double, rounded once; in operations that every vector unit has.
LORA_DP_BOTH double to_double(std::uint64_t value) {
    const double high = as_double((value >> 32) | 0x4530000000000000u);           // 2^84 + 2^32 * high half
    const double low = as_double((value & 0xffffffffu) | 0x4330000000000000u);    // 2^52 + low half
    return (high - 19342813118337666422669312.0) + low;                           // 2^84 + 2^52
}

// -ln u for u in [2^-64, 1], error below 2^-51 + 2^-51 |result|: u = m 2^k with m in [sqrt(1/2), sqrt(2)),
// ln m = 2 artanh f, f = (m - 1) / (m + 1), |f| < 0.1716; the series' remainder is below 2^-60.
LORA_DP_BOTH double minus_log(double u) {
    constexpr std::uint64_t root_half = 0x3fe6a09e667f3bcdu;
    const std::uint64_t shifted = as_bits(u) - root_half + (std::uint64_t{1024} << 52);
    const std::uint64_t k = shifted >> 52;  // exponent + 1024
    const double m = as_double(as_bits(u) - ((k - 1024) << 52));
    const double exponent = as_double(k | 0x4330000000000000u) - (4503599627370496.0 + 1024.0);
    const double f = (m - 1.0) / (m + 1.0), s = f * f;
    double p = 1.0 / 23;
    p = p * s + 1.0 / 21;
    p = p * s + 1.0 / 19;
    p = p * s + 1.0 / 17;
    p = p * s + 1.0 / 15;
    p = p * s + 1.0 / 13;
    p = p * s + 1.0 / 11;
    p = p * s + 1.0 / 9;
    p = p * s + 1.0 / 7;
    p = p * s + 1.0 / 5;
    p = p * s + 1.0 / 3;
    const double log_m = 2.0 * f + 2.0 * f * (s * p);
    // ln 2 in two parts: the product of the first with an exponent is exact.
    return -(exponent * 0.693147180369123816490 + (log_m + exponent * 1.90821492927058770002e-10));
}

// sin and cos of an angle in [-pi/4, pi/4] by their Taylor series, remainders below 2^-58, errors below 2^-52.
LORA_DP_BOTH double sine(double x) {
    const double s = x * x;
    double p = 1.0 / 355687428096000.0;
    p = p * s - 1.0 / 1307674368000.0;
    p = p * s + 1.0 / 6227020800.0;
    p = p * s - 1.0 / 39916800.0;
    p = p * s + 1.0 / 362880.0;
    p = p * s - 1.0 / 5040.0;
    p = p * s + 1.0 / 120.0;
    p = p * s - 1.0 / 6.0;
    return x + x * (s * p);
}

LORA_DP_BOTH double cosine(double x) {
    const double s = x * x;
    double p = 1.0 / 20922789888000.0;
    p = p * s - 1.0 / 87178291200.0;
    p = p * s + 1.0 / 479001600.0;
    p = p * s - 1.0 / 3628800.0;
    p = p * s + 1.0 / 40320.0;
    p = p * s - 1.0 / 720.0;
    p = p * s + 1.0 / 24.0;
    p = p * s - 0.5;
    return 1.0 + s * p;
}

// The pair from the leading 64 bits of u and v, for 1 <= scale < 2^33. Returns 1 where they decide it, else 0.
//
// Errors, in units of the result, given u >= 2^-14 and -ln u >= 2^-12: the bits not seen, the conversion and the series
// change -ln u by at most 2^-53 + 2^-48 of it, hence r by at most 2^-47.5 + 2^-49 r; angle, sine and cosine, and the
// products, add less than 2^-50 r. All is below half of scale · 2^-46.5 (1 + r), and the margin is that.
LORA_DP_BOTH std::uint64_t decide(std::uint64_t u_bits, std::uint64_t v_bits, double scale, std::int64_t &first,
                                  std::int64_t &second) {
    const double loss = minus_log(to_double(u_bits | 1) * 0x1p-64);
    const double radius = sqrt(2.0 * loss) * scale;

    // v = octant / 8 + rest; odd octants are measured back from their end, so that |angle| <= pi / 4.
    const std::uint64_t octant = v_bits >> 61, quarter = (octant + 1) >> 1;
    const double back = as_double((octant & 1) * 0x43c0000000000000u);  // 2^61 or 0
    const double angle = (to_double(v_bits & 0x1fffffffffffffffu) - back) * 0x1.921fb54442d18p-62;  // 2 pi 2^-64
    const double s = sine(angle), c = cosine(angle);
    const std::uint64_t swap = 0 - (quarter & 1), s_bits = as_bits(s), c_bits = as_bits(c);
    const double along = as_double(((c_bits & ~swap) | (s_bits & swap)) ^ ((((quarter + 1) >> 1) & 1) << 63));
    const double across = as_double(((s_bits & ~swap) | (c_bits & swap)) ^ (((quarter >> 1) & 1) << 63));

    const double x = radius * along, y = radius * across;
    const double x_rounder = x + kRounder, y_rounder = y + kRounder;
    const double limit = 0.5 - 0x1.6a09ep-47 * (scale + radius);
    first = static_cast<std::int64_t>(as_bits(x_rounder) - as_bits(kRounder));
    second = static_cast<std::int64_t>(as_bits(y_rounder) - as_bits(kRounder));
    const std::uint64_t sure_x = fabs(x - (x_rounder - kRounder)) < limit;
    const std::uint64_t sure_y = fabs(y - (y_rounder - kRounder)) < limit;
    const std::uint64_t in_range = (u_bits >= (std::uint64_t{1} << 50)) & static_cast<std::uint64_t>(loss >= 0x1p-12);
    return sure_x & sure_y & in_range;
}

using Wide = unsigned __int128;
constexpr int kFraction = 120;  // bits after the point of every Wide below that stands for a number

LORA_DP_BOTH Wide wide(std::uint64_t high, std::uint64_t low) { return (static_cast<Wide>(high) << 64) | low; }

// a * b as high * 2^128 + low.
LORA_DP_BOTH void multiply(Wide a, Wide b, Wide &high, Wide &low) {
    const std::uint64_t a1 = static_cast<std::uint64_t>(a >> 64), a0 = static_cast<std::uint64_t>(a);
    const std::uint64_t b1 = static_cast<std::uint64_t>(b >> 64), b0 = static_cast<std::uint64_t>(b);
    const Wide p00 = static_cast<Wide>(a0) * b0, p01 = static_cast<Wide>(a0) * b1;
    const Wide p10 = static_cast<Wide>(a1) * b0, p11 = static_cast<Wide>(a1) * b1;
    const Wide middle = (p00 >> 64) + static_cast<std::uint64_t>(p01) + static_cast<std::uint64_t>(p10);
    low = (middle << 64) | static_cast<std::uint64_t>(p00);
    high = p11 + (p01 >> 64) + (p10 >> 64) + (middle >> 64);
}

LORA_DP_BOTH Wide product(Wide a, Wide b) {
    Wide high, low;
    multiply(a, b, high, low);
    return (high << (128 - kFraction)) | (low >> kFraction);
}

// numerator / denominator below 1, bit by bit: nvcc has no wider division.
LORA_DP_BOTH Wide quotient(Wide numerator, Wide denominator) {
    Wide result = 0;
    for (int bit = 0; bit < kFraction; ++bit) {
        numerator <<= 1;
        result <<= 1;
        if (numerator >= denominator) {
            numerator -= denominator;
            result |= 1;
        }
    }
    return result;
}

LORA_DP_BOTH Wide square_root(Wide value) {
    Wide root = 0;
    for (int bit = 123; bit >= 0; --bit) {
        const Wide candidate = root | (static_cast<Wide>(1) << bit);
        if (product(candidate, candidate) <= value) root = candidate;
    }
    return root;
}

// -ln(u 2^-128), u odd, error below 2^-112: as in minus_log, with the series to f^49 / 49, remainder below 2^-122.
LORA_DP_BOTH Wide exact_minus_log(Wide u) {
    const Wide one = static_cast<Wide>(1) << kFraction, root_two = wide(0x016a09e667f3bcc9u, 0x08b2fb1366ea957du);
    const Wide ln_2 = wide(0x00b17217f7d1cf79u, 0xabc9e3b39803f2f6u);
    int exponent = 0;  // u 2^-128 = m 2^-exponent, m in [sqrt(1/2), sqrt(2))
    while (!(u >> 127)) {
        u <<= 1;
        ++exponent;
    }
    Wide m = u >> (127 - kFraction);
    ++exponent;
    if (m > root_two) {
        m >>= 1;
        --exponent;
    }
    const bool below_one = m < one;
    const Wide f = quotient(below_one ? one - m : m - one, m + one), s = product(f, f);
    Wide term = f, sum = 0;
    for (unsigned n = 1; n <= 49; n += 2) {
        sum += term / n;
        term = product(term, s);
    }
    return below_one ? exponent * ln_2 + 2 * sum : exponent * ln_2 - 2 * sum;
}

// sin (from x, with n = 1) or cos (from 1, with n = 0) of x in [0, pi/4], s = x^2, error below 2^-117.
LORA_DP_BOTH Wide exact_series(Wide first, Wide s, unsigned n) {
    Wide positive = 0, negative = 0, term = first;
    for (int i = 0; i < 8; ++i) {
        positive += term;
        term = product(term, s) / ((n + 1) * (n + 2));
        negative += term;
        term = product(term, s) / ((n + 3) * (n + 4));
        n += 4;
    }
    return positive - negative;
}

// magnitude * scale rounded to the nearest integer, half away from zero; scale = mantissa 2^-shift.
LORA_DP_BOTH std::int64_t scaled(Wide magnitude, std::uint64_t mantissa, int shift, bool negative) {
    Wide high, low;
    multiply(magnitude, mantissa, high, low);
    const int point = kFraction + shift - 128;  // of the high half; at least 12, since scale < 2^33
    const Wide rounded = (high + (static_cast<Wide>(1) << (point - 1))) >> point;
    const std::int64_t result = static_cast<std::int64_t>(rounded);
    return negative ? -result : result;
}

// The pair from all bits: u = (u_high 2^64 + u_low | 1) 2^-128, v = (v_high 2^64 + v_low) 2^-128; 1 <= scale < 2^33.
LORA_DP_BOTH GaussianPair resolve(std::uint64_t u_high, std::uint64_t u_low, std::uint64_t v_high, std::uint64_t v_low,
                                  double scale) {
    const Wide two_pi = wide(0x06487ed5110b4611u, 0xa62633145c06e0e6u);
    const Wide radius = square_root(2 * exact_minus_log(wide(u_high, u_low | 1)));

    const Wide v = wide(v_high, v_low), eighth = static_cast<Wide>(1) << 125;
    const unsigned octant = static_cast<unsigned>(v >> 125), quarter = (octant + 1) >> 1;
    const Wide rest = v & (eighth - 1);
    Wide angle, low;
    multiply(octant & 1 ? eighth - rest : rest, two_pi, angle, low);
    const Wide s = product(angle, angle);
    const Wide sine = exact_series(angle, s, 1), cosine = exact_series(static_cast<Wide>(1) << kFraction, s, 0);
    const bool angle_negative = octant & 1;

    const bool swapped = quarter & 1;
    const bool minus_first = ((quarter + 1) >> 1 & 1) != (swapped && angle_negative);
    const bool minus_second = (quarter >> 1 & 1) != (!swapped && angle_negative);
    const std::uint64_t bits = as_bits(scale);
    const std::uint64_t mantissa = (bits & 0xfffffffffffffu) | 0x10000000000000u;
    const int shift = 1075 - static_cast<int>(bits >> 52);
    return {scaled(product(radius, swapped ? sine : cosine), mantissa, shift, minus_first),
            scaled(product(radius, swapped ? cosine : sine), mantissa, shift, minus_second)};
}

}  // namespace
