// y = sum over tensors and elements of x^2, the square of the global norm that clips gradients.
// Fixed ranges of each tensor are summed apart, then their sums in order: the result does not depend on scheduling.
#include "engine/ops.h"
#include "engine/ops/elementwise.h"
#if WEFT_CUDA
#include "engine/cuda/block_sum.h"
#endif

namespace weft {
namespace {

constexpr int64_t kRange = 65536;  // elements summed by one block

int64_t ranges(int64_t n) { return (n + kRange - 1) / kRange; }

void sum_squares(Cpu, const std::vector<Tensor>& xs, int64_t, float* y) {
  double total = 0;
  for (const Tensor& x : xs) {
    std::vector<double> partial(static_cast<size_t>(ranges(x.numel())));
    dispatch(Cpu{}, x.dtype(), [&]<class T>() {
      parallel_for(ranges(x.numel()), 1, [&, values = x.data<T>(), n = x.numel()](int64_t from, int64_t to) {
        for (int64_t r = from; r < to; ++r)
          for (int64_t i = r * kRange; i < std::min(n, (r + 1) * kRange); ++i) {
            const double v = static_cast<acc_t<T>>(values[i]);
            partial[static_cast<size_t>(r)] += v * v;
          }
      });
    });
    for (const double p : partial) total += p;
  }
  *y = static_cast<float>(total);
}

#if WEFT_CUDA
constexpr int kTensors = 128;  // per launch: their table must fit a kernel's 4 KiB of arguments

struct Table {
  const void* data[kTensors];
  int64_t n[kTensors];
  int first_block[kTensors + 1];
  bool is_bf16[kTensors];
  int tensors = 0;
};

template <class T>
__device__ float square_range(const T* x, int64_t n) {
  float total = 0;
  constexpr int kWidth = 16 / sizeof(T);
  if (n == kRange && reinterpret_cast<uintptr_t>(x) % 16 == 0) {
    const auto* packs = reinterpret_cast<const Pack<T, kWidth>*>(x);
    for (int i = threadIdx.x; i < kRange / kWidth; i += 512) {
      const Pack<T, kWidth> pack = packs[i];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) total += static_cast<float>(pack.v[j]) * static_cast<float>(pack.v[j]);
    }
  } else {
    for (int64_t i = threadIdx.x; i < n; i += 512) total += static_cast<float>(x[i]) * static_cast<float>(x[i]);
  }
  return total;
}
__global__ void square_ranges(const __grid_constant__ Table table, float* partial) {
  int low = 0, high = table.tensors - 1;  // the last tensor whose first block is not after this one
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.first_block[middle] <= static_cast<int>(blockIdx.x)) low = middle;
    else high = middle - 1;
  }
  const int64_t from = (static_cast<int>(blockIdx.x) - table.first_block[low]) * kRange;
  const int64_t n = min(kRange, table.n[low] - from);
  float total = table.is_bf16[low] ? square_range(static_cast<const bf16*>(table.data[low]) + from, n)
                                   : square_range(static_cast<const float*>(table.data[low]) + from, n);
  total = block_sum<512>(total);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}
__global__ void add_ranges(const float* partial, int64_t n, float* y) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < n; i += 512) total += partial[i];
  total = block_sum<512>(total);
  if (threadIdx.x == 0) *y = static_cast<float>(total);
}

void sum_squares(Cuda, const std::vector<Tensor>& xs, int64_t blocks, float* y) {
  const Tensor partial = Tensor::empty({blocks}, DType::f32, Device::cuda);
  int64_t done = 0;
  Table table;
  const auto flush = [&] {
    if (table.tensors == 0) return;
    const int here = table.first_block[table.tensors];
    launch_blocks(square_ranges, dim3(static_cast<unsigned>(here)), 512, 0, table, partial.data<float>() + done);
    done += here;
    table.tensors = 0;
  };
  for (const Tensor& x : xs) {
    check(x.dtype() == DType::f32 || x.dtype() == DType::bf16, "squared_norm on a GPU needs f32 or bf16, found {}",
          name_of(x.dtype()));
    if (x.numel() == 0) continue;
    const int i = table.tensors++;
    if (i == 0) table.first_block[0] = 0;
    table.data[i] = x.raw();
    table.n[i] = x.numel();
    table.is_bf16[i] = x.dtype() == DType::bf16;
    table.first_block[i + 1] = table.first_block[i] + static_cast<int>(ranges(x.numel()));
    if (table.tensors == kTensors) flush();
  }
  flush();
  launch_blocks(add_ranges, dim3(1), 512, 0, static_cast<const float*>(partial.data<float>()), done, y);
}
#endif

}  // namespace

Tensor squared_norm(const std::vector<Tensor>& xs) {
  check(!xs.empty(), "squared_norm needs a tensor");
  int64_t blocks = 0;
  for (const Tensor& x : xs) {
    check(x.device() == xs[0].device(), "squared_norm needs tensors of one device");
    blocks += ranges(x.numel());
  }
  Tensor y = Tensor::empty({}, DType::f32, xs[0].device());
  on_device(xs[0].device(), [&](auto device) { sum_squares(device, xs, blocks, y.data<float>()); });
  queued("squared_norm");
  return y;
}

}  // namespace weft
