// exp for the CPU loops of ops, where the compiler shall use vector instructions: the library's is a call per element.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

#include "engine/random.h"

namespace weft {

// On a GPU, and for double, the library's. In float within 2 units in the last place; 0 where the result would be
// subnormal, infinity above 88.7, nan for nan.
template <class A>
WEFT_HD inline A loop_exp(A x) {
#ifdef __CUDA_ARCH__
  return exp(x);
#else
  if constexpr (sizeof(A) != sizeof(float)) {
    return std::exp(x);
  } else {
    // x = n ln 2 + r, |r| <= ln 2 / 2; a polynomial for exp(r), and n into the exponent. Adding 1.5 * 2^23 leaves the
    // nearest integer in the lowest bits.
    constexpr float kRound = 12582912.0f;
    const float within = x > 89.0f ? 89.0f : x;
    const float shifted = within * 1.44269504f + kRound, n = shifted - kRound;
    const float r = within - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // In two factors, as n may be 128.
    const int32_t whole = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound), half = whole >> 1;
    const float first = std::bit_cast<float>((half + 127) << 23), second = std::bit_cast<float>((whole - half + 127) << 23);
    const int32_t y = std::bit_cast<int32_t>(p * first * second);
    return std::bit_cast<float>(x < -87.3f ? 0 : y);
  }
#endif
}

}  // namespace weft
