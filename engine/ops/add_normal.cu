// y = x + std * random_normal(key, i); dx = dy.
#include "engine/cpu/parallel.h"
#include "engine/ops.h"
#if WEFT_CUDA
#include "engine/cuda/stream.h"
#endif

namespace weft {
namespace {

template <class T>
WEFT_HD T noisy(T x, acc_t<T> std, RngKey key, int64_t i) {
  return T(acc_t<T>(x) + std * acc_t<T>(random_normal(key, static_cast<uint64_t>(i))));
}

template <class T>
void forward(Cpu, const T* x, T* y, int64_t n, acc_t<T> std, RngKey key) {
  key = key.at_step();
  parallel_for(n, 1024, [=](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) y[i] = noisy(x[i], std, key, i);
  });
}

#if WEFT_CUDA
template <class T>
__global__ void add_normal_kernel(const T* x, T* y, int64_t n, float std, RngKey key) {
  if (const int64_t i = element_index(); i < n) y[i] = noisy(x[i], std, key.at_step(), i);
}
template <class T>
void forward(Cuda, const T* x, T* y, int64_t n, float std, RngKey key) {
  launch_elements(add_normal_kernel<T>, n, x, y, n, std, key);
}
#endif

}  // namespace

Tensor add_normal(const Tensor& x, double std, RngKey key) {
  Tensor y = Tensor::like(x);
  on_device(x.device(), [&](auto device) {
    dispatch(device, x.dtype(), [&]<class T>() {
      forward(device, x.data<T>(), y.data<T>(), x.numel(), static_cast<acc_t<T>>(std), key);
    });
  });
  return record("add_normal", y, {x}, [](const Tensor& dy) -> Gradients { return {dy}; });
}

}  // namespace weft
