// y[row] = x[sources[row] / K]; dx[n] = sum_k dy[slots[n, k]], in the order of k.
#include <algorithm>

#include "engine/cpu/parallel.h"
#include "engine/ops/routing.h"
#if WEFT_CUDA
#include "engine/cuda/vector.h"
#endif

namespace weft {
namespace {

template <class T>
void forward(Cpu, const T* x, const int32_t* sources, T* y, const RoutingSize& s, int64_t d) {
  parallel_for(s.tokens * s.chosen, std::max<int64_t>(1, 4096 / (d + 1)), [=](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) std::copy_n(x + sources[row] / s.chosen * d, d, y + row * d);
  });
}
template <class T>
void backward(Cpu, const T* dy, const int32_t* slots, T* dx, const RoutingSize& s, int64_t d) {
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
// One block per row, of y and of dx.
template <class T>
__global__ void gather_rows_forward(const T* x, const int32_t* sources, T* y, int64_t chosen, int64_t d) {
  constexpr int kN = kPack<T>;
  const int64_t row = blockIdx.x;
  x += sources[row] / chosen * d;
  y += row * d;
  for (int64_t i = threadIdx.x * kN; i < d; i += blockDim.x * kN) store_pack(y + i, load_pack<kN>(x + i, d - i), d - i);
}
template <class T>
__global__ void gather_rows_backward(const T* dy, const int32_t* slots, T* dx, int64_t chosen, int64_t d) {
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
void forward(Cuda, const T* x, const int32_t* sources, T* y, const RoutingSize& s, int64_t d) {
  launch_blocks(gather_rows_forward<T>, static_cast<unsigned>(s.tokens * s.chosen), row_threads<T>(d, 256), 0, x,
                sources, y, s.chosen, d);
}
template <class T>
void backward(Cuda, const T* dy, const int32_t* slots, T* dx, const RoutingSize& s, int64_t d) {
  launch_blocks(gather_rows_backward<T>, static_cast<unsigned>(s.tokens), row_threads<T>(d, 256), 0, dy, slots, dx,
                s.chosen, d);
}
#endif

}  // namespace

Tensor gather_rows(const Tensor& x, const Routing& r) {
  const RoutingSize s = size_of_routing("gather_rows", x, r);
  check(x.rank() == 2 && x.size(0) == s.tokens && x.size(1) > 0, "gather_rows needs x [{}, D], found {}", s.tokens,
        x.shape().str());
  const int64_t d = x.size(1);
  Tensor y = Tensor::like(x, {s.tokens * s.chosen, d});
  on_device(x.device(), [&](auto device) {
    dispatch(device, x.dtype(), [&]<class T>() {
      forward(device, x.data<T>(), r.sources.data<int32_t>(), y.data<T>(), s, d);
    });
  });
  return record("gather_rows", y, {x}, [slots = r.slots, s, d](const Tensor& dy) -> Gradients {
    Tensor dx = Tensor::like(dy, {s.tokens, d});
    on_device(dy.device(), [&](auto device) {
      dispatch(device, dy.dtype(), [&]<class T>() {
        backward(device, dy.data<T>(), slots.data<int32_t>(), dx.data<T>(), s, d);
      });
    });
    return {dx};
  });
}

}  // namespace weft
