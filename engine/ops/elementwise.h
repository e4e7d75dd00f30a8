// The CPU loop and the kernel of ops that go element by element: used by the ops' own files only. A form is a functor
// over values in the output's accumulation type. On a GPU each thread moves 16 bytes of the widest operand at a time
// where all pointers allow it, so that these ops run at the speed of memory.
#pragma once
#include <algorithm>
#include <cstddef>

#include "engine/cpu/parallel.h"
#include "engine/cpu/widest.h"
#include "engine/dtype.h"
#if WEFT_CUDA
#include "engine/cuda/stream.h"
#endif

namespace weft {

template <class F, class Y, class... X>
WEFT_WIDEST void map_range(int64_t from, int64_t to, F f, Y* y, const X*... x) {
#pragma GCC ivdep
  for (int64_t i = from; i < to; ++i) y[i] = Y(f(static_cast<acc_t<Y>>(x[i])...));
}

// y[i] = f(x[i]...). An x may be y itself.
template <class F, class Y, class... X>
void map_elements(Cpu, int64_t n, F f, Y* y, const X*... x) {
  parallel_for(n, 4096, [=](int64_t from, int64_t to) { map_range(from, to, f, y, x...); });
}

// y[i] = f(i).
template <class F, class Y>
void map_indices(Cpu, int64_t n, F f, Y* y) {
  parallel_for(n, 4096, [=](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) y[i] = Y(static_cast<acc_t<Y>>(f(i)));
  });
}

#ifdef __CUDACC__
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T v[kWidth];
};

template <int kWidth, class F, class Y, class... X>
__global__ void map_elements_kernel(int64_t n, F f, Y* y, const X*... x) {
  const int64_t at = element_index(), from = at * kWidth;
  if (from + kWidth <= n) {
    Pack<Y, kWidth> out;
    const auto apply = [&](const Pack<X, kWidth>&... in) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) out.v[j] = Y(f(static_cast<acc_t<Y>>(in.v[j])...));
    };
    apply(reinterpret_cast<const Pack<X, kWidth>*>(x)[at]...);
    reinterpret_cast<Pack<Y, kWidth>*>(y)[at] = out;
  } else {
    for (int64_t i = from; i < n; ++i) y[i] = Y(f(static_cast<acc_t<Y>>(x[i])...));
  }
}

template <class F, class Y>
__global__ void map_indices_kernel(int64_t n, F f, Y* y) {
  if (const int64_t i = element_index(); i < n) y[i] = Y(static_cast<acc_t<Y>>(f(i)));
}

template <class F, class Y, class... X>
void map_elements(Cuda, int64_t n, F f, Y* y, const X*... x) {
  constexpr size_t kWidest = std::max({sizeof(Y), sizeof(X)...});
  constexpr int kWidth = static_cast<int>(16 / kWidest);
  const auto aligned = [](const auto* p) { return reinterpret_cast<uintptr_t>(p) % (sizeof(*p) * kWidth) == 0; };
  if (aligned(y) && (aligned(x) && ...))
    launch_elements(map_elements_kernel<kWidth, F, Y, X...>, (n + kWidth - 1) / kWidth, n, f, y, x...);
  else
    launch_elements(map_elements_kernel<1, F, Y, X...>, n, n, f, y, x...);
}

template <class F, class Y>
void map_indices(Cuda, int64_t n, F f, Y* y) {
  launch_elements(map_indices_kernel<F, Y>, n, n, f, y);
}
#endif

}  // namespace weft
