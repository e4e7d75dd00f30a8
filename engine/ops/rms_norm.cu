// y = x r w, r = 1 / sqrt(mean(x^2) + eps) of each row; with g = dy w:
// dx = r (g - x r^2 mean(g x)), dw = sum over rows of dy x r.
#include <algorithm>
#include <cmath>
#include <vector>

#include "engine/allocator.h"
#include "engine/cpu/parallel.h"
#include "engine/ops.h"
#if WEFT_CUDA
#include "engine/cuda/vector.h"
#endif

namespace weft {
namespace {

// T: of x, W: of the weight, A: of the sums and of r.
template <class T, class W, class A = acc_t<T>>
void forward(Cpu, const T* x, const W* w, T* y, A* r, int64_t rows, int64_t d, double eps) {
  parallel_for(rows, std::max<int64_t>(1, 4096 / (d + 1)), [=](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
      const T* xr = x + row * d;
      A squares = 0;
      for (int64_t i = 0; i < d; ++i) squares += A(xr[i]) * A(xr[i]);
      const A rr = 1 / std::sqrt(squares / A(d) + A(eps));
      r[row] = rr;
      for (int64_t i = 0; i < d; ++i) y[row * d + i] = T(A(xr[i]) * rr * A(w[i]));
    }
  });
}
template <class T, class W, class A = acc_t<T>>
void backward_x(Cpu, const T* x, const W* w, const A* r, const T* dy, T* dx, int64_t rows, int64_t d) {
  parallel_for(rows, std::max<int64_t>(1, 4096 / (d + 1)), [=](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
      const T *xr = x + row * d, *dyr = dy + row * d;
      A dot = 0;
      for (int64_t i = 0; i < d; ++i) dot += A(dyr[i]) * A(w[i]) * A(xr[i]);
      const A rr = r[row], shrink = rr * rr * dot / A(d);
      for (int64_t i = 0; i < d; ++i) dx[row * d + i] = T(rr * (A(dyr[i]) * A(w[i]) - A(xr[i]) * shrink));
    }
  });
}
template <class T, class W, class A = acc_t<T>>
void backward_w(Cpu, const T* x, const A* r, const T* dy, W* dw, int64_t rows, int64_t d) {
  parallel_for(d, 64, [=](int64_t from, int64_t to) {
    std::vector<A> sums(static_cast<size_t>(to - from));
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = from; i < to; ++i)
        sums[static_cast<size_t>(i - from)] += A(dy[row * d + i]) * A(x[row * d + i]) * r[row];
    for (int64_t i = from; i < to; ++i) dw[i] = W(sums[static_cast<size_t>(i - from)]);
  });
}

#if WEFT_CUDA
constexpr int kWarps = 8;  // rows of a block: one warp each

template <class T, class W>
__global__ void rms_norm_forward(const T* x, const W* w, T* y, float* r, int64_t rows, int64_t d, float eps) {
  constexpr int kN = kPack<T>;
  const int64_t row = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t first = threadIdx.x % 32 * kN;
  x += row * d;
  y += row * d;
  float squares = 0;
#pragma unroll 4
  for (int64_t i = first; i < d; i += 32 * kN) {
    const auto xs = load_pack<kN>(x + i, d - i);
#pragma unroll
    for (int j = 0; j < kN; ++j) squares += float(xs.v[j]) * float(xs.v[j]);
  }
  const float rr = rsqrtf(warp_sum(squares) / d + eps);
  if (threadIdx.x % 32 == 0) r[row] = rr;
#pragma unroll 4
  for (int64_t i = first; i < d; i += 32 * kN) {
    auto xs = load_pack<kN>(x + i, d - i);
    const auto ws = load_pack<kN>(w + i, d - i);
#pragma unroll
    for (int j = 0; j < kN; ++j) xs.v[j] = T(float(xs.v[j]) * rr * float(ws.v[j]));
    store_pack(y + i, xs, d - i);
  }
}
template <class T, class W>
__global__ void rms_norm_backward_x(const T* x, const W* w, const float* r, const T* dy, T* dx, int64_t rows,
                                    int64_t d) {
  constexpr int kN = kPack<T>;
  const int64_t row = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t first = threadIdx.x % 32 * kN;
  x += row * d;
  dy += row * d;
  dx += row * d;
  float dot = 0;
#pragma unroll 4
  for (int64_t i = first; i < d; i += 32 * kN) {
    const auto xs = load_pack<kN>(x + i, d - i);
    const auto dys = load_pack<kN>(dy + i, d - i);
    const auto ws = load_pack<kN>(w + i, d - i);
#pragma unroll
    for (int j = 0; j < kN; ++j) dot += float(dys.v[j]) * float(ws.v[j]) * float(xs.v[j]);
  }
  const float rr = r[row], shrink = rr * rr * warp_sum(dot) / d;
#pragma unroll 4
  for (int64_t i = first; i < d; i += 32 * kN) {
    auto xs = load_pack<kN>(x + i, d - i);
    const auto dys = load_pack<kN>(dy + i, d - i);
    const auto ws = load_pack<kN>(w + i, d - i);
#pragma unroll
    for (int j = 0; j < kN; ++j)
      xs.v[j] = T(rr * (float(dys.v[j]) * float(ws.v[j]) - float(xs.v[j]) * shrink));
    store_pack(dx + i, xs, d - i);
  }
}

// Block (c, s): the sums over strip s of rows of the columns of 32 packs; partial [strips, d].
template <class T>
__global__ void rms_norm_partial_w(const T* x, const float* r, const T* dy, float* partial, int64_t rows, int64_t d,
                                   int64_t strip) {
  constexpr int kN = kPack<T>;
  __shared__ float sums[kWarps][32][kN + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = (blockIdx.x * int64_t{32} + lane) * kN;
  const int64_t end = min(rows, (blockIdx.y + 1) * strip);
  float sum[kN] = {};
  if (column < d) {
#pragma unroll 4
    for (int64_t row = blockIdx.y * strip + warp; row < end; row += kWarps) {
      const auto xs = load_pack<kN>(x + row * d + column, d - column);
      const auto dys = load_pack<kN>(dy + row * d + column, d - column);
      const float rr = r[row];
#pragma unroll
      for (int j = 0; j < kN; ++j) sum[j] += float(dys.v[j]) * float(xs.v[j]) * rr;
    }
  }
#pragma unroll
  for (int j = 0; j < kN; ++j) sums[warp][lane][j] = sum[j];
  __syncthreads();
  for (int i = threadIdx.x; i < 32 * kN; i += kWarps * 32) {
    const int64_t c = blockIdx.x * int64_t{32} * kN + i;
    float total = 0;
    for (int k = 0; k < kWarps; ++k) total += sums[k][i / kN][i % kN];
    if (c < d) partial[blockIdx.y * d + c] = total;
  }
}
// One block sums 32 columns of the partial sums.
template <class W>
__global__ void rms_norm_total_w(const float* partial, W* dw, int64_t strips, int64_t d) {
  __shared__ float sums[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = blockIdx.x * int64_t{32} + lane;
  float sum = 0;
  if (column < d) {
#pragma unroll 4
    for (int64_t s = warp; s < strips; s += kWarps) sum += partial[s * d + column];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && column < d) {
    float total = 0;
    for (int k = 0; k < kWarps; ++k) total += sums[k][lane];
    dw[column] = W(total);
  }
}

unsigned row_blocks(int64_t rows) { return static_cast<unsigned>((rows + kWarps - 1) / kWarps); }

template <class T, class W>
void forward(Cuda, const T* x, const W* w, T* y, float* r, int64_t rows, int64_t d, double eps) {
  launch_blocks(rms_norm_forward<T, W>, row_blocks(rows), kWarps * 32, 0, x, w, y, r, rows, d, static_cast<float>(eps));
}
template <class T, class W>
void backward_x(Cuda, const T* x, const W* w, const float* r, const T* dy, T* dx, int64_t rows, int64_t d) {
  launch_blocks(rms_norm_backward_x<T, W>, row_blocks(rows), kWarps * 32, 0, x, w, r, dy, dx, rows, d);
}
template <class T, class W>
void backward_w(Cuda, const T* x, const float* r, const T* dy, W* dw, int64_t rows, int64_t d) {
  const int64_t columns = (d + 32 * kPack<T> - 1) / (32 * kPack<T>);
  const int64_t wanted = std::clamp<int64_t>(4 * multiprocessors() / std::max<int64_t>(1, columns), 1, 65535);
  const int64_t strip = std::max<int64_t>(kWarps, (rows + wanted - 1) / wanted);
  const int64_t strips = (rows + strip - 1) / strip;
  const MemoryScope scope(Category::workspace);
  const Tensor partial = Tensor::empty({strips, d}, DType::f32, Device::cuda);
  launch_blocks(rms_norm_partial_w<T>, dim3(static_cast<unsigned>(columns), static_cast<unsigned>(strips)),
                kWarps * 32, 0, x, r, dy, partial.data<float>(), rows, d, strip);
  launch_blocks(rms_norm_total_w<W>, static_cast<unsigned>((d + 31) / 32), kWarps * 32, 0, partial.data<float>(), dw,
                strips, d);
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

}  // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  check(x.rank() >= 1 && weight.shape() == Shape{x.size(-1)},
        "rms_norm of {} needs a weight of its last axis, found {}", x.shape().str(), weight.shape().str());
  check(weight.device() == x.device() && (weight.dtype() == x.dtype() || weight.dtype() == DType::f32),
        "rms_norm of {} on {} needs a weight of f32 or that dtype there, found {} on {}", name_of(x.dtype()),
        name_of(x.device()), name_of(weight.dtype()), name_of(weight.device()));
  const int64_t d = x.size(-1), rows = x.shape().rows();
  Tensor y = Tensor::like(x);
  Tensor r = Tensor::empty({rows}, x.dtype() == DType::f64 ? DType::f64 : DType::f32, x.device());
  on_device(x.device(), [&](auto device) {
    dispatch_both(device, x, weight, [&]<class T, class W>() {
      forward(device, x.data<T>(), weight.data<W>(), y.data<T>(), r.data<acc_t<T>>(), rows, d, eps);
    });
  });
  return record("rms_norm", y, {x, weight},
                [x = x.detached(), w = weight.detached(), r, rows, d, need_x = x.needs_grad(),
                 need_w = weight.needs_grad()](const Tensor& dy) -> Gradients {
                  Tensor dx, dw;
                  if (need_x) dx = Tensor::like(x);
                  if (need_w) dw = Tensor::like(w);
                  on_device(x.device(), [&](auto device) {
                    dispatch_both(device, x, w, [&]<class T, class W>() {
                      using A = acc_t<T>;
                      if (need_x)
                        backward_x(device, x.data<T>(), w.data<W>(), r.data<A>(), dy.data<T>(), dx.data<T>(), rows, d);
                      if (need_w) backward_w(device, x.data<T>(), r.data<A>(), dy.data<T>(), dw.data<W>(), rows, d);
                    });
                  });
                  return {dx, dw};
                });
}

}  // namespace weft
