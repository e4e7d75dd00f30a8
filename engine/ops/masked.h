// The CPU loop and the kernel of element-by-element ops with a dropout mask: used by the ops' own files only. The mask
// is drawn where it is needed, eight elements of one Philox call at a time.
#pragma once
#include <algorithm>

#include "engine/cpu/parallel.h"
#include "engine/cpu/random_bits.h"
#include "engine/cpu/widest.h"
#if WEFT_CUDA
#include "engine/cuda/vector.h"
#endif

namespace weft {

// Elements of a mask that the CPU draws at once.
constexpr int64_t kDrawn = 512;

// Whether element i is kept; asked in order, neighbours are drawn together.
class MaskReader {
 public:
  explicit MaskReader(Mask mask) : mask_(mask) { mask_.key = mask.key.at_step(); }
  bool operator()(int64_t i) {
    if (i < from_ || i >= from_ + kDrawn) {
      from_ = i / 8 * 8;
      draw_halves(mask_.key, static_cast<uint64_t>(from_), kDrawn, halves_);
    }
    return halves_[i - from_] < mask_.threshold;
  }

 private:
  Mask mask_;
  int64_t from_ = -kDrawn;
  uint16_t halves_[kDrawn];
};

// Draws elements [from, to) of a mask, whose key is at_step(), piece by piece: f(first element, how many, their halves).
template <class F>
void for_drawn(const Mask& mask, int64_t from, int64_t to, F f) {
  uint16_t halves[kDrawn];
  while (from < to) {
    const int64_t first = from / 8 * 8, end = std::min(to, first + kDrawn);
    draw_halves(mask.key, static_cast<uint64_t>(first), end - first, halves);
    f(from, end - from, halves + (from - first));
    from = end;
  }
}

template <class T, class F, class... X>
WEFT_WIDEST void map_drawn(const uint16_t* halves, uint32_t threshold, int64_t n, F f, T* y, const X*... x) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) y[i] = T(f(halves[i] < threshold, acc_t<T>(x[i])...));
}

// y[i] = f(whether i is kept, x[i]...) in T's accumulation type. An x may be y itself.
template <class T, class F, class... X>
void map_masked(Cpu, int64_t n, Mask mask, F f, T* y, const X*... x) {
  mask.key = mask.key.at_step();
  parallel_for((n + kDrawn - 1) / kDrawn, 8, [=](int64_t first, int64_t last) {
    for_drawn(mask, first * kDrawn, std::min(n, last * kDrawn), [&](int64_t from, int64_t count, const uint16_t* halves) {
      map_drawn(halves, mask.threshold, count, f, y + from, x + from...);
    });
  });
}

#ifdef __CUDACC__
// Bit j: whether element i + j is kept, for j in [0, 8). `mask` is that of the step. kAligned: i is a multiple of 8.
template <bool kAligned = false>
__device__ inline uint32_t kept_bits(const Mask& mask, int64_t i) {
  uint32_t kept = 0;
  const auto draw = [&](int group) {
    const Kept8 eight(mask, static_cast<uint64_t>(i) / 8 + group);
#pragma unroll
    for (int j = 0; j < 8; ++j) kept |= static_cast<uint32_t>(eight[j]) << (group * 8 + j);
  };
  draw(0);
  if (kAligned || i % 8 == 0) return kept;
  draw(1);
  return kept >> (i % 8);
}

template <class T, class F, class... X>
__global__ void map_masked_kernel(int64_t n, Mask mask, F f, T* y, const X*... x) {
  constexpr int kN = kPack<T>;
  const int64_t i = element_index() * kN;
  if (i >= n) return;
  mask.key = mask.key.at_step();
  Kept8 kept(mask, static_cast<uint64_t>(i / 8));
  if (kN == 4 && i % 8 != 0) kept.skip_four();
  Pack<T, kN> out;
  const auto apply = [&](const Pack<X, kN>&... in) {
#pragma unroll
    for (int j = 0; j < kN; ++j) out.v[j] = T(f(kept[j], float(in.v[j])...));
  };
  apply(load_pack<kN>(x + i, n - i)...);
  store_pack(y + i, out, n - i);
}
template <class T, class F, class... X>
void map_masked(Cuda, int64_t n, Mask mask, F f, T* y, const X*... x) {
  launch_elements(map_masked_kernel<T, F, X...>, (n + kPack<T> - 1) / kPack<T>, n, mask, f, y, x...);
}
#endif

}  // namespace weft
