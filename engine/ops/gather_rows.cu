// gather_rows: y[row] = x[sources[row] / K]; dx[n] = sum_k dy[slots[n, k]], in the order of k. sum_rows is the other way
// round: each is the other's gradient.
#include <algorithm>

#include "engine/cpu/parallel.h"
#include "engine/ops/routing.h"
#if WEFT_CUDA
#include "engine/cuda/vector.h"
#endif

namespace weft {
namespace {

template <class T>
void gather(Cpu, const T* x, const int32_t* sources, T* y, const RoutingSize& s, int64_t d) {
  parallel_for(s.tokens * s.chosen, std::max<int64_t>(1, 4096 / (d + 1)), [=](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) std::copy_n(x + sources[row] / s.chosen * d, d, y + row * d);
  });
}
template <class T>
void sum_choices(Cpu, const T* dy, const int32_t* slots, T* dx, const RoutingSize& s, int64_t d) {
  parallel_for(s.tokens, std::max<int64_t>(1, 4096 / (d + 1)), [=](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n)
      for (int64_t i = 0; i < d; ++i) {
        acc_t<T> sum = 0;
        for (int64_t k = 0; k < s.chosen; ++k) sum += dy[slots[n * s.chosen + k] * d + i];
        dx[n * d + i] = T(sum);
      }
  });
}

#if WEFT_CUDA
// One block per row, of y and of the sums.
template <class T>
__global__ void gather_kernel(const T* x, const int32_t* sources, T* y, int64_t chosen, int64_t d) {
  constexpr int kN = kPack<T>;
  const int64_t row = blockIdx.x;
  x += sources[row] / chosen * d;
  y += row * d;
  for (int64_t i = threadIdx.x * kN; i < d; i += blockDim.x * kN) store_pack(y + i, load_pack<kN>(x + i, d - i), d - i);
}
template <class T>
__global__ void sum_choices_kernel(const T* dy, const int32_t* slots, T* dx, int64_t chosen, int64_t d) {
  constexpr int kN = kPack<T>;
  const int64_t n = blockIdx.x;
  for (int64_t i = threadIdx.x * kN; i < d; i += blockDim.x * kN) {
    float sums[kN] = {};
#pragma unroll 2
    for (int64_t k = 0; k < chosen; ++k) {
      const auto dys = load_pack<kN>(dy + slots[n * chosen + k] * d + i, d - i);
#pragma unroll
      for (int j = 0; j < kN; ++j) sums[j] += float(dys.v[j]);
    }
    Pack<T, kN> dxs;
#pragma unroll
    for (int j = 0; j < kN; ++j) dxs.v[j] = T(sums[j]);
    store_pack(dx + n * d + i, dxs, d - i);
  }
}
template <class T>
void gather(Cuda, const T* x, const int32_t* sources, T* y, const RoutingSize& s, int64_t d) {
  launch_blocks(gather_kernel<T>, static_cast<unsigned>(s.tokens * s.chosen), row_threads<T>(d, 256), 0, x,
                sources, y, s.chosen, d);
}
template <class T>
void sum_choices(Cuda, const T* dy, const int32_t* slots, T* dx, const RoutingSize& s, int64_t d) {
  launch_blocks(sum_choices_kernel<T>, static_cast<unsigned>(s.tokens), row_threads<T>(d, 256), 0, dy, slots, dx,
                s.chosen, d);
}
#endif

Tensor gathered(const Tensor& x, const Tensor& sources, const RoutingSize& s) {
  Tensor y = Tensor::like(x, {s.tokens * s.chosen, x.size(1)});
  on_device(x.device(), [&](auto device) {
    dispatch(device, x.dtype(), [&]<class T>() {
      gather(device, x.data<T>(), sources.data<int32_t>(), y.data<T>(), s, x.size(1));
    });
  });
  return y;
}
Tensor summed(const Tensor& y, const Tensor& slots, const RoutingSize& s) {
  Tensor x = Tensor::like(y, {s.tokens, y.size(1)});
  on_device(y.device(), [&](auto device) {
    dispatch(device, y.dtype(), [&]<class T>() {
      sum_choices(device, y.data<T>(), slots.data<int32_t>(), x.data<T>(), s, y.size(1));
    });
  });
  return x;
}

}  // namespace

Tensor gather_rows(const Tensor& x, const Routing& r) {
  const RoutingSize s = size_of_routing("gather_rows", x, r);
  check(x.rank() == 2 && x.size(0) == s.tokens && x.size(1) > 0, "gather_rows needs x [{}, D], found {}", s.tokens,
        x.shape().str());
  return record("gather_rows", gathered(x, r.sources, s), {x},
                [slots = r.slots, s](const Tensor& dy) -> Gradients { return {summed(dy, slots, s)}; });
}

Tensor sum_rows(const Tensor& y, const Routing& r) {
  const RoutingSize s = size_of_routing("sum_rows", y, r);
  check(y.rank() == 2 && y.size(0) == s.tokens * s.chosen && y.size(1) > 0, "sum_rows needs y [{}, D], found {}",
        s.tokens * s.chosen, y.shape().str());
  return record("sum_rows", summed(y, r.slots, s), {y},
                [sources = r.sources, s](const Tensor& dx) -> Gradients { return {gathered(dx, sources, s)}; });
}

}  // namespace weft
