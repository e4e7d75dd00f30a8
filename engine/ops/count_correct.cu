// How many rows x have x[i] < x[target] for i < target and x[i] <= x[target] for i > target. A row with a nan or with a
// target outside it is not correct.
#include <algorithm>
#include <atomic>

#include "engine/cpu/parallel.h"
#include "engine/ops.h"
#if WEFT_CUDA
#include "engine/cuda/vector.h"
#endif

namespace weft {
namespace {

template <class A>
WEFT_HD bool beaten(A x, A at_target, int64_t i, int64_t target) {
  return i < target ? x < at_target : x <= at_target;
}

template <class T, class A = acc_t<T>>
void run(Cpu, const T* x, const int32_t* targets, int32_t* correct, int64_t rows, int64_t v) {
  std::atomic<int32_t> count{0};
  parallel_for(rows, std::max<int64_t>(1, 4096 / (v + 1)), [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
      const T* xr = x + row * v;
      const int64_t target = targets[row];
      bool all = target >= 0 && target < v;
      for (int64_t i = 0; all && i < v; ++i) all = beaten(A(xr[i]), A(xr[target]), i, target);
      if (all) ++count;
    }
  });
  *correct = count;
}

#if WEFT_CUDA
template <class T>
__global__ void __launch_bounds__(512) count_correct_kernel(const T* x, const int32_t* targets, int32_t* correct,
                                                            int64_t v) {
  constexpr int kN = kPack<T>;
  x += blockIdx.x * v;
  const int64_t target = targets[blockIdx.x];
  if (target < 0 || target >= v) return;
  const float at_target = x[target];
  bool all = true;
#pragma unroll 4
  for (int64_t i = threadIdx.x * kN; i < v; i += blockDim.x * kN) {
    const auto xs = load_pack<kN>(x + i, v - i);
#pragma unroll
    for (int j = 0; j < kN; ++j) all &= i + j >= v || beaten(float(xs.v[j]), at_target, i + j, target);
  }
  if (__syncthreads_and(all) && threadIdx.x == 0) atomicAdd(correct, 1);
}
template <class T>
void run(Cuda, const T* x, const int32_t* targets, int32_t* correct, int64_t rows, int64_t v) {
  cuda_check(cudaMemsetAsync(correct, 0, sizeof *correct, compute_stream()), "cudaMemsetAsync");
  launch_blocks(count_correct_kernel<T>, static_cast<unsigned>(rows), row_threads<T>(v, 512), 0, x, targets, correct,
                v);
}
#endif

}  // namespace

Tensor count_correct(const Tensor& logits, const Tensor& targets) {
  check(logits.rank() >= 1 && targets.dtype() == DType::i32 && targets.device() == logits.device() &&
            targets.numel() == logits.shape().rows(),
        "count_correct needs logits [.., V] and one i32 target per row on one device, found {} on {} and {} {} on {}",
        logits.shape().str(), name_of(logits.device()), name_of(targets.dtype()), targets.shape().str(),
        name_of(targets.device()));
  Tensor correct = Tensor::empty({}, DType::i32, logits.device());
  on_device(logits.device(), [&](auto device) {
    dispatch(device, logits.dtype(), [&]<class T>() {
      run(device, logits.data<T>(), targets.data<int32_t>(), correct.data<int32_t>(), logits.shape().rows(),
          logits.size(-1));
    });
  });
  return correct;
}

}  // namespace weft
