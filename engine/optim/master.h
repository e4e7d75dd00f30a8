// A weight's f32 values as optimizers read and write them: whole, with or without a bf16 copy, or split
// (engine/autograd.h). They are the same to the last bit, and so is what an optimizer makes of them. Used by AdamW and
// Muon.
#pragma once
#include "engine/autograd.h"

namespace weft {

// Elements that a thread of a kernel moves at once.
template <class T, int kN>
struct alignas(sizeof(T) * kN) Elements {
  T v[kN];
};
template <int kN, class T>
WEFT_HD inline Elements<T, kN>& elements(T* p, int64_t i) {
  return reinterpret_cast<Elements<T, kN>*>(p)[i];
}
template <int kN, class T>
WEFT_HD inline const Elements<T, kN>& elements(const T* p, int64_t i) {
  return reinterpret_cast<const Elements<T, kN>*>(p)[i];
}

struct Master {
  float* whole;    // null where the values are split
  bf16* narrow;    // what products read; null where there is no copy
  uint16_t* rest;  // null where the values are whole

  // Elements [i * kN, (i + 1) * kN). kSplit: whether there is a rest.
  template <bool kSplit, int kN>
  WEFT_HD Elements<float, kN> read(int64_t i) const {
    if constexpr (kSplit) {
      const Elements<bf16, kN> nearest = elements<kN>(narrow, i);
      const Elements<uint16_t, kN> rests = elements<kN>(rest, i);
      Elements<float, kN> w;
      for (int j = 0; j < kN; ++j) w.v[j] = whole_of({nearest.v[j], rests.v[j]});
      return w;
    } else {
      return elements<kN>(whole, i);
    }
  }
  template <bool kSplit, int kN>
  WEFT_HD void write(int64_t i, const Elements<float, kN>& w) const {
    Elements<bf16, kN> narrowed;
    if constexpr (kSplit) {
      Elements<uint16_t, kN> rests;
      for (int j = 0; j < kN; ++j) {
        const Halves h = halves_of(w.v[j]);
        narrowed.v[j] = h.nearest, rests.v[j] = h.rest;
      }
      elements<kN>(rest, i) = rests;
    } else {
      elements<kN>(whole, i) = w;
      if (!narrow) return;
      for (int j = 0; j < kN; ++j) narrowed.v[j] = bf16(w.v[j]);
    }
    elements<kN>(narrow, i) = narrowed;
  }
  // Whether kN elements may be moved at once.
  template <int kN>
  WEFT_HD bool aligned() const {
    return (reinterpret_cast<uintptr_t>(whole) | reinterpret_cast<uintptr_t>(narrow) * 2 |
            reinterpret_cast<uintptr_t>(rest) * 2) % (sizeof(float) * kN) == 0;
  }
};

inline Master master_of(const Tensor& leaf) {
  if (const Tensor& rest = leaf.node()->rest) return {nullptr, leaf.data<bf16>(), rest.data<uint16_t>()};
  return {leaf.data<float>(), kept_copy(leaf).data<bf16>(), nullptr};
}

}  // namespace weft
