// The CPU loop and the kernel of element-by-element ops with a dropout mask: used by the ops' own files only. The mask
// is drawn where it is needed, four elements of one Philox call at a time.
#pragma once
#include <algorithm>

#include "engine/cpu/parallel.h"
#include "engine/random.h"
#if WEFT_CUDA
#include "engine/cuda/vector.h"
#endif

namespace weft {

struct Mask {
  RngKey key;
  uint32_t threshold;
  Mask(RngKey key, double p) : key(key), threshold(keep_threshold(p)) {}
};

// y[i] = f(whether i is kept, x[i]...) in T's accumulation type. An x may be y itself.
template <class T, class F, class... X>
void map_masked(Cpu, int64_t n, Mask mask, F f, T* y, const X*... x) {
  const RngKey key = mask.key.at_step();
  parallel_for((n + 3) / 4, 1024, [=](int64_t from, int64_t to) {
    for (int64_t group = from; group < to; ++group) {
      const Philox4 bits = philox(key, static_cast<uint64_t>(group));
      for (int64_t i = group * 4; i < std::min(n, group * 4 + 4); ++i)
        y[i] = T(f(bits.v[i % 4] < mask.threshold, acc_t<T>(x[i])...));
    }
  });
}

#ifdef __CUDACC__
template <class T, class F, class... X>
__global__ void map_masked_kernel(int64_t n, Mask mask, F f, T* y, const X*... x) {
  constexpr int kN = kPack<T>;
  const int64_t i = element_index() * kN;
  if (i >= n) return;
  const RngKey key = mask.key.at_step();
  Pack<T, kN> out;
  const auto apply = [&](const Pack<X, kN>&... in) {
#pragma unroll
    for (int group = 0; group < kN / 4; ++group) {
      const Philox4 bits = philox(key, static_cast<uint64_t>(i / 4 + group));
#pragma unroll
      for (int j = group * 4; j < group * 4 + 4; ++j)
        out.v[j] = T(f(bits.v[j % 4] < mask.threshold, float(in.v[j])...));
    }
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
