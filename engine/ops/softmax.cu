// y = exp(x - max) / sum(exp(x - max)) of each row; dx = y (dy - sum(dy y)).
#include <algorithm>
#include <cmath>

#include "engine/cpu/parallel.h"
#include "engine/ops.h"
#if WEFT_CUDA
#include "engine/cuda/vector.h"
#endif

namespace weft {
namespace {

template <class T, class A = acc_t<T>>
void forward(Cpu, const T* x, T* y, int64_t rows, int64_t d) {
  parallel_for(rows, std::max<int64_t>(1, 1024 / (d + 1)), [=](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
      const T* xr = x + row * d;
      A largest = -INFINITY, total = 0;
      for (int64_t i = 0; i < d; ++i) largest = std::max(largest, A(xr[i]));
      for (int64_t i = 0; i < d; ++i) total += std::exp(A(xr[i]) - largest);
      for (int64_t i = 0; i < d; ++i) y[row * d + i] = T(std::exp(A(xr[i]) - largest) / total);
    }
  });
}
template <class T, class A = acc_t<T>>
void backward(Cpu, const T* y, const T* dy, T* dx, int64_t rows, int64_t d) {
  parallel_for(rows, std::max<int64_t>(1, 1024 / (d + 1)), [=](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
      const T *yr = y + row * d, *dyr = dy + row * d;
      A dot = 0;
      for (int64_t i = 0; i < d; ++i) dot += A(yr[i]) * A(dyr[i]);
      for (int64_t i = 0; i < d; ++i) dx[row * d + i] = T(A(yr[i]) * (A(dyr[i]) - dot));
    }
  });
}

#if WEFT_CUDA
// One block per row.
template <class T>
__global__ void softmax_forward(const T* x, T* y, int64_t d) {
  constexpr int kN = kPack<T>;
  x += blockIdx.x * d;
  y += blockIdx.x * d;
  const int64_t first = threadIdx.x * kN, step = blockDim.x * kN;
  float largest = -INFINITY;
  for (int64_t i = first; i < d; i += step) {
    const auto xs = load_pack<kN>(x + i, d - i);
#pragma unroll
    for (int j = 0; j < kN; ++j)
      if (i + j < d) largest = fmaxf(largest, xs.v[j]);
  }
  largest = block_max(largest);
  float total = 0;
  for (int64_t i = first; i < d; i += step) {
    const auto xs = load_pack<kN>(x + i, d - i);
#pragma unroll
    for (int j = 0; j < kN; ++j)
      if (i + j < d) total += __expf(float(xs.v[j]) - largest);
  }
  const float scale = 1 / block_sum(total);
  for (int64_t i = first; i < d; i += step) {
    auto xs = load_pack<kN>(x + i, d - i);
#pragma unroll
    for (int j = 0; j < kN; ++j) xs.v[j] = T(__expf(float(xs.v[j]) - largest) * scale);
    store_pack(y + i, xs, d - i);
  }
}
template <class T>
__global__ void softmax_backward(const T* y, const T* dy, T* dx, int64_t d) {
  constexpr int kN = kPack<T>;
  y += blockIdx.x * d;
  dy += blockIdx.x * d;
  dx += blockIdx.x * d;
  const int64_t first = threadIdx.x * kN, step = blockDim.x * kN;
  float dot = 0;
  for (int64_t i = first; i < d; i += step) {
    const auto ys = load_pack<kN>(y + i, d - i);
    const auto dys = load_pack<kN>(dy + i, d - i);
#pragma unroll
    for (int j = 0; j < kN; ++j) dot += float(ys.v[j]) * float(dys.v[j]);
  }
  dot = block_sum(dot);
  for (int64_t i = first; i < d; i += step) {
    auto ys = load_pack<kN>(y + i, d - i);
    const auto dys = load_pack<kN>(dy + i, d - i);
#pragma unroll
    for (int j = 0; j < kN; ++j) ys.v[j] = T(float(ys.v[j]) * (float(dys.v[j]) - dot));
    store_pack(dx + i, ys, d - i);
  }
}
template <class T>
void forward(Cuda, const T* x, T* y, int64_t rows, int64_t d) {
  launch_blocks(softmax_forward<T>, static_cast<unsigned>(rows), row_threads<T>(d, 512), 0, x, y, d);
}
template <class T>
void backward(Cuda, const T* y, const T* dy, T* dx, int64_t rows, int64_t d) {
  launch_blocks(softmax_backward<T>, static_cast<unsigned>(rows), row_threads<T>(d, 512), 0, y, dy, dx, d);
}
#endif

}  // namespace

Tensor softmax(const Tensor& x) {
  check(x.rank() >= 1 && x.size(-1) > 0, "softmax needs a last axis that is not empty, found {}", x.shape().str());
  const int64_t rows = x.shape().rows(), d = x.size(-1);
  Tensor y = Tensor::like(x);
  on_device(x.device(), [&](auto device) {
    dispatch(device, x.dtype(), [&]<class T>() { forward(device, x.data<T>(), y.data<T>(), rows, d); });
  });
  return record("softmax", y, {x}, [y, rows, d](const Tensor& dy) -> Gradients {
    Tensor dx = Tensor::like(y);
    on_device(y.device(), [&](auto device) {
      dispatch(device, y.dtype(),
               [&]<class T>() { backward(device, y.data<T>(), dy.data<T>(), dx.data<T>(), rows, d); });
    });
    return {dx};
  });
}

}  // namespace weft
