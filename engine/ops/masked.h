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

// Whether element i is kept; asked in order, neighbours share one Philox call.
class MaskReader {
 public:
  explicit MaskReader(const Mask& mask) : key_(mask.key.at_step()), threshold_(mask.threshold) {}
  bool operator()(int64_t i) {
    if (i / 4 != group_) group_ = i / 4, bits_ = philox(key_, static_cast<uint64_t>(group_));
    return bits_.v[i % 4] < threshold_;
  }

 private:
  RngKey key_;
  uint32_t threshold_;
  int64_t group_ = -1;
  Philox4 bits_{};
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
// Bit j: whether element i + j is kept, for j in [0, kN). `key` is that of the step. kAligned: i is a multiple of 4.
template <int kN, bool kAligned = false>
__device__ inline uint32_t kept_bits(RngKey key, uint32_t threshold, int64_t i) {
  uint32_t kept = 0;
  const auto draw = [&](int group) {
    const Philox4 bits = philox(key, static_cast<uint64_t>(i / 4 + group));
#pragma unroll
    for (int j = 0; j < 4; ++j) kept |= static_cast<uint32_t>(bits.v[j] < threshold) << (group * 4 + j);
  };
#pragma unroll
  for (int group = 0; group < kN / 4; ++group) draw(group);
  if (kAligned || i % 4 == 0) return kept;
  draw(kN / 4);
  return kept >> (i % 4);
}

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
