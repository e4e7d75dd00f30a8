// The CPU loop and the kernel of element-by-element ops with a dropout mask: used by the ops' own files only. The mask
// is drawn where it is needed, eight elements of one Philox call at a time.
#pragma once
#include <algorithm>

#include "engine/cpu/parallel.h"
#include "engine/random.h"
#if WEFT_CUDA
#include "engine/cuda/vector.h"
#endif

namespace weft {

// Whether element i is kept; asked in order, neighbours share one Philox call.
class MaskReader {
 public:
  explicit MaskReader(Mask mask) : mask_(mask) { mask_.key = mask.key.at_step(); }
  bool operator()(int64_t i) {
    if (i / 8 != group_) group_ = i / 8, kept_ = Kept8(mask_, static_cast<uint64_t>(group_));
    return kept_[static_cast<int>(i % 8)];
  }

 private:
  Mask mask_;
  int64_t group_ = -1;
  Kept8 kept_;
};

// y[i] = f(whether i is kept, x[i]...) in T's accumulation type. An x may be y itself.
template <class T, class F, class... X>
void map_masked(Cpu, int64_t n, Mask mask, F f, T* y, const X*... x) {
  parallel_for((n + 7) / 8, 512, [=](int64_t from, int64_t to) {
    MaskReader kept(mask);
    for (int64_t i = from * 8; i < std::min(n, to * 8); ++i) y[i] = T(f(kept(i), acc_t<T>(x[i])...));
  });
}

#ifdef __CUDACC__
// Bit j: whether element i + j is kept, for j in [0, 8). `mask` is that of the step. kAligned: i is a multiple of 8.
template <bool kAligned = false>
__device__ inline uint32_t kept_bits(const Mask& mask, int64_t i) {
  uint32_t kept = 0;
  const auto draw = [&](int group) {
    const Kept8 eight(mask, static_cast<uint64_t>(i / 8 + group));
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
