// y[n] = scale * table[ids[n]]; dtable[v] = scale * (sum of dy[n] over the n with ids[n] = v, in the order of n).
#include <algorithm>
#include <bit>
#include <vector>

#include "engine/allocator.h"
#include "engine/cpu/parallel.h"
#include "engine/ops.h"
#if WEFT_CUDA
#include <cub/device/device_radix_sort.cuh>

#include "engine/cuda/vector.h"
#endif

namespace weft {
namespace {

// T: of the table, Y: of y.
template <class T, class Y>
void forward(Cpu, const int32_t* ids, const T* table, Y* y, int64_t n, int64_t vocabulary, int64_t d, double scale) {
  using A = acc_t<T>;
  parallel_for(n, std::max<int64_t>(1, 4096 / (d + 1)), [=](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
      const int64_t id = ids[row];
      const bool known = id >= 0 && id < vocabulary;
      for (int64_t i = 0; i < d; ++i) y[row * d + i] = Y(known ? A(table[id * d + i]) * A(scale) : A(0));
    }
  });
}
template <class T, class Y>
void backward(Cpu, const int32_t* ids, const Y* dy, T* dtable, int64_t n, int64_t vocabulary, int64_t d,
              double scale) {
  using A = acc_t<T>;
  std::vector<int32_t> order;  // the rows of dy whose id is in the table, sorted by it
  for (int64_t row = 0; row < n; ++row)
    if (ids[row] >= 0 && ids[row] < vocabulary) order.push_back(static_cast<int32_t>(row));
  std::stable_sort(order.begin(), order.end(), [=](int32_t a, int32_t b) { return ids[a] < ids[b]; });
  parallel_for(vocabulary, std::max<int64_t>(1, 4096 / (d + 1)), [&](int64_t from, int64_t to) {
    std::vector<A> sums(static_cast<size_t>(d));
    auto next =
        std::lower_bound(order.begin(), order.end(), from, [=](int32_t row, int64_t v) { return ids[row] < v; });
    for (int64_t v = from; v < to; ++v) {
      std::fill(sums.begin(), sums.end(), A(0));
      for (; next != order.end() && ids[*next] == v; ++next)
        for (int64_t i = 0; i < d; ++i) sums[static_cast<size_t>(i)] += A(dy[*next * d + i]);
      for (int64_t i = 0; i < d; ++i) dtable[v * d + i] = T(sums[static_cast<size_t>(i)] * A(scale));
    }
  });
}

#if WEFT_CUDA
constexpr int kWarps = 8;

// One warp per row of y.
template <class T, class Y>
__global__ void embedding_forward(const int32_t* ids, const T* table, Y* y, int64_t n, int64_t vocabulary, int64_t d,
                                  float scale) {
  constexpr int kN = kPack<Y>;
  const int64_t row = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  if (row >= n) return;
  const int64_t id = ids[row];
  const bool known = id >= 0 && id < vocabulary;
  for (int64_t i = threadIdx.x % 32 * kN; i < d; i += 32 * kN) {
    Pack<T, kN> from{};
    if (known) from = load_pack<kN>(table + id * d + i, d - i);
    Pack<Y, kN> to;
#pragma unroll
    for (int j = 0; j < kN; ++j) to.v[j] = Y(known ? float(from.v[j]) * scale : 0.0f);
    store_pack(y + row * d + i, to, d - i);
  }
}

// Ids outside the table become `vocabulary`, so that they sort to the end.
__global__ void embedding_keys(const int32_t* ids, uint32_t* keys, int32_t* rows, int64_t n, uint32_t vocabulary) {
  if (const int64_t i = element_index(); i < n) {
    keys[i] = min(static_cast<uint32_t>(ids[i]), vocabulary);
    rows[i] = static_cast<int32_t>(i);
  }
}

// Where a run of equal keys starts, one warp sums the run's rows over the columns of its 32 packs. A frequent word's
// run is long: its rows are looked up 32 at once and loaded eight at once.
template <class T, class Y>
__global__ void embedding_backward(const uint32_t* keys, const int32_t* rows, const Y* dy, T* dtable, int64_t n,
                                   uint32_t vocabulary, int64_t d, float scale) {
  constexpr int kN = kPack<Y>;
  const int lane = threadIdx.x % 32;
  const int64_t start = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  const int64_t column = (blockIdx.y * int64_t{32} + lane) * kN;
  if (start >= n) return;
  const uint32_t key = keys[start];
  if (key >= vocabulary || (start > 0 && keys[start - 1] == key)) return;
  float sum[kN] = {};
  int found = 32;
  for (int64_t i = start; found == 32; i += 32) {
    const bool in_run = i + lane < n && keys[i + lane] == key;
    const int32_t row = in_run ? rows[i + lane] : 0;
    found = __popc(__ballot_sync(0xffffffffu, in_run));
    for (int from = 0; from < found; from += 8) {
      Pack<Y, kN> loaded[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const int64_t at = __shfl_sync(0xffffffffu, row, from + k) * d + column;
        loaded[k] = load_pack<kN>(dy + at, from + k < found ? d - column : 0);
      }
#pragma unroll
      for (int k = 0; k < 8; ++k)
#pragma unroll
        for (int j = 0; j < kN; ++j) sum[j] += float(loaded[k].v[j]);
    }
  }
  Pack<T, kN> total;
#pragma unroll
  for (int j = 0; j < kN; ++j) total.v[j] = T(sum[j] * scale);
  store_pack(dtable + key * d + column, total, d - column);
}

template <class T, class Y>
void forward(Cuda, const int32_t* ids, const T* table, Y* y, int64_t n, int64_t vocabulary, int64_t d, double scale) {
  launch_blocks(embedding_forward<T, Y>, static_cast<unsigned>((n + kWarps - 1) / kWarps), kWarps * 32, 0, ids, table,
                y, n, vocabulary, d, static_cast<float>(scale));
}
template <class T, class Y>
void backward(Cuda, const int32_t* ids, const Y* dy, T* dtable, int64_t n, int64_t vocabulary, int64_t d,
              double scale) {
  cuda_check(cudaMemsetAsync(dtable, 0, static_cast<size_t>(vocabulary * d) * sizeof(T), compute_stream()),
             "cudaMemsetAsync");
  if (n == 0) return;
  const MemoryScope scope(Category::workspace);
  const Tensor pairs = Tensor::empty({4, n}, DType::i32, Device::cuda);
  int32_t* const rows = pairs.data<int32_t>();
  int32_t* const sorted_rows = rows + n;
  uint32_t* const keys = reinterpret_cast<uint32_t*>(rows + 2 * n);
  uint32_t* const sorted_keys = keys + n;
  launch_elements(embedding_keys, n, ids, keys, rows, n, static_cast<uint32_t>(vocabulary));
  const int bits = static_cast<int>(std::bit_width(static_cast<uint32_t>(vocabulary)));
  size_t bytes = 0;
  const auto sort = [&](void* workspace) {
    cuda_check(cub::DeviceRadixSort::SortPairs(workspace, bytes, keys, sorted_keys, rows, sorted_rows,
                                               static_cast<int>(n), 0, bits, compute_stream()),
               "DeviceRadixSort::SortPairs");
  };
  sort(nullptr);
  const Tensor workspace = Tensor::empty({static_cast<int64_t>(bytes + 3) / 4}, DType::i32, Device::cuda);
  sort(workspace.raw());
  const int64_t columns = 32 * kPack<Y>;
  const dim3 blocks(static_cast<unsigned>((n + kWarps - 1) / kWarps),
                    static_cast<unsigned>((d + columns - 1) / columns));
  launch_blocks(embedding_backward<T, Y>, blocks, kWarps * 32, 0, sorted_keys, sorted_rows, dy, dtable, n,
                static_cast<uint32_t>(vocabulary), d, static_cast<float>(scale));
}
#endif

// Calls f<T, Y>() with the types of the table and of y.
template <class F>
void dispatch_both(auto device, DType table, DType y, F&& f) {
  dispatch(device, table, [&]<class T>() {
    dispatch(device, y, [&]<class Y>() { f.template operator()<T, Y>(); });
  });
}

}  // namespace

Tensor embedding(const Tensor& ids, const Tensor& table, double scale, DType dtype) {
  check(ids.dtype() == DType::i32 && ids.device() == table.device() && table.rank() == 2,
        "embedding needs i32 ids and a table [V, D] on one device, found ids {} of {} on {}, table {} on {}",
        ids.shape().str(), name_of(ids.dtype()), name_of(ids.device()), table.shape().str(), name_of(table.device()));
  const int64_t n = ids.numel(), vocabulary = table.size(0), d = table.size(1);
  check(n < INT32_MAX && vocabulary < INT32_MAX, "embedding of {} ids in a table of {} rows: both must be below 2^31",
        n, vocabulary);
  Shape shape = ids.shape();
  shape.push_back(d);
  Tensor y = Tensor::empty(shape, dtype, table.device());
  on_device(y.device(), [&](auto device) {
    dispatch_both(device, table.dtype(), dtype, [&]<class T, class Y>() {
      forward(device, ids.data<int32_t>(), table.data<T>(), y.data<Y>(), n, vocabulary, d, scale);
    });
  });
  return record("embedding", y, {table},
                [ids = ids.detached(), n, vocabulary, d, scale, type = table.dtype()](const Tensor& dy) -> Gradients {
                  Tensor dtable = Tensor::empty({vocabulary, d}, type, dy.device());
                  on_device(dy.device(), [&](auto device) {
                    dispatch_both(device, type, dy.dtype(), [&]<class T, class Y>() {
                      backward(device, ids.data<int32_t>(), dy.data<Y>(), dtable.data<T>(), n, vocabulary, d, scale);
                    });
                  });
                  return {dtable};
                });
}

}  // namespace weft
