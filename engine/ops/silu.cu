// y = x s, s = 1 / (1 + exp(-x)); dx = dy s (1 + x (1 - s)).
#include <cmath>

#include "engine/cpu/parallel.h"
#include "engine/ops.h"
#if WEFT_CUDA
#include "engine/cuda/stream.h"
#endif

namespace weft {
namespace {

template <class T>
WEFT_HD acc_t<T> silu_value(T x) {
  const acc_t<T> v = x;
  return v / (1 + exp(-v));
}
template <class T>
WEFT_HD acc_t<T> silu_gradient(T x, T dy) {
  const acc_t<T> v = x, s = 1 / (1 + exp(-v));
  return acc_t<T>(dy) * s * (1 + v * (1 - s));
}

template <class T>
void forward(Cpu, const T* x, T* y, int64_t n) {
  parallel_for(n, 4096, [=](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) y[i] = T(silu_value(x[i]));
  });
}
template <class T>
void backward(Cpu, const T* x, const T* dy, T* dx, int64_t n) {
  parallel_for(n, 4096, [=](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) dx[i] = T(silu_gradient(x[i], dy[i]));
  });
}

#if WEFT_CUDA
template <class T>
__global__ void silu_forward(const T* x, T* y, int64_t n) {
  if (const int64_t i = element_index(); i < n) y[i] = T(silu_value(x[i]));
}
template <class T>
__global__ void silu_backward(const T* x, const T* dy, T* dx, int64_t n) {
  if (const int64_t i = element_index(); i < n) dx[i] = T(silu_gradient(x[i], dy[i]));
}
template <class T>
void forward(Cuda, const T* x, T* y, int64_t n) {
  launch_elements(silu_forward<T>, n, x, y, n);
}
template <class T>
void backward(Cuda, const T* x, const T* dy, T* dx, int64_t n) {
  launch_elements(silu_backward<T>, n, x, dy, dx, n);
}
#endif

}  // namespace

Tensor silu(const Tensor& x) {
  Tensor y = Tensor::like(x);
  on_device(x.device(), [&](auto device) {
    dispatch(device, x.dtype(), [&]<class T>() { forward(device, x.data<T>(), y.data<T>(), x.numel()); });
  });
  return record("silu", y, {x}, [x = x.detached()](const Tensor& dy) -> Gradients {
    Tensor dx = Tensor::like(x);
    on_device(x.device(), [&](auto device) {
      dispatch(device, x.dtype(), [&]<class T>() { backward(device, x.data<T>(), dy.data<T>(), dx.data<T>(), x.numel()); });
    });
    return {dx};
  });
}

}  // namespace weft
