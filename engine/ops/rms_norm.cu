// y = s r w, r = 1 / sqrt(mean(s^2) + eps) of each row, where s = x, or residual + dropout(x), or the same of the sum
// of a token's expert rows. With g = dy w and ds of the residual stream: dresidual = ds + r (g - s r^2 mean(g s)),
// dx = dresidual where kept, over 1 - p, for each of the rows that were summed; dw = sum over rows of dy s r.
#include <algorithm>
#include <cmath>
#include <vector>

#include "engine/allocator.h"
#include "engine/cpu/parallel.h"
#include "engine/ops/masked.h"
#include "engine/ops/routing.h"
#if WEFT_CUDA
#include "engine/ops/column_totals.h"
#endif

namespace weft {
namespace {

// What comes before the norm.
struct Before {
  Mask mask;
  double p;                        // 0: nothing is dropped
  const int32_t* slots = nullptr;  // [rows, chosen]: the rows of x whose sum a row is; null: row n is row n
  int64_t chosen = 1;

  WEFT_HD int64_t row_of(int64_t row, int64_t k) const { return slots ? slots[row * chosen + k] : row; }
};
struct Size {
  int64_t rows, d;
};

// T: of x, W: of the weight, A: of the sums and of r. `sum` is null where s is x itself.
template <class T, class W, class A = acc_t<T>>
void forward(Cpu, const Before& before, const T* residual, const T* x, const W* w, T* sum, T* y, A* r, Size size,
             double eps) {
  const int64_t d = size.d;
  const A keep_scale = A(before.mask.scale());
  parallel_for(size.rows, std::max<int64_t>(1, 4096 / (d + 1)), [=](int64_t from, int64_t to) {
    MaskReader kept(before.mask);
    for (int64_t row = from; row < to; ++row) {
      A squares = 0;
      for (int64_t i = 0; sum && i < d; ++i) {
        A s = 0;
        for (int64_t k = 0; k < before.chosen; ++k) s += A(x[before.row_of(row, k) * d + i]);
        if (before.p > 0) s = kept(row * d + i) ? s * keep_scale : A(0);
        sum[row * d + i] = T(residual ? A(residual[row * d + i]) + s : s);
      }
      const T* s = (sum ? sum : x) + row * d;
      for (int64_t i = 0; i < d; ++i) squares += A(s[i]) * A(s[i]);
      const A rr = 1 / std::sqrt(squares / A(d) + A(eps));
      r[row] = rr;
      for (int64_t i = 0; i < d; ++i) y[row * d + i] = T(A(s[i]) * rr * A(w[i]));
    }
  });
}
// dsum may be null, and each of dresidual, dx and dw where it is not wanted; dresidual may be dsum.
template <class T, class W, class A = acc_t<T>>
void backward(Cpu, const Before& before, const T* s, const W* w, const A* r, const T* dsum, const T* dy, T* dresidual,
              T* dx, W* dw, Size size) {
  const int64_t d = size.d;
  if (dw)
    parallel_for(d, 64, [=](int64_t from, int64_t to) {
      std::vector<A> sums(static_cast<size_t>(to - from));
      for (int64_t row = 0; row < size.rows; ++row)
        for (int64_t i = from; i < to; ++i)
          sums[static_cast<size_t>(i - from)] += A(dy[row * d + i]) * A(s[row * d + i]) * r[row];
      for (int64_t i = from; i < to; ++i) dw[i] = W(sums[static_cast<size_t>(i - from)]);
    });
  if (!dresidual && !dx) return;
  const A keep_scale = A(before.mask.scale());
  parallel_for(size.rows, std::max<int64_t>(1, 4096 / (d + 1)), [=](int64_t from, int64_t to) {
    MaskReader kept(before.mask);
    for (int64_t row = from; row < to; ++row) {
      const T *sr = s + row * d, *dyr = dy + row * d;
      A dot = 0;
      for (int64_t i = 0; i < d; ++i) dot += A(dyr[i]) * A(w[i]) * A(sr[i]);
      const A rr = r[row], shrink = rr * rr * dot / A(d);
      for (int64_t i = 0; i < d; ++i) {
        A g = rr * (A(dyr[i]) * A(w[i]) - A(sr[i]) * shrink);
        if (dsum) g += A(dsum[row * d + i]);
        if (dresidual) dresidual[row * d + i] = T(g);
        if (dx && before.p > 0) g = kept(row * d + i) ? g * keep_scale : A(0);
        for (int64_t k = 0; dx && k < before.chosen; ++k) dx[before.row_of(row, k) * d + i] = T(g);
      }
    }
  });
}

#if WEFT_CUDA
// A row is held in registers by a team of kWarps warps, kPacks packs of kN neighbours a thread: read once, written
// once. add_rms_norm with dropout of [8192, 768] in bf16 on an H200, all from memory: 14.5 us, and 18.9 us back.
constexpr int kN = 8;

template <int kWarps>
constexpr int kThreads = kWarps == 1 ? 256 : kWarps * 32;
// Blocks of a multiprocessor that the registers must do for.
template <class T, bool kExact>
constexpr int kForwardBlocks = kExact && sizeof(T) == 2 ? 4 : 1;
template <class T, bool kExact>
constexpr int kBackwardBlocks = kExact && sizeof(T) == 2 ? 2 : 1;

template <int kWarps>
__device__ float team_sum(float v) {
  return kWarps == 1 ? warp_sum(v) : block_sum(v);
}

// A thread's packs of a row, of which `left` elements exist. kExact: all do, at addresses for 16 bytes; and as a row is
// read once, what is in the L2 stays there before it.
template <bool kExact, int kStep, class T, int kPacks>
__device__ void load_row(const T* from, int left, Pack<T, kN> (&to)[kPacks]) {
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    if constexpr (kExact) {
      uint4 raw[sizeof to[p] / 16];
#pragma unroll
      for (size_t i = 0; i < sizeof to[p] / 16; ++i)
        raw[i] = __ldcs(reinterpret_cast<const uint4*>(from + p * kStep) + i);
      memcpy(&to[p], raw, sizeof to[p]);
    } else {
      to[p] = load_pack<kN>(from + p * kStep, left - p * kStep);
    }
  }
}
// store_part of what is read again much later.
template <bool kExact, class T>
__device__ void store_part_for_later(T* to, const Pack<T, kN>& pack, int left) {
  if constexpr (!kExact) return store_pack(to, pack, left);
  uint4 raw[sizeof pack / 16];
  memcpy(raw, &pack, sizeof pack);
#pragma unroll
  for (size_t i = 0; i < sizeof pack / 16; ++i) __stcs(reinterpret_cast<uint4*>(to) + i, raw[i]);
}
template <bool kExact, class W>
__device__ void load_weights(const W* w, int left, float (&to)[kN]) {
  widen(load_part<kExact, kN>(w, left), to);
}

// Which of a pack's elements are kept; `at` is the first one's place.
struct KeptBits {
  uint32_t bits;
  __device__ bool operator[](int j) const { return bits >> j & 1; }
};
template <bool kExact>
__device__ auto draw(const Mask& mask, int64_t at) {
  if constexpr (kExact)
    return Kept8(mask, static_cast<uint64_t>(at) / 8);
  else
    return KeptBits{kept_bits(mask, at)};
}

// The rows of x that go into one row: lane k of a warp holds the k-th, read ahead of its use.
class RowsOf {
 public:
  __device__ RowsOf(const Before& before, int64_t row) : before_(before), row_(row) {
    if (const int lane = threadIdx.x % 32; before.slots && lane < before.chosen)
      held_ = before.slots[row * before.chosen + lane];
  }
  __device__ int64_t operator[](int64_t k) const {
    if (!before_.slots) return row_;
    return k < 32 ? __shfl_sync(~0u, held_, static_cast<int>(k)) : before_.row_of(row_, k);
  }

 private:
  const Before& before_;
  int64_t row_;
  int held_ = 0;
};

// kOfRows: x is the sum of several rows.
template <class T, class W, int kPacks, int kWarps, bool kExact, bool kOfRows>
__global__ void __launch_bounds__(kThreads<kWarps>, kForwardBlocks<T, kExact>)
    norm_forward(Before before, float keep_scale, const T* __restrict__ residual, const T* __restrict__ x,
                 const W* __restrict__ w, T* __restrict__ sum, T* __restrict__ y, float* r, Size size, float eps) {
  constexpr int kLanes = kWarps * 32, kStep = kLanes * kN;  // from a thread's pack to its next
  const int64_t d = kExact ? kPacks * kStep : size.d;
  const int64_t row = blockIdx.x * int64_t{kThreads<kWarps> / kLanes} + threadIdx.x / kLanes;
  if (row >= size.rows) return;
  const int lane = threadIdx.x % kLanes, column = lane * kN, left = static_cast<int>(d) - column;
  const int64_t at = row * d + column;
  Pack<T, kN> s[kPacks];
  float v[kPacks][kN];
  if (!kOfRows) load_row<kExact, kStep>(x + at, left, s);
  if (sum) {
    Pack<T, kN> old[kPacks], other[kPacks];
    const RowsOf rows(before, row);
    if (residual) load_row<kExact, kStep>(residual + at, left, old);
    if (kOfRows) load_row<kExact, kStep>(x + rows[0] * d + column, left, s);
    if (kOfRows && before.chosen > 1) load_row<kExact, kStep>(x + rows[1] * d + column, left, other);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) widen(s[p], v[p]);
    const auto add = [&](const Pack<T, kN>(&more)[kPacks]) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        float values[kN];
        widen(more[p], values);
#pragma unroll
        for (int j = 0; j < kN; ++j) v[p][j] += values[j];
      }
    };
    if (kOfRows && before.chosen > 1) add(other);
#pragma unroll 1
    for (int64_t k = 2; kOfRows && k < before.chosen; ++k) {
      load_row<kExact, kStep>(x + rows[k] * d + column, left, other);
      add(other);
    }
    if (before.p > 0) {
      before.mask.key = before.mask.key.at_step();
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const auto kept = draw<kExact>(before.mask, at + p * kStep);
#pragma unroll
        for (int j = 0; j < kN; ++j) v[p][j] = kept[j] ? v[p][j] * keep_scale : 0.0f;
      }
    }
    if (residual) add(old);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      s[p] = narrow<T>(v[p]);
      store_part_for_later<kExact>(sum + at + p * kStep, s[p], left - p * kStep);
    }
  }
  float squares = 0;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    widen(s[p], v[p]);
#pragma unroll
    for (int j = 0; j < kN; ++j) squares += v[p][j] * v[p][j];
  }
  const float rr = rsqrtf(team_sum<kWarps>(squares) * (1.0f / d) + eps);
  if (lane == 0) r[row] = rr;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    float ws[kN];
    load_weights<kExact>(w + column + p * kStep, left - p * kStep, ws);
#pragma unroll
    for (int j = 0; j < kN; ++j) v[p][j] = v[p][j] * rr * ws[j];
    store_part<kExact>(y + at + p * kStep, narrow<T>(v[p]), left - p * kStep);
  }
}

// Each team takes every so-manieth row and keeps its columns' sums of dw; partial [blocks, d] gets a block's.
template <class T, class W, int kPacks, int kWarps, bool kExact>
__global__ void __launch_bounds__(kThreads<kWarps>, kBackwardBlocks<T, kExact>)
    norm_backward(Before before, float keep_scale, const T* __restrict__ s, const W* __restrict__ w,
                  const float* __restrict__ r, const T* dsum, const T* __restrict__ dy, T* dresidual,
                  T* __restrict__ dx, float* __restrict__ partial, Size size) {
  constexpr int kLanes = kWarps * 32, kStep = kLanes * kN, kTeams = kThreads<kWarps> / kLanes;
  const int64_t d = kExact ? kPacks * kStep : size.d;
  const int lane = threadIdx.x % kLanes, column = lane * kN, left = static_cast<int>(d) - column;
  before.mask.key = before.mask.key.at_step();
  const bool drops = dx && before.p > 0;
  float dw[kPacks][kN] = {};
  for (int64_t row = blockIdx.x * int64_t{kTeams} + threadIdx.x / kLanes; row < size.rows;
       row += int64_t{gridDim.x} * kTeams) {
    const int64_t at = row * d + column;
    Pack<T, kN> ss[kPacks], dys[kPacks], dsums[kPacks] = {};
    load_row<kExact, kStep>(s + at, left, ss);
    load_row<kExact, kStep>(dy + at, left, dys);
    if (dsum) load_row<kExact, kStep>(dsum + at, left, dsums);
    const float rr = r[row];
    const RowsOf rows(before, row);
    decltype(draw<kExact>(before.mask, at)) kept[kPacks];
    if (drops) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) kept[p] = draw<kExact>(before.mask, at + p * kStep);  // while the row is loaded
    }
    float out[kPacks][kN], dot = 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      float ws[kN], sv[kN], dyv[kN];
      load_weights<kExact>(w + column + p * kStep, left - p * kStep, ws);
      widen(ss[p], sv);
      widen(dys[p], dyv);
      widen(dsums[p], out[p]);
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const float g = dyv[j] * rr, product = g * sv[j];
        dot += product * ws[j];
        dw[p][j] += product;
        out[p][j] += g * ws[j];
      }
    }
    const float shrink = rr * rr * team_sum<kWarps>(dot) * (1.0f / d);
    Pack<T, kN> dropped[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      float sv[kN];
      widen(ss[p], sv);
#pragma unroll
      for (int j = 0; j < kN; ++j) out[p][j] -= sv[j] * shrink;
      if (dresidual) store_part_for_later<kExact>(dresidual + at + p * kStep, narrow<T>(out[p]), left - p * kStep);
      if (drops) {
#pragma unroll
        for (int j = 0; j < kN; ++j) out[p][j] = kept[p][j] ? out[p][j] * keep_scale : 0.0f;
      }
      dropped[p] = narrow<T>(out[p]);
    }
#pragma unroll 1
    for (int64_t k = 0; dx && k < before.chosen; ++k) {
      T* to = dx + rows[k] * d + column;
#pragma unroll
      for (int p = 0; p < kPacks; ++p) store_part<kExact>(to + p * kStep, dropped[p], left - p * kStep);
    }
  }
  if (!partial) return;
  if constexpr (kTeams == 1) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
#pragma unroll
      for (int j = 0; j < kN; ++j)
        if (p * kStep + j < left) partial[blockIdx.x * d + column + p * kStep + j] = dw[p][j];
  } else {
    __shared__ float sums[kTeams][kPacks][kN][32 + 4];  // 4 more: neighbours, which are 8 rows apart, differ in bank
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
#pragma unroll
      for (int j = 0; j < kN; ++j) sums[threadIdx.x / 32][p][j][lane] = dw[p][j];
    __syncthreads();
    for (int c = threadIdx.x; c < d; c += kThreads<kWarps>) {
      float total = 0;
#pragma unroll
      for (int team = 0; team < kTeams; ++team) total += sums[team][c / kStep][c % kN][c % kStep / kN];
      partial[blockIdx.x * d + c] = total;
    }
  }
}

// Calls f.template operator()<kPacks, kWarps, kExact>() with the smallest team that holds a row.
template <class F>
void dispatch_width(int64_t d, const std::vector<const void*>& pointers, F&& f) {
  constexpr int64_t kMost = 32 * 32 * 4 * kN;
  check(d <= kMost, "on a GPU rms_norm takes rows of at most {}, found {}", kMost, d);
  const bool whole = std::all_of(pointers.begin(), pointers.end(),
                                 [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
  if (whole && d == 32 * kN) f.template operator()<1, 1, true>();
  else if (whole && d == 32 * 3 * kN) f.template operator()<3, 1, true>();
  else if (d <= 32 * 4 * kN) f.template operator()<4, 1, false>();
  else f.template operator()<4, 32, false>();
}

template <class T, class W>
void forward(Cuda, const Before& before, const T* residual, const T* x, const W* w, T* sum, T* y, float* r, Size size,
             double eps) {
  dispatch_width(size.d, {residual, x, w, sum, y}, [&]<int kPacks, int kWarps, bool kExact>() {
    constexpr int kTeams = kThreads<kWarps> / 32 / kWarps;
    const auto kernel = before.slots ? norm_forward<T, W, kPacks, kWarps, kExact, true>
                                     : norm_forward<T, W, kPacks, kWarps, kExact, false>;
    launch_blocks(kernel, static_cast<unsigned>((size.rows + kTeams - 1) / kTeams), kThreads<kWarps>, 0, before,
                  static_cast<float>(before.mask.scale()), residual, x, w, sum, y, r, size, static_cast<float>(eps));
  });
}
template <class T, class W>
void backward(Cuda, const Before& before, const T* s, const W* w, const float* r, const T* dsum, const T* dy,
              T* dresidual, T* dx, W* dw, Size size) {
  const MemoryScope scope(Category::workspace);
  dispatch_width(size.d, {s, w, dsum, dy, dresidual, dx}, [&]<int kPacks, int kWarps, bool kExact>() {
    constexpr int kTeams = kThreads<kWarps> / 32 / kWarps;
    const int64_t blocks = std::min<int64_t>((size.rows + kTeams - 1) / kTeams, 2 * multiprocessors());
    Tensor partial;
    if (dw) partial = Tensor::empty({blocks, size.d}, DType::f32, Device::cuda);
    launch_blocks(norm_backward<T, W, kPacks, kWarps, kExact>, static_cast<unsigned>(blocks), kThreads<kWarps>, 0,
                  before, static_cast<float>(before.mask.scale()), s, w, r, dsum, dy, dresidual, dx,
                  partial.data<float>(), size);
    if (dw) total_columns(partial, dw);
  });
}
#endif

// Calls f<T, W>() with the types of x and of the weight: W is T or float.
template <class F>
void dispatch_both(auto device, const Tensor& x, const Tensor& weight, F&& f) {
  dispatch(device, x.dtype(), [&]<class T>() {
    if (weight.dtype() == x.dtype())
      f.template operator()<T, T>();
    else
      f.template operator()<T, float>();
  });
}

void check_weight(const char* op, const Tensor& x, const Tensor& weight) {
  check(x.rank() >= 1 && weight.shape() == Shape{x.size(-1)}, "{} of {} needs a weight of its last axis, found {}", op,
        x.shape().str(), weight.shape().str());
  check(weight.device() == x.device() && (weight.dtype() == x.dtype() || weight.dtype() == DType::f32),
        "{} of {} on {} needs a weight of f32 or that dtype there, found {} on {}", op, name_of(x.dtype()),
        name_of(x.device()), name_of(weight.dtype()), name_of(weight.device()));
}

// What both ops keep for the gradient.
struct Saved {
  Before before;
  Tensor slots;  // holds what before.slots points to
  Tensor s, w, r;
  Size size;

  // Of x as `x_shape`, of the residual, and of the weight; each only where it is wanted.
  struct Wanted {
    bool residual, x, w;
  };
  // {dresidual, dx, dw}. Where nothing is dropped or summed the first serves as the second too.
  Gradients gradients(Tensor dsum, const Tensor& dy, const Shape& x_shape, Wanted wanted) const {
    const bool apart = before.p > 0 || before.slots;
    Tensor dresidual, dx, dw;
    if (wanted.residual || (wanted.x && !apart))
      dresidual = dsum && dsum.sole_owner() ? dsum : Tensor::like(s);
    if (wanted.x && apart) dx = Tensor::like(s, x_shape);
    if (wanted.w) dw = Tensor::like(w);
    on_device(s.device(), [&](auto device) {
      dispatch_both(device, s, w, [&]<class T, class W>() {
        backward(device, before, s.data<T>(), w.data<W>(), r.data<acc_t<T>>(), dsum.data<T>(), dy.data<T>(),
                 dresidual.data<T>(), dx.data<T>(), dw.data<W>(), size);
      });
    });
    if (wanted.x && !apart) dx = dresidual.view(x_shape);
    return {wanted.residual ? dresidual : Tensor{}, dx, dw};
  }
};

NormedSum add_rms_norm(const Tensor& residual, const Tensor& x, const Tensor& weight, double eps, double p, RngKey key,
                       const Tensor& slots, const Shape& shape) {
  check_weight("add_rms_norm", x, weight);
  check(p >= 0 && p < 1, "add_rms_norm's dropout must be in [0, 1), found {}", p);
  check(!residual || (residual.shape() == shape && residual.dtype() == x.dtype() && residual.device() == x.device()),
        "add_rms_norm of {} {} needs a residual like it, found {} {}", name_of(x.dtype()), shape.str(),
        name_of(residual.dtype()), residual.shape().str());
  Saved saved{{Mask(key, p), p, slots.data<int32_t>(), slots ? slots.size(1) : 1}, slots, Tensor::like(x, shape),
              weight.detached(), {}, {shape.rows(), shape[-1]}};
  saved.r = Tensor::empty({saved.size.rows}, x.dtype() == DType::f64 ? DType::f64 : DType::f32, x.device());
  Tensor y = Tensor::like(saved.s);
  on_device(x.device(), [&](auto device) {
    dispatch_both(device, x, weight, [&]<class T, class W>() {
      forward(device, saved.before, residual.data<T>(), x.data<T>(), weight.data<W>(), saved.s.data<T>(), y.data<T>(),
              saved.r.data<acc_t<T>>(), saved.size, eps);
    });
  });
  const Saved::Wanted wanted{residual.needs_grad(), x.needs_grad(), weight.needs_grad()};
  const std::vector<Tensor> ys = record_joint(
      "add_rms_norm", {saved.s, y}, {residual, x, weight},
      [saved, wanted, x_shape = x.shape()](std::vector<Tensor> dys) -> Gradients {
        if (!dys[1]) dys[1] = Tensor::zeros(saved.s.shape(), saved.s.dtype(), saved.s.device());
        return saved.gradients(std::move(dys[0]), dys[1], x_shape, wanted);
      });
  return {ys[0], ys[1]};
}

}  // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  check_weight("rms_norm", x, weight);
  Saved saved{{Mask({}, 0), 0}, {}, x.detached(), weight.detached(), {}, {x.shape().rows(), x.size(-1)}};
  saved.r = Tensor::empty({saved.size.rows}, x.dtype() == DType::f64 ? DType::f64 : DType::f32, x.device());
  Tensor y = Tensor::like(x);
  on_device(x.device(), [&](auto device) {
    dispatch_both(device, x, weight, [&]<class T, class W>() {
      forward(device, saved.before, static_cast<const T*>(nullptr), x.data<T>(), weight.data<W>(),
              static_cast<T*>(nullptr), y.data<T>(), saved.r.data<acc_t<T>>(), saved.size, eps);
    });
  });
  const Saved::Wanted wanted{false, x.needs_grad(), weight.needs_grad()};
  return record("rms_norm", y, {x, weight}, [saved, wanted](const Tensor& dy) -> Gradients {
    Gradients g = saved.gradients({}, dy, saved.s.shape(), wanted);
    return {g[1], g[2]};
  });
}

NormedSum add_rms_norm(const Tensor& residual, const Tensor& x, const Tensor& weight, double eps, double p,
                       RngKey key) {
  return add_rms_norm(residual, x, weight, eps, p, key, {}, x.shape());
}

NormedSum add_rms_norm(const Tensor& residual, const Tensor& rows, const Routing& r, const Tensor& weight, double eps,
                       double p, RngKey key) {
  const RoutingSize s = size_of_routing("add_rms_norm", rows, r);
  check(rows.rank() == 2 && rows.size(0) == s.tokens * s.chosen && residual && residual.shape().rows() == s.tokens &&
            residual.size(-1) == rows.size(1),
        "add_rms_norm needs {} rows and a residual of {} tokens, all of one width, found {} and {}",
        s.tokens * s.chosen, s.tokens, rows.shape().str(), residual.shape().str());
  return add_rms_norm(residual, rows, weight, eps, p, key, r.slots, residual.shape());
}

}  // namespace weft
