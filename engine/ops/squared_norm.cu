// y = sum over tensors and elements of x^2, the square of the global norm that clips gradients.
// Fixed ranges of each tensor are summed apart, then their sums in order: the result does not depend on scheduling.
#include "engine/ops/squared_norm.h"

#include "engine/ops.h"
#include "engine/ops/elementwise.h"
#if WEFT_CUDA
#include "engine/cuda/block_sum.h"
#endif

namespace weft {
namespace {

constexpr int64_t kRange = 65536;  // elements summed by one block

WEFT_HD inline float add_share(const float* squares, int64_t n, int64_t range, int64_t ranges) {
  float total = 0;
  for (int64_t i = range * n / ranges; i < (range + 1) * n / ranges; ++i) total += squares[i];
  return total;
}

void sum_ranges(Cpu, const std::vector<Tensor>& xs, float* sums) {
  for (const Tensor& x : xs) {
    const int64_t count = square_range_count(x.numel());
    if (const Tensor* parts = x.squares()) {
      for (int64_t r = 0; r < count; ++r) sums[r] = add_share(parts->data<float>(), parts->numel(), r, count);
      sums += count;
      continue;
    }
    dispatch(Cpu{}, x.dtype(), [&]<class T>() {
      parallel_for(count, 1, [sums, values = x.data<T>(), n = x.numel()](int64_t from, int64_t to) {
        for (int64_t r = from; r < to; ++r) {
          double total = 0;
          for (int64_t i = r * kRange; i < std::min(n, (r + 1) * kRange); ++i) {
            const double v = static_cast<acc_t<T>>(values[i]);
            total += v * v;
          }
          sums[r] = static_cast<float>(total);
        }
      });
    });
    sums += count;
  }
}
void add_ranges(Cpu, const float* sums, int64_t n, float* y) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += sums[i];
  *y = static_cast<float>(total);
}

#if WEFT_CUDA
constexpr int kTensors = 512;  // per launch: their table must fit a kernel's 32 KB of arguments
constexpr int kThreads = 512;

enum class Values : uint8_t { f32, bf16, squares };  // squares: all of a tensor in one block

struct Table {
  const void* data[kTensors];
  int64_t n[kTensors];
  int first_block[kTensors + 1], first_range[kTensors + 1];
  Values values[kTensors];
  int tensors = 0;
};

template <class T>
__device__ float square_range(const T* x, int64_t n) {
  float total = 0;
  const auto take = [&](T v) { total += static_cast<float>(v) * static_cast<float>(v); };
  constexpr int kWidth = 16 / sizeof(T);
  const auto take_pack = [&](int i) {
    const Pack<T, kWidth> pack = reinterpret_cast<const Pack<T, kWidth>*>(x)[i];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) take(pack.v[j]);
  };
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0;
  if (n == kRange && aligned) {
#pragma unroll 8
    for (int i = threadIdx.x; i < kRange / kWidth; i += kThreads) take_pack(i);
  } else {
    const int packs = aligned ? static_cast<int>(n) / kWidth : 0;
    for (int i = threadIdx.x; i < packs; i += kThreads) take_pack(i);
    for (int i = packs * kWidth + threadIdx.x; i < n; i += kThreads) take(x[i]);
  }
  return total;
}
__global__ void sum_square_ranges(const __grid_constant__ Table table, float* sums) {
  int low = 0, high = table.tensors - 1;  // the last tensor whose first block is not after this one
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.first_block[middle] <= static_cast<int>(blockIdx.x)) low = middle;
    else high = middle - 1;
  }
  sums += table.first_range[low];
  if (table.values[low] == Values::squares) {
    const int ranges = table.first_range[low + 1] - table.first_range[low];
    for (int r = threadIdx.x; r < ranges; r += kThreads)
      sums[r] = add_share(static_cast<const float*>(table.data[low]), table.n[low], r, ranges);
    return;
  }
  const int range = static_cast<int>(blockIdx.x) - table.first_block[low];
  const int64_t from = range * kRange, n = min(kRange, table.n[low] - from);
  float total = table.values[low] == Values::bf16 ? square_range(static_cast<const bf16*>(table.data[low]) + from, n)
                                                  : square_range(static_cast<const float*>(table.data[low]) + from, n);
  total = block_sum<kThreads>(total);
  if (threadIdx.x == 0) sums[range] = total;
}
__global__ void add_square_ranges(const float* sums, int64_t n, float* y) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) total += sums[i];
  total = block_sum<kThreads>(total);
  if (threadIdx.x == 0) *y = static_cast<float>(total);
}

void sum_ranges(Cuda, const std::vector<Tensor>& xs, float* sums) {
  int64_t done = 0;
  Table table;
  const auto flush = [&] {
    if (table.tensors == 0) return;
    launch_blocks(sum_square_ranges, dim3(static_cast<unsigned>(table.first_block[table.tensors])), kThreads, 0, table,
                  sums + done);
    done += table.first_range[table.tensors];
    table.tensors = 0;
  };
  for (const Tensor& x : xs) {
    check(x.dtype() == DType::f32 || x.dtype() == DType::bf16, "squared_norm on a GPU needs f32 or bf16, found {}",
          name_of(x.dtype()));
    if (x.numel() == 0) continue;
    const int i = table.tensors++;
    if (i == 0) table.first_block[0] = table.first_range[0] = 0;
    const Tensor* const squares = x.squares();
    const int ranges = static_cast<int>(square_range_count(x.numel()));
    table.data[i] = squares ? squares->raw() : x.raw();
    table.n[i] = squares ? squares->numel() : x.numel();
    table.values[i] = squares ? Values::squares : x.dtype() == DType::bf16 ? Values::bf16 : Values::f32;
    table.first_block[i + 1] = table.first_block[i] + (squares ? 1 : ranges);
    table.first_range[i + 1] = table.first_range[i] + ranges;
    if (table.tensors == kTensors) flush();
  }
  flush();
}
void add_ranges(Cuda, const float* sums, int64_t n, float* y) {
  launch_blocks(add_square_ranges, dim3(1), kThreads, 0, sums, n, y);
}
#endif

}  // namespace

int64_t square_range_count(int64_t elements) { return (elements + kRange - 1) / kRange; }

Tensor square_ranges(const std::vector<Tensor>& xs) {
  check(!xs.empty(), "squared_norm needs a tensor");
  int64_t count = 0;
  for (const Tensor& x : xs) {
    check(x.device() == xs[0].device(), "squared_norm needs tensors of one device");
    count += square_range_count(x.numel());
  }
  Tensor sums = Tensor::empty({count}, DType::f32, xs[0].device());
  on_device(sums.device(), [&](auto device) { sum_ranges(device, xs, sums.data<float>()); });
  return sums;
}

Tensor squared_norm(const std::vector<Tensor>& xs) {
  const Tensor sums = square_ranges(xs);
  Tensor y = Tensor::empty({}, DType::f32, sums.device());
  on_device(y.device(), [&](auto device) { add_ranges(device, sums.data<float>(), sums.numel(), y.data<float>()); });
  queued("squared_norm");
  return y;
}

}  // namespace weft
