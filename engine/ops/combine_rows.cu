// z[n] = sum_k w[n, k] y[slots[n, k]], in the order of k; dy[slots[n, k]] = w[n, k] dz[n];
// dw[n, k] = sum_d dz[n, d] y[slots[n, k], d].
#include <algorithm>

#include "engine/cpu/parallel.h"
#include "engine/ops/routing.h"
#if WEFT_CUDA
#include "engine/cuda/vector.h"
#endif

namespace weft {
namespace {

template <class T, class A = acc_t<T>>
void forward(Cpu, const T* y, const A* weights, const int32_t* slots, T* z, const RoutingSize& s, int64_t d) {
  parallel_for(s.tokens, std::max<int64_t>(1, 4096 / (d + 1)), [=](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n)
      for (int64_t i = 0; i < d; ++i) {
        A sum = 0;
        for (int64_t c = n * s.chosen; c < (n + 1) * s.chosen; ++c) sum += weights[c] * A(y[slots[c] * d + i]);
        z[n * d + i] = T(sum);
      }
  });
}
template <class T, class A = acc_t<T>>
void backward(Cpu, const T* y, const A* weights, const int32_t* slots, const T* dz, T* dy, A* dweights,
              const RoutingSize& s, int64_t d) {
  parallel_for(s.tokens * s.chosen, std::max<int64_t>(1, 4096 / (d + 1)), [=](int64_t from, int64_t to) {
    for (int64_t c = from; c < to; ++c) {
      const int64_t row = slots[c] * d, token = c / s.chosen * d;
      A dot = 0;
      for (int64_t i = 0; i < d; ++i) {
        dot += A(dz[token + i]) * A(y[row + i]);
        dy[row + i] = T(weights[c] * A(dz[token + i]));
      }
      dweights[c] = dot;
    }
  });
}

#if WEFT_CUDA
// One block per token.
template <class T>
__global__ void combine_rows_forward(const T* y, const float* weights, const int32_t* slots, T* z, int64_t chosen,
                                     int64_t d) {
  constexpr int kN = kPack<T>;
  const int64_t n = blockIdx.x;
  for (int64_t i = threadIdx.x * kN; i < d; i += blockDim.x * kN) {
    float sums[kN] = {};
#pragma unroll 2
    for (int64_t c = n * chosen; c < (n + 1) * chosen; ++c) {
      const auto ys = load_pack<kN>(y + slots[c] * d + i, d - i);
      const float weight = weights[c];
#pragma unroll
      for (int j = 0; j < kN; ++j) sums[j] += weight * float(ys.v[j]);
    }
    Pack<T, kN> zs;
#pragma unroll
    for (int j = 0; j < kN; ++j) zs.v[j] = T(sums[j]);
    store_pack(z + n * d + i, zs, d - i);
  }
}
// One block per choice.
template <class T>
__global__ void combine_rows_backward(const T* y, const float* weights, const int32_t* slots, const T* dz, T* dy,
                                      float* dweights, int64_t chosen, int64_t d) {
  constexpr int kN = kPack<T>;
  const int64_t c = blockIdx.x, row = slots[c] * d;
  const float weight = weights[c];
  dz += c / chosen * d;
  float dot = 0;
  for (int64_t i = threadIdx.x * kN; i < d; i += blockDim.x * kN) {
    auto dzs = load_pack<kN>(dz + i, d - i);
    const auto ys = load_pack<kN>(y + row + i, d - i);
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      dot += float(dzs.v[j]) * float(ys.v[j]);
      dzs.v[j] = T(weight * float(dzs.v[j]));
    }
    store_pack(dy + row + i, dzs, d - i);
  }
  dot = block_sum(dot);
  if (threadIdx.x == 0) dweights[c] = dot;
}
template <class T>
void forward(Cuda, const T* y, const float* weights, const int32_t* slots, T* z, const RoutingSize& s, int64_t d) {
  launch_blocks(combine_rows_forward<T>, static_cast<unsigned>(s.tokens), row_threads<T>(d, 256), 0, y, weights, slots,
                z, s.chosen, d);
}
template <class T>
void backward(Cuda, const T* y, const float* weights, const int32_t* slots, const T* dz, T* dy, float* dweights,
              const RoutingSize& s, int64_t d) {
  launch_blocks(combine_rows_backward<T>, static_cast<unsigned>(s.tokens * s.chosen), row_threads<T>(d, 256), 0, y,
                weights, slots, dz, dy, dweights, s.chosen, d);
}
#endif

}  // namespace

Tensor combine_rows(const Tensor& y, const Tensor& weights, const Routing& r) {
  const RoutingSize s = size_of_routing("combine_rows", y, r);
  const DType wide = y.dtype() == DType::f64 ? DType::f64 : DType::f32;
  check(y.rank() == 2 && y.size(0) == s.tokens * s.chosen && y.size(1) > 0 &&
            weights.shape() == Shape({s.tokens, s.chosen}) && weights.dtype() == wide && weights.device() == y.device(),
        "combine_rows needs y [{}, D] and weights [{}, {}] of {} on one device, found y {} and weights {} of {}",
        s.tokens * s.chosen, s.tokens, s.chosen, name_of(wide), y.shape().str(), weights.shape().str(),
        name_of(weights.dtype()));
  const int64_t d = y.size(1);
  Tensor z = Tensor::like(y, {s.tokens, d});
  on_device(y.device(), [&](auto device) {
    dispatch(device, y.dtype(), [&]<class T>() {
      forward(device, y.data<T>(), weights.data<acc_t<T>>(), r.slots.data<int32_t>(), z.data<T>(), s, d);
    });
  });
  return record("combine_rows", z, {y, weights},
                [y = y.detached(), weights = weights.detached(), slots = r.slots, s, d](const Tensor& dz) -> Gradients {
                  Tensor dy = Tensor::like(y), dweights = Tensor::like(weights);
                  on_device(y.device(), [&](auto device) {
                    dispatch(device, y.dtype(), [&]<class T>() {
                      backward(device, y.data<T>(), weights.data<acc_t<T>>(), slots.data<int32_t>(), dz.data<T>(),
                               dy.data<T>(), dweights.data<acc_t<T>>(), s, d);
                    });
                  });
                  return {dy, dweights};
                });
}

}  // namespace weft
