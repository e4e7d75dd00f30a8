// y = x / (1 - p) where random_bits(key, i) < keep_threshold(p), else 0; dx = the same of dy.
#include <algorithm>

#include "engine/cpu/parallel.h"
#include "engine/ops.h"
#if WEFT_CUDA
#include "engine/cuda/vector.h"
#endif

namespace weft {
namespace {

template <class T>
void apply(Cpu, const T* x, T* y, int64_t n, RngKey key, uint32_t threshold, acc_t<T> scale) {
  parallel_for((n + 3) / 4, 1024, [=](int64_t from, int64_t to) {
    for (int64_t group = from; group < to; ++group) {
      const Philox4 bits = philox(key, static_cast<uint64_t>(group));
      for (int64_t i = group * 4; i < std::min(n, group * 4 + 4); ++i)
        y[i] = bits.v[i % 4] < threshold ? T(acc_t<T>(x[i]) * scale) : T(0);
    }
  });
}

#if WEFT_CUDA
template <class T>
__global__ void dropout_kernel(const T* x, T* y, int64_t n, RngKey key, uint32_t threshold, float scale) {
  constexpr int kN = kPack<T>;
  const int64_t i = element_index() * kN;
  if (i >= n) return;
  Pack<T, kN> pack = load_pack<kN>(x + i, n - i);
#pragma unroll
  for (int group = 0; group < kN / 4; ++group) {
    const Philox4 bits = philox(key, static_cast<uint64_t>(i / 4 + group));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      T& v = pack.v[group * 4 + j];
      v = T(bits.v[j] < threshold ? float(v) * scale : 0.0f);
    }
  }
  store_pack(y + i, pack, n - i);
}
template <class T>
void apply(Cuda, const T* x, T* y, int64_t n, RngKey key, uint32_t threshold, float scale) {
  launch_elements(dropout_kernel<T>, (n + kPack<T> - 1) / kPack<T>, x, y, n, key, threshold, scale);
}
#endif

Tensor dropped(const Tensor& x, double p, RngKey key) {
  Tensor y = Tensor::like(x);
  on_device(x.device(), [&](auto device) {
    dispatch(device, x.dtype(), [&]<class T>() {
      apply(device, x.data<T>(), y.data<T>(), x.numel(), key, keep_threshold(p), acc_t<T>(1.0 / (1.0 - p)));
    });
  });
  return y;
}

}  // namespace

Tensor dropout(const Tensor& x, double p, RngKey key) {
  check(p >= 0 && p < 1, "dropout's probability must be in [0, 1), found {}", p);
  if (p == 0) return x;
  return record("dropout", dropped(x, p, key), {x},
                [p, key](const Tensor& dy) -> Gradients { return {dropped(dy, p, key)}; });
}

}  // namespace weft
