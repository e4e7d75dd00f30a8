// y = factor * sum_i x[i]; dx[i] = factor * dy: sum has factor 1, mean 1/n.
// Both devices sum fixed ranges and then add the ranges' sums in order: the result does not depend on scheduling.
#include "engine/ops.h"
#include "engine/ops/elementwise.h"
#if WEFT_CUDA
#include "engine/cuda/block_sum.h"
#endif

namespace weft {
namespace {

constexpr int64_t kRange = 16384;  // elements summed by one block

int64_t ranges(int64_t n) { return (n + kRange - 1) / kRange; }

// y is f64 for f64, else f32; partial holds ranges(n) of the same.
template <class T>
void sum_all(Cpu, const T* x, int64_t n, acc_t<T> factor, acc_t<T>* partial, acc_t<T>* y) {
  parallel_for(ranges(n), 1, [=](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      double total = 0;
      for (int64_t i = r * kRange; i < std::min(n, (r + 1) * kRange); ++i) total += static_cast<acc_t<T>>(x[i]);
      partial[r] = static_cast<acc_t<T>>(total);
    }
  });
  double total = 0;
  for (int64_t r = 0; r < ranges(n); ++r) total += partial[r];
  *y = static_cast<acc_t<T>>(factor * total);
}

// dx[i] = factor * dy[0]
template <class A>
struct Spread {
  const A* dy;
  A factor;
  WEFT_HD A operator()(int64_t) const { return factor * *dy; }
};

#if WEFT_CUDA
template <class T>
__global__ void sum_ranges(const T* x, int64_t n, acc_t<T>* partial) {
  const int64_t from = blockIdx.x * kRange, to = min(n, from + kRange);
  acc_t<T> total = 0;
  for (int64_t i = from + threadIdx.x; i < to; i += 512) total += static_cast<acc_t<T>>(x[i]);
  total = block_sum<512>(total);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}
template <class A>
__global__ void sum_partials(const A* partial, int64_t n, A factor, A* y) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < n; i += 512) total += partial[i];
  total = block_sum<512>(total);
  if (threadIdx.x == 0) *y = static_cast<A>(factor * total);
}
template <class T>
void sum_all(Cuda, const T* x, int64_t n, acc_t<T> factor, acc_t<T>* partial, acc_t<T>* y) {
  launch_blocks(sum_ranges<T>, dim3(static_cast<unsigned>(ranges(n))), 512, 0, x, n, partial);
  launch_blocks(sum_partials<acc_t<T>>, dim3(1), 512, 0, static_cast<const acc_t<T>*>(partial), ranges(n), factor, y);
}
#endif

Tensor scaled_sum(const char* op, const Tensor& x, double factor) {
  const DType wide = x.dtype() == DType::f64 ? DType::f64 : DType::f32;
  Tensor y = Tensor::empty({}, wide, x.device()), partial = Tensor::empty({ranges(x.numel())}, wide, x.device());
  on_device(x.device(), [&](auto device) {
    dispatch(device, x.dtype(), [&]<class T>() {
      using A = acc_t<T>;
      sum_all(device, x.data<T>(), x.numel(), static_cast<A>(factor), partial.data<A>(), y.data<A>());
    });
  });
  return record(op, y, {x}, [factor, shape = x.shape(), dtype = x.dtype()](const Tensor& dy) -> Gradients {
    Tensor dx = Tensor::empty(shape, dtype, dy.device());
    on_device(dy.device(), [&](auto device) {
      dispatch(device, dtype, [&]<class T>() {
        using A = acc_t<T>;
        map_indices(device, dx.numel(), Spread<A>{dy.data<A>(), static_cast<A>(factor)}, dx.data<T>());
      });
    });
    return {dx};
  });
}

}  // namespace

Tensor sum(const Tensor& x) { return scaled_sum("sum", x, 1); }

Tensor mean(const Tensor& x) {
  check(x.numel() > 0, "the mean of no elements, shape {}", x.shape().str());
  return scaled_sum("mean", x, 1.0 / static_cast<double>(x.numel()));
}

}  // namespace weft
