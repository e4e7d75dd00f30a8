// gather_rows: y[slots[n, k]] = x[n]; dx[n] = sum_k dy[slots[n, k]], in the order of k. sum_rows is the other way
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
void gather(Cpu, const T* x, const int32_t* slots, T* y, const RoutingSize& s, int64_t d) {
  parallel_for(s.tokens, std::max<int64_t>(1, 4096 / (d + 1)), [=](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n)
      for (int64_t k = 0; k < s.chosen; ++k) std::copy_n(x + n * d, d, y + slots[n * s.chosen + k] * d);
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
// A warp has a token, and kEach packs a lane of a row on the way at once. Of [8192, 768] in bf16 and two choices on an
// H200, from memory (the L2): 11.1 us (8.0) to gather, where a block per row of y took 13.4 (11.3); 11.4 us (6.4) to
// sum.
constexpr int kEach = 3;

// E: 16 bytes where rows are whole ones, else an element. `width` counts them.
template <class E>
__global__ void gather_kernel(const E* __restrict__ x, const int32_t* __restrict__ slots, E* __restrict__ y,
                              RoutingSize s, int64_t width) {
  const int64_t n = element_index() / 32;
  if (n >= s.tokens) return;
  for (int64_t i = threadIdx.x % 32; i < width; i += kEach * 32) {
    E xs[kEach];
#pragma unroll
    for (int p = 0; p < kEach; ++p)
      if (i + p * 32 < width) xs[p] = x[n * width + i + p * 32];
#pragma unroll 2
    for (int64_t k = 0; k < s.chosen; ++k) {
      E* to = y + slots[n * s.chosen + k] * width + i;
#pragma unroll
      for (int p = 0; p < kEach; ++p)
        if (i + p * 32 < width) to[p * 32] = xs[p];
    }
  }
}
// kWhole: rows are kEach whole packs of every lane, so many times.
template <bool kWhole, class T>
__global__ void sum_choices_kernel(const T* __restrict__ dy, const int32_t* __restrict__ slots, T* __restrict__ dx,
                                   RoutingSize s, int64_t d) {
  constexpr int kN = kPack<T>, kPacks = kWhole ? kEach : 1, kStep = 32 * kN;
  const int64_t n = element_index() / 32;
  if (n >= s.tokens) return;
  for (int64_t i = threadIdx.x % 32 * kN; i < d; i += kPacks * kStep) {
    float sums[kPacks][kN] = {};
#pragma unroll 2
    for (int64_t k = 0; k < s.chosen; ++k) {
      const T* from = dy + slots[n * s.chosen + k] * d + i;
      Pack<T, kN> dys[kPacks];
#pragma unroll
      for (int p = 0; p < kPacks; ++p)
        dys[p] = load_part<kWhole, kN>(from + p * kStep, d - i);
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        float values[kN];
        widen(dys[p], values);
#pragma unroll
        for (int j = 0; j < kN; ++j) sums[p][j] += values[j];
      }
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
      store_part<kWhole>(dx + n * d + i + p * kStep, narrow<T>(sums[p]), d - i);
  }
}
bool at_16_bytes(const void* a, const void* b) {
  return (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % 16 == 0;
}
template <class T>
void gather(Cuda, const T* x, const int32_t* slots, T* y, const RoutingSize& s, int64_t d) {
  if (at_16_bytes(x, y) && d % kPack<T> == 0)
    launch_elements(gather_kernel<uint4>, s.tokens * 32, reinterpret_cast<const uint4*>(x), slots,
                    reinterpret_cast<uint4*>(y), s, d / kPack<T>);
  else
    launch_elements(gather_kernel<T>, s.tokens * 32, x, slots, y, s, d);
}
template <class T>
void sum_choices(Cuda, const T* dy, const int32_t* slots, T* dx, const RoutingSize& s, int64_t d) {
  const bool whole = at_16_bytes(dy, dx) && d % (kEach * 32 * kPack<T>) == 0;
  launch_elements(whole ? sum_choices_kernel<true, T> : sum_choices_kernel<false, T>, s.tokens * 32, dy, slots, dx, s,
                  d);
}
#endif

Tensor gathered(const Tensor& x, const Tensor& slots, const RoutingSize& s) {
  Tensor y = Tensor::like(x, {s.tokens * s.chosen, x.size(1)});
  on_device(x.device(), [&](auto device) {
    dispatch(device, x.dtype(), [&]<class T>() {
      gather(device, x.data<T>(), slots.data<int32_t>(), y.data<T>(), s, x.size(1));
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
  return record("gather_rows", gathered(x, r.slots, s), {x},
                [slots = r.slots, s](const Tensor& dy) -> Gradients { return {summed(dy, slots, s)}; });
}

Tensor sum_rows(const Tensor& y, const Routing& r) {
  const RoutingSize s = size_of_routing("sum_rows", y, r);
  check(y.rank() == 2 && y.size(0) == s.tokens * s.chosen && y.size(1) > 0, "sum_rows needs y [{}, D], found {}",
        s.tokens * s.chosen, y.shape().str());
  return record("sum_rows", summed(y, r.slots, s), {y},
                [slots = r.slots, s](const Tensor& dx) -> Gradients { return {gathered(dx, slots, s)}; });
}

}  // namespace weft
