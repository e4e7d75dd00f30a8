// y[n] = scale * table[ids[n]]; dtable[v] = scale * (sum of dy[n] over the n with ids[n] = v, in an order that only the
// ids decide). Where the table is a leaf that has a gradient already (the head tied to it came first), the rows that
// were looked up are added to that one, and no gradient of the table's size is made.
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
// G: of the gradient. add: to what it holds; else the rows of other words become 0.
template <class G, class Y>
void backward(Cpu, const int32_t* ids, const Y* dy, G* dtable, int64_t n, int64_t vocabulary, int64_t d, double scale,
              bool add) {
  using A = acc_t<G>;
  std::vector<int32_t> order;  // the rows of dy whose id is in the table, sorted by it
  for (int64_t row = 0; row < n; ++row)
    if (ids[row] >= 0 && ids[row] < vocabulary) order.push_back(static_cast<int32_t>(row));
  std::stable_sort(order.begin(), order.end(), [=](int32_t a, int32_t b) { return ids[a] < ids[b]; });
  if (!add) std::fill_n(dtable, vocabulary * d, G(A(0)));
  parallel_for(vocabulary, std::max<int64_t>(1, 4096 / (d + 1)), [&](int64_t from, int64_t to) {
    std::vector<A> sums(static_cast<size_t>(d));
    auto next =
        std::lower_bound(order.begin(), order.end(), from, [=](int32_t row, int64_t v) { return ids[row] < v; });
    while (next != order.end() && ids[*next] < to) {
      const int64_t v = ids[*next];
      std::fill(sums.begin(), sums.end(), A(0));
      for (; next != order.end() && ids[*next] == v; ++next)
        for (int64_t i = 0; i < d; ++i) sums[static_cast<size_t>(i)] += A(dy[*next * d + i]);
      for (int64_t i = 0; i < d; ++i)
        dtable[v * d + i] = G(A(dtable[v * d + i]) + sums[static_cast<size_t>(i)] * A(scale));
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

// A frequent word's run of equal keys is long, so no warp takes a whole one: each takes kRows keys in their order, sums
// what belongs together over the columns of its 32 packs, and adds the sums of runs that end where it does. Of a run
// that goes on into the next keys, or came from those before, it leaves the part's sum: embedding_joins adds those.
constexpr int kRows = 8;

template <class G, int kN>
__device__ inline void put(G* to, const float (&sum)[kN], float scale, bool add, int64_t left) {
  Pack<G, kN> total = load_pack<kN>(to, add ? left : 0);
#pragma unroll
  for (int j = 0; j < kN; ++j) total.v[j] = G(float(total.v[j]) + sum[j] * scale);
  store_pack(to, total, left);
}

// opened, closed [warps, d]: the parts of runs that go on, and that came.
template <class G, class Y>
__global__ void __launch_bounds__(kWarps * 32, 2)
embedding_backward(const uint32_t* keys, const int32_t* rows, const Y* dy, G* dtable, float* opened, float* closed,
                   int64_t n, uint32_t vocabulary, int64_t d, float scale, bool add) {
  constexpr int kN = kPack<Y>;
  const int lane = threadIdx.x % 32;
  const int64_t part = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32, start = part * kRows;
  const int64_t column = (blockIdx.y * int64_t{32} + lane) * kN, left = d - column;
  if (start >= n) return;
  // Lane i + 1 has the key and the row at start + i; lane 0 the key before, the lane after the last the key behind.
  const int64_t mine = start + lane - 1;
  const bool inside = lane <= kRows + 1 && mine >= 0 && mine < n;
  const uint32_t key = inside ? keys[mine] : vocabulary;
  const int32_t row = inside ? rows[mine] : 0;

  Pack<Y, kN> loaded[kRows];
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    const bool known = __shfl_sync(0xffffffffu, key, k + 1) < vocabulary;
    loaded[k] = load_pack<kN>(dy + __shfl_sync(0xffffffffu, row, k + 1) * d + column, known ? left : 0);
  }
  bool came = __shfl_sync(0xffffffffu, key, 0) == __shfl_sync(0xffffffffu, key, 1) && start > 0;
  float sum[kN] = {};
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    const uint32_t here = __shfl_sync(0xffffffffu, key, k + 1), next = __shfl_sync(0xffffffffu, key, k + 2);
    if (here >= vocabulary || left <= 0) continue;
#pragma unroll
    for (int j = 0; j < kN; ++j) sum[j] += float(loaded[k].v[j]);
    const bool ends = here != next;
    if (!ends && k < kRows - 1) continue;
    if (came) put(closed + part * d + column, sum, 1.0f, false, left);
    else if (!ends) put(opened + part * d + column, sum, 1.0f, false, left);
    else put(dtable + here * d + column, sum, scale, add, left);
    came = false;
#pragma unroll
    for (int j = 0; j < kN; ++j) sum[j] = 0;
  }
}

// The runs that begin in one warp's keys and go on: the parts' sums, in order.
template <class G>
__global__ void __launch_bounds__(kWarps * 32) embedding_joins(const uint32_t* keys, G* dtable, const float* opened,
                                                               const float* closed, int64_t n, uint32_t vocabulary,
                                                               int64_t d, float scale, bool add) {
  constexpr int kN = 4;
  const int64_t part = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32, last = part * kRows + kRows - 1;
  const int64_t column = (blockIdx.y * int64_t{32} + threadIdx.x % 32) * kN, left = d - column;
  if (last + 1 >= n) return;
  const uint32_t key = keys[last];
  const bool began_before = part > 0 && keys[part * kRows - 1] == key;
  if (key >= vocabulary || keys[last + 1] != key || began_before) return;
  float sum[kN];
  const Pack<float, kN> begun = load_pack<kN>(opened + part * d + column, left);
#pragma unroll
  for (int j = 0; j < kN; ++j) sum[j] = begun.v[j];
  // The parts that the run reaches: those whose first key is its own.
  const int lane = threadIdx.x % 32;
  int found = 32;
  for (int64_t from = part + 1; found == 32; from += 32) {
    const int64_t first = (from + lane) * kRows;
    found = __popc(__ballot_sync(0xffffffffu, first < n && keys[min(first, n - 1)] == key));
    for (int i = 0; i < found; i += 8) {
      Pack<float, kN> more[8];
#pragma unroll
      for (int k = 0; k < 8; ++k)
        more[k] = load_pack<kN>(closed + (from + i + k) * d + column, i + k < found ? left : 0);
#pragma unroll
      for (int k = 0; k < 8; ++k)
#pragma unroll
        for (int j = 0; j < kN; ++j) sum[j] += more[k].v[j];
    }
  }
  put(dtable + key * d + column, sum, scale, add, left);
}

template <class T, class Y>
void forward(Cuda, const int32_t* ids, const T* table, Y* y, int64_t n, int64_t vocabulary, int64_t d, double scale) {
  launch_blocks(embedding_forward<T, Y>, static_cast<unsigned>((n + kWarps - 1) / kWarps), kWarps * 32, 0, ids, table,
                y, n, vocabulary, d, static_cast<float>(scale));
}
template <class G, class Y>
void backward(Cuda, const int32_t* ids, const Y* dy, G* dtable, int64_t n, int64_t vocabulary, int64_t d, double scale,
              bool add) {
  if (!add)
    cuda_check(cudaMemsetAsync(dtable, 0, static_cast<size_t>(vocabulary * d) * sizeof(G), compute_stream()),
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
  const int64_t parts = (n + kRows - 1) / kRows;
  const Tensor sums = Tensor::empty({2, parts, d}, DType::f32, Device::cuda);
  float* const opened = sums.data<float>();
  float* const closed = opened + parts * d;
  const auto blocks = [&](int64_t columns) {
    return dim3(static_cast<unsigned>((parts + kWarps - 1) / kWarps),
                static_cast<unsigned>((d + columns - 1) / columns));
  };
  launch_blocks(embedding_backward<G, Y>, blocks(32 * kPack<Y>), kWarps * 32, 0, sorted_keys, sorted_rows, dy, dtable,
                opened, closed, n, static_cast<uint32_t>(vocabulary), d, static_cast<float>(scale), add);
  launch_blocks(embedding_joins<G>, blocks(32 * 4), kWarps * 32, 0, sorted_keys, dtable, opened, closed, n,
                static_cast<uint32_t>(vocabulary), d, static_cast<float>(scale), add);
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
                [ids = ids.detached(), node = table.node(), table_dtype = table.dtype(), n, vocabulary, d,
                 scale](const Tensor& dy) -> Gradients {
                  const bool add = node->leaf && node->grad;
                  const Tensor dtable = add ? node->grad : Tensor::empty({vocabulary, d}, table_dtype, dy.device());
                  on_device(dy.device(), [&](auto device) {
                    dispatch_both(device, dtable.dtype(), dy.dtype(), [&]<class G, class Y>() {
                      backward(device, ids.data<int32_t>(), dy.data<Y>(), dtable.data<G>(), n, vocabulary, d, scale,
                               add);
                    });
                  });
                  return {add ? Tensor{} : dtable};
                });
}

}  // namespace weft
