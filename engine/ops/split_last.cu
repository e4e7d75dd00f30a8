// A part of x is some neighbouring columns: as they are, or y = x r w with r = 1 / sqrt(mean(x^2) + eps)
// over the part. With dy w of the part as g: dx = r (g - x r^2 mean(g x)), dw = sum over rows of dy x r; dx has all
// parts side by side.
#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>

#include "engine/allocator.h"
#include "engine/cpu/parallel.h"
#include "engine/ops.h"
#if WEFT_CUDA
#include "engine/ops/column_totals.h"
#endif

namespace weft {
namespace {

constexpr int kMostParts = 4;

template <class T>
struct Part {
  int64_t start, width;
  double eps;
  const acc_t<T>* weight;  // [width]; null: as it is
  T* data;                 // y or dy: [rows, width]; null: zeros, of a gradient that did not come
};
template <class T>
struct Parts {
  int64_t rows, width;  // of x
  int count;
  acc_t<T>* r;  // [rows, count]
  std::array<Part<T>, kMostParts> part;
};

// Part i of a row.
template <class T>
WEFT_HD void norm_part(const Parts<T>& parts, const T* x, int64_t row, int i) {
  using A = acc_t<T>;
  const Part<T>& part = parts.part[i];
  const T* s = x + row * parts.width + part.start;
  T* y = part.data + row * part.width;
  A squares = 0, r = 1;
  if (part.weight) {
    for (int64_t c = 0; c < part.width; ++c) squares += A(s[c]) * A(s[c]);
    r = 1 / std::sqrt(squares / A(part.width) + A(part.eps));
    parts.r[row * parts.count + i] = r;
  }
  for (int64_t c = 0; c < part.width; ++c) y[c] = part.weight ? T(A(s[c]) * r * part.weight[c]) : s[c];
}
template <class T>
WEFT_HD void part_gradient(const Parts<T>& parts, const T* x, T* dx, int64_t row, int i) {
  using A = acc_t<T>;
  const Part<T>& part = parts.part[i];
  const T *s = x + row * parts.width + part.start, *dy = part.data + row * part.width;
  T* out = dx + row * parts.width + part.start;
  if (!part.data || !part.weight) {
    for (int64_t c = 0; c < part.width; ++c) out[c] = part.data ? dy[c] : T(0.0f);
    return;
  }
  const A r = parts.r[row * parts.count + i];
  A dot = 0;
  for (int64_t c = 0; c < part.width; ++c) dot += A(dy[c]) * part.weight[c] * A(s[c]);
  const A shrink = r * r * dot / A(part.width);
  for (int64_t c = 0; c < part.width; ++c) out[c] = T(r * (A(dy[c]) * part.weight[c] - A(s[c]) * shrink));
}
// The sum over rows that a column of x gives to its part's dw.
template <class T>
WEFT_HD acc_t<T> weight_gradient(const Parts<T>& parts, const T* x, int64_t column) {
  acc_t<T> sum = 0;
  for (int i = 0; i < parts.count; ++i) {
    const Part<T>& part = parts.part[i];
    if (const int64_t c = column - part.start; part.weight && part.data && c >= 0 && c < part.width)
      for (int64_t row = 0; row < parts.rows; ++row)
        sum += acc_t<T>(part.data[row * part.width + c]) * acc_t<T>(x[row * parts.width + column]) *
               parts.r[row * parts.count + i];
  }
  return sum;
}

template <class T>
void forward(Cpu, const Parts<T>& parts, const T* x) {
  parallel_for(parts.rows * parts.count, std::max<int64_t>(1, 4096 / (parts.width + 1)),
               [=](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) norm_part(parts, x, i / parts.count, static_cast<int>(i % parts.count));
  });
}
// x and dw [width of x] are null where no part has a weight.
template <class T>
void backward(Cpu, const Parts<T>& parts, const T* x, T* dx, acc_t<T>* dw) {
  parallel_for(parts.rows * parts.count, std::max<int64_t>(1, 4096 / (parts.width + 1)),
               [=](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) part_gradient(parts, x, dx, i / parts.count, static_cast<int>(i % parts.count));
  });
  if (dw)
    parallel_for(parts.width, 16, [=](int64_t from, int64_t to) {
      for (int64_t c = from; c < to; ++c) dw[c] = weight_gradient(parts, x, c);
    });
}

#if WEFT_CUDA
// Where all parts are whole packs of kN neighbours, a team of lanes holds a row of one part in registers, kPacks packs
// a lane; blockIdx.y is the part. [8192, 128 + 256 + 64] in bf16 on an H200, the first two normed: 6.3 us and 8.7 back,
// where a split and two norms took 9.7 and 18.3.
constexpr int kN = 8, kThreads = 256, kBlocks = 2;  // kBlocks: of a multiprocessor for each part, backward

template <class T>
__host__ __device__ int team_lanes(const Part<T>& part) {  // a power of two
  int lanes = 1;
  while (lanes < 32 && lanes * kN < part.width) lanes *= 2;
  return lanes;
}
__device__ float team_sum(float v, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

template <class T, int kPacks>
__global__ void __launch_bounds__(kThreads) split_forward(const __grid_constant__ Parts<T> parts, const T* x) {
  const Part<T>& part = parts.part[blockIdx.y];
  const int lanes = team_lanes(part), teams = kThreads / lanes, lane = threadIdx.x % lanes;
  const int64_t row = blockIdx.x * int64_t{teams} + threadIdx.x / lanes;
  Pack<T, kN> s[kPacks] = {};
  Pack<float, kN> w[kPacks];
#pragma unroll
  for (int p = 0; p < kPacks; ++p)
    if (const int column = (p * lanes + lane) * kN; row < parts.rows && column < part.width) {
      s[p] = load_whole_pack<kN>(x + row * parts.width + part.start + column);
      if (part.weight) w[p] = load_whole_pack<kN>(part.weight + column);
    }
  if (part.weight) {
    float squares = 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
#pragma unroll
      for (int j = 0; j < kN; ++j) squares += float(s[p].v[j]) * float(s[p].v[j]);
    const float r = rsqrtf(team_sum(squares, lanes) / static_cast<float>(part.width) + static_cast<float>(part.eps));
    if (row < parts.rows && lane == 0) parts.r[row * parts.count + blockIdx.y] = r;
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
#pragma unroll
      for (int j = 0; j < kN; ++j) s[p].v[j] = T(float(s[p].v[j]) * r * w[p].v[j]);
  }
#pragma unroll
  for (int p = 0; p < kPacks; ++p)
    if (const int column = (p * lanes + lane) * kN; row < parts.rows && column < part.width)
      store_whole_pack(part.data + row * part.width + column, s[p]);
}

// Each team takes every so-manieth row and keeps its columns' sums of dw; partial [blocks, width] gets a block's.
template <class T, int kPacks>
__global__ void __launch_bounds__(kThreads) split_backward(const __grid_constant__ Parts<T> parts,
                                                          const T* __restrict__ x, T* __restrict__ dx,
                                                          float* __restrict__ partial) {
  const Part<T>& part = parts.part[blockIdx.y];
  const int lanes = team_lanes(part), teams = kThreads / lanes, lane = threadIdx.x % lanes, team = threadIdx.x / lanes;
  float dw[kPacks][kN] = {};
  for (int64_t first = blockIdx.x * int64_t{teams}; first < parts.rows; first += int64_t{gridDim.x} * teams) {
    const int64_t row = first + team, at = row * parts.width + part.start;
    Pack<T, kN> s[kPacks] = {}, dy[kPacks] = {};
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
      if (const int column = (p * lanes + lane) * kN; row < parts.rows && column < part.width) {
        if (part.data) dy[p] = load_whole_pack<kN>(part.data + row * part.width + column);
        if (part.weight) s[p] = load_whole_pack<kN>(x + at + column);
      }
    if (part.weight) {
      const float r = row < parts.rows ? parts.r[row * parts.count + blockIdx.y] : 0.0f;
      Pack<float, kN> w[kPacks] = {};
      float dot = 0;
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        if (const int column = (p * lanes + lane) * kN; column < part.width)
          w[p] = load_whole_pack<kN>(part.weight + column);
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          const float product = float(dy[p].v[j]) * float(s[p].v[j]);
          dot += product * w[p].v[j];
          dw[p][j] += product * r;
        }
      }
      const float shrink = r * r * team_sum(dot, lanes) / static_cast<float>(part.width);
#pragma unroll
      for (int p = 0; p < kPacks; ++p)
#pragma unroll
        for (int j = 0; j < kN; ++j)
          dy[p].v[j] = T(r * (float(dy[p].v[j]) * w[p].v[j] - float(s[p].v[j]) * shrink));
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
      if (const int column = (p * lanes + lane) * kN; row < parts.rows && column < part.width)
        store_whole_pack(dx + at + column, dy[p]);
  }
  if (!partial) return;
  __shared__ float sums[kThreads][kN + 1];
  for (int p = 0; p < kPacks; ++p) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kN; ++j) sums[threadIdx.x][j] = dw[p][j];
    __syncthreads();
    const int i = threadIdx.x, column = p * lanes * kN + i;
    if (i >= lanes * kN || column >= part.width) continue;
    float total = 0;
    for (int t = 0; t < teams; ++t) total += sums[t * lanes + i / kN][i % kN];
    partial[blockIdx.x * parts.width + part.start + column] = total;
  }
}

// For parts that are no whole packs, or a row that is too wide.
template <class T>
__global__ void split_forward_parts(Parts<T> parts, const T* x) {
  if (const int64_t i = element_index(); i < parts.rows * parts.count)
    norm_part(parts, x, i / parts.count, static_cast<int>(i % parts.count));
}
template <class T>
__global__ void split_backward_parts(Parts<T> parts, const T* x, T* dx) {
  if (const int64_t i = element_index(); i < parts.rows * parts.count)
    part_gradient(parts, x, dx, i / parts.count, static_cast<int>(i % parts.count));
}
template <class T>
__global__ void split_backward_w(Parts<T> parts, const T* x, float* dw) {
  if (const int64_t i = element_index(); i < parts.width) dw[i] = weight_gradient(parts, x, i);
}

// Calls f.template operator()<kPacks>(rows a block takes at least) with packs that hold a row of every part; false
// where none do.
template <class T, class F>
bool with_packs(const Parts<T>& parts, std::initializer_list<const void*> pointers, F&& f) {
  int64_t bits = parts.width % kN * sizeof(T), widest = 0;
  int lanes = 1;
  for (const void* p : pointers) bits |= reinterpret_cast<intptr_t>(p);
  for (int i = 0; i < parts.count; ++i) {
    const Part<T>& part = parts.part[i];
    bits |= reinterpret_cast<intptr_t>(part.weight) | reinterpret_cast<intptr_t>(part.data) | part.width % kN;
    lanes = std::max(lanes, team_lanes(part)), widest = std::max(widest, part.width);
  }
  const int rows = kThreads / lanes;
  if (bits % 16 != 0 || widest > 4 * 32 * kN) return false;
  if (widest <= 32 * kN) f.template operator()<1>(rows);
  else if (widest <= 2 * 32 * kN) f.template operator()<2>(rows);
  else f.template operator()<4>(rows);
  return true;
}

template <class T>
void forward(Cuda, const Parts<T>& parts, const T* x) {
  const bool done = with_packs(parts, {x}, [&]<int kPacks>(int64_t rows) {
    launch_blocks(split_forward<T, kPacks>, dim3((parts.rows + rows - 1) / rows, parts.count), kThreads, 0, parts, x);
  });
  if (!done) launch_elements(split_forward_parts<T>, parts.rows * parts.count, parts, x);
}
template <class T>
void backward(Cuda, const Parts<T>& parts, const T* x, T* dx, float* dw) {
  const MemoryScope scope(Category::workspace);
  const bool done = with_packs(parts, {x, dx}, [&]<int kPacks>(int64_t rows) {
    const int64_t blocks = std::min<int64_t>((parts.rows + rows - 1) / rows, kBlocks * multiprocessors());
    Tensor partial;
    if (dw) partial = Tensor::empty(Shape{blocks, parts.width}, DType::f32, Device::cuda);
    launch_blocks(split_backward<T, kPacks>, dim3(blocks, parts.count), kThreads, 0, parts, x, dx,
                  partial.data<float>());
    if (dw) total_columns(partial, dw);
  });
  if (done) return;
  launch_elements(split_backward_parts<T>, parts.rows * parts.count, parts, x, dx);
  if (dw) launch_elements(split_backward_w<T>, parts.width, parts, x, dw);
}
#endif

// The op's tensors as the kernels take them.
struct Saved {
  int64_t rows, width;
  std::vector<SplitPart> parts;
  Tensor x, r;  // where a part has a weight

  template <class T>
  Parts<T> with(const std::vector<Tensor>& data) const {
    Parts<T> all{rows, width, static_cast<int>(parts.size()), r.data<acc_t<T>>(), {}};
    int64_t start = 0;
    for (size_t i = 0; i < parts.size(); ++i) {
      all.part[i] = {start, parts[i].width, parts[i].eps, parts[i].norm.data<acc_t<T>>(), data[i].data<T>()};
      start += parts[i].width;
    }
    return all;
  }
};

}  // namespace

std::vector<Tensor> split_last(const Tensor& x, const std::vector<SplitPart>& parts) {
  check(x.rank() >= 1 && !parts.empty() && parts.size() <= kMostParts,
        "split_last cuts the last axis into 1 to {} parts, found {} and {} parts", kMostParts, x.shape().str(),
        parts.size());
  const DType sums = x.dtype() == DType::f64 ? DType::f64 : DType::f32;
  Saved saved{x.shape().rows(), x.size(-1), parts, {}, {}};
  std::vector<Tensor> inputs{x}, ys;
  int64_t total = 0;
  bool normed = false;
  for (SplitPart& part : saved.parts) {
    const Tensor& w = part.norm;
    check(part.width > 0 && (!w || (w.shape() == Shape{part.width} && w.dtype() == sums && w.device() == x.device())),
          "a part of {} columns of {} on {} has a norm's weight {} {} on {}", part.width, x.shape().str(),
          name_of(x.device()), name_of(w.dtype()), w.shape().str(), name_of(w.device()));
    Shape shape = x.shape();
    shape.set(-1, part.width);
    ys.push_back(Tensor::like(x, shape));
    if (w) inputs.push_back(w);
    normed |= static_cast<bool>(w);
    part.norm = w.detached();
    total += part.width;
  }
  check(total == x.size(-1), "split_last's parts have {} columns together, x {}", total, x.shape().str());
  if (normed) {
    saved.x = x.detached();
    saved.r = Tensor::empty({saved.rows, static_cast<int64_t>(parts.size())}, sums, x.device());
  }
  on_device(x.device(), [&](auto device) {
    dispatch(device, x.dtype(), [&]<class T>() { forward(device, saved.with<T>(ys), x.data<T>()); });
  });
  return record_joint("split_last", ys, inputs,
                      [saved, sums, shape = x.shape(), dtype = x.dtype(),
                       where = x.device()](std::vector<Tensor> dys) -> Gradients {
    const Tensor dx = Tensor::empty(shape, dtype, where);
    const Tensor dw = saved.x ? Tensor::empty({saved.width}, sums, where) : Tensor{};
    on_device(where, [&](auto device) {
      dispatch(device, dtype, [&]<class T>() {
        backward(device, saved.with<T>(dys), saved.x.data<T>(), dx.data<T>(), dw.data<acc_t<T>>());
      });
    });
    Gradients gradients{dx};
    if (!dw) return gradients;
    std::vector<Shape> widths;
    for (const SplitPart& part : saved.parts) widths.push_back({part.width});
    const std::vector<Tensor> dws = dw.cut(widths);
    for (size_t i = 0; i < dws.size(); ++i)
      if (saved.parts[i].norm) gradients.push_back(dws[i]);
    return gradients;
  });
}

}  // namespace weft
