// How far two right results of one computation may lie apart: the one place tests take a tolerance from.
#pragma once
#include <algorithm>
#include <cmath>

#include "engine/dtype.h"

namespace weft {

// Relative to the larger of the expected value and its tensor's root mean square. `reduction` is how many terms the
// longest sum has: rounding errors of n terms grow with sqrt(n). bf16 keeps its sums in f32 and rounds what it stores.
inline double tolerance(DType dtype, int64_t reduction) {
  const double terms = 16 + 4 * std::sqrt(static_cast<double>(std::max<int64_t>(reduction, 1)));
  switch (dtype) {
    case DType::f64: return std::ldexp(terms, -53);
    case DType::bf16: return std::ldexp(8, -9) + std::ldexp(terms, -24);
    case DType::f32: return std::ldexp(terms, -24);
    default: return 0;
  }
}

// Of an f64 gradient against central differences with a step of 1e-5.
inline constexpr double kFiniteDifferenceTolerance = 2e-6;

}  // namespace weft
