// loss = mean over rows of (lse - x[target]), lse = log(sum(exp(x))) of a row; dx = dloss / rows * (exp(x - lse) - 1
// at the target). Only lse is saved besides the logits, and the gradient takes the logits' memory where nobody else
// holds it: at 8192 rows of 49152 words in bf16 that is 805 MB less at the step's peak.
#include <algorithm>
#include <cmath>

#include "engine/cpu/parallel.h"
#include "engine/ops.h"
#if WEFT_CUDA
#include "engine/cuda/vector.h"
#endif

namespace weft {
namespace {

// A: of the sums, of lse and of the loss. `losses` [rows] is scratch.
template <class T, class A = acc_t<T>>
void forward(Cpu, const T* x, const int32_t* targets, A* lse, A* losses, A* loss, int64_t rows, int64_t v) {
  for (int64_t row = 0; row < rows; ++row)
    check(targets[row] >= 0 && targets[row] < v, "cross_entropy: target {} of row {} is outside [0, {})", targets[row],
          row, v);
  parallel_for(rows, std::max<int64_t>(1, 1024 / v), [=](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
      const T* xr = x + row * v;
      A largest = -INFINITY, total = 0;
      for (int64_t i = 0; i < v; ++i) largest = std::max(largest, A(xr[i]));
      for (int64_t i = 0; i < v; ++i) total += std::exp(A(xr[i]) - largest);
      lse[row] = largest + std::log(total);
      losses[row] = lse[row] - A(xr[targets[row]]);
    }
  });
  double total = 0;
  for (int64_t row = 0; row < rows; ++row) total += losses[row];
  *loss = static_cast<A>(total / static_cast<double>(rows));
}
template <class T, class A = acc_t<T>>
void backward(Cpu, const T* x, const int32_t* targets, const A* lse, const A* dloss, T* dx, int64_t rows, int64_t v) {
  const A scale = *dloss / A(rows);
  parallel_for(rows, std::max<int64_t>(1, 1024 / v), [=](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row)
      for (int64_t i = 0; i < v; ++i)
        dx[row * v + i] = T(scale * (std::exp(A(x[row * v + i]) - lse[row]) - (i == targets[row] ? A(1) : A(0))));
  });
}

#if WEFT_CUDA
// One block per row, one read of it: each thread keeps the largest logit it met and the sum of exp relative to it.
// A target outside the vocabulary makes the row's lse, hence the loss and the row's gradient, nan.
template <class T>
__global__ void __launch_bounds__(512) cross_entropy_forward(const T* x, const int32_t* targets, float* lse,
                                                             float* losses, int64_t v) {
  constexpr int kN = kPack<T>;
  const int64_t row = blockIdx.x;
  x += row * v;
  float largest = -INFINITY, total = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x * kN; i < v; i += blockDim.x * kN) {
    const auto xs = load_pack<kN>(x + i, v - i);
    float values[kN], here = largest;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      values[j] = i + j < v ? float(xs.v[j]) : -INFINITY;
      here = fmaxf(here, values[j]);
    }
    const float base = here == -INFINITY ? 0.0f : here;  // nothing but -inf so far: -inf - -inf would be nan
    total *= __expf(largest - base);
#pragma unroll
    for (int j = 0; j < kN; ++j) total += __expf(values[j] - base);
    largest = here;
  }
  const float top = block_max(largest);
  total = block_sum(largest == -INFINITY ? 0.0f : total * __expf(largest - top));
  if (threadIdx.x == 0) {
    const int32_t target = targets[row];
    const bool known = target >= 0 && target < v;
    lse[row] = known ? top + logf(total) : NAN;
    losses[row] = known ? lse[row] - float(x[target]) : NAN;
  }
}
__global__ void cross_entropy_mean(const float* losses, float* loss, int64_t rows) {
  float total = 0;
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) total += losses[row];
  total = block_sum(total);
  if (threadIdx.x == 0) *loss = total / rows;
}
// dx may be x: each thread writes what it alone has read.
template <class T>
__global__ void __launch_bounds__(512) cross_entropy_backward(const T* x, const int32_t* targets, const float* lse,
                                                              const float* dloss, T* dx, int64_t rows, int64_t v) {
  constexpr int kN = kPack<T>;
  const int64_t row = blockIdx.x, target = targets[row];
  const float scale = *dloss / rows, row_lse = lse[row];
  x += row * v;
  dx += row * v;
  for (int64_t i = threadIdx.x * kN; i < v; i += blockDim.x * kN) {
    auto xs = load_pack<kN>(x + i, v - i);
#pragma unroll
    for (int j = 0; j < kN; ++j)
      xs.v[j] = T(scale * (__expf(float(xs.v[j]) - row_lse) - (i + j == target ? 1.0f : 0.0f)));
    store_pack(dx + i, xs, v - i);
  }
}
template <class T>
void forward(Cuda, const T* x, const int32_t* targets, float* lse, float* losses, float* loss, int64_t rows,
             int64_t v) {
  launch_blocks(cross_entropy_forward<T>, static_cast<unsigned>(rows), row_threads<T>(v, 512), 0, x, targets, lse,
                losses, v);
  launch_blocks(cross_entropy_mean, 1, 1024, 0, losses, loss, rows);
}
template <class T>
void backward(Cuda, const T* x, const int32_t* targets, const float* lse, const float* dloss, T* dx, int64_t rows,
              int64_t v) {
  launch_blocks(cross_entropy_backward<T>, static_cast<unsigned>(rows), row_threads<T>(v, 512), 0, x, targets, lse,
                dloss, dx, rows, v);
}
#endif

}  // namespace

Tensor cross_entropy(const Tensor& logits, const Tensor& targets) {
  check(logits.rank() >= 1 && logits.numel() > 0 && targets.dtype() == DType::i32 &&
            targets.device() == logits.device() && targets.numel() == logits.shape().rows(),
        "cross_entropy needs logits [.., V] and one i32 target per row on one device, found {} on {} and {} {} on {}",
        logits.shape().str(), name_of(logits.device()), name_of(targets.dtype()), targets.shape().str(),
        name_of(targets.device()));
  const int64_t rows = logits.shape().rows(), v = logits.size(-1);
  const DType sums = logits.dtype() == DType::f64 ? DType::f64 : DType::f32;
  Tensor lse = Tensor::empty({rows}, sums, logits.device()), losses = Tensor::like(lse);
  Tensor loss = Tensor::like(lse, {});
  on_device(logits.device(), [&](auto device) {
    dispatch(device, logits.dtype(), [&]<class T>() {
      using A = acc_t<T>;
      forward(device, logits.data<T>(), targets.data<int32_t>(), lse.data<A>(), losses.data<A>(), loss.data<A>(), rows,
              v);
    });
  });
  return record("cross_entropy", loss, {logits},
                [x = logits.detached(), targets = targets.detached(), lse, rows, v](const Tensor& dloss) -> Gradients {
                  Tensor dx = x.sole_owner() ? x : Tensor::like(x);
                  on_device(x.device(), [&](auto device) {
                    dispatch(device, x.dtype(), [&]<class T>() {
                      using A = acc_t<T>;
                      backward(device, x.data<T>(), targets.data<int32_t>(), lse.data<A>(), dloss.data<A>(),
                               dx.data<T>(), rows, v);
                    });
                  });
                  return {dx};
                });
}

}  // namespace weft
