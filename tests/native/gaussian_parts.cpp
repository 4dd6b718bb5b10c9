// The functions of csrc/rounded_gaussian.h, each by itself, for Python. A Wide is passed as its high and low half.
#include "../../csrc/rounded_gaussian.h"

namespace {

Wide given(const std::uint64_t *halves) { return wide(halves[0], halves[1]); }

void give(Wide value, std::uint64_t *halves) {
    halves[0] = static_cast<std::uint64_t>(value >> 64);
    halves[1] = static_cast<std::uint64_t>(value);
}

}  // namespace

extern "C" {

double part_to_double(std::uint64_t value) { return to_double(value); }

double part_minus_log(double u) { return minus_log(u); }

double part_sine(double x) { return sine(x); }

double part_cosine(double x) { return cosine(x); }

void part_multiply(const std::uint64_t *a, const std::uint64_t *b, std::uint64_t *out) {
    Wide high, low;
    multiply(given(a), given(b), high, low);
    give(high, out);
    give(low, out + 2);
}

void part_product(const std::uint64_t *a, const std::uint64_t *b, std::uint64_t *out) {
    give(product(given(a), given(b)), out);
}

void part_quotient(const std::uint64_t *a, const std::uint64_t *b, std::uint64_t *out) {
    give(quotient(given(a), given(b)), out);
}

void part_square_root(const std::uint64_t *value, std::uint64_t *out) { give(square_root(given(value)), out); }

void part_exact_minus_log(const std::uint64_t *u, std::uint64_t *out) { give(exact_minus_log(given(u)), out); }

void part_exact_series(const std::uint64_t *first, const std::uint64_t *s, unsigned n, std::uint64_t *out) {
    give(exact_series(given(first), given(s), n), out);
}

std::int64_t part_scaled(const std::uint64_t *magnitude, std::uint64_t mantissa, int shift, int negative) {
    return scaled(given(magnitude), mantissa, shift, negative != 0);
}

}  // extern "C"
