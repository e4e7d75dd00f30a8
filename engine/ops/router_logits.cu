// logits = x W^T + noise with sums in f32 (f64 for f64) and no copy of x in f32; dx = dlogits W, dW = dlogits^T x. A
// product with a handful of columns is bound by reading x, where a GEMM leaves its tiles empty: cuBLAS took 0.29 ms for
// the dW of 8 experts of width 768 over 8192 rows.
#include <algorithm>
#include <vector>

#include "engine/allocator.h"
#include "engine/cpu/parallel.h"
#include "engine/ops.h"
#if WEFT_CUDA
#include "engine/cuda/vector.h"
#endif

namespace weft {
namespace {

struct Sizes {
  int64_t rows, width, experts;
};
struct Noise {
  double std;  // 0: none
  RngKey key;

  template <class A>
  WEFT_HD A add_to(A logit, int64_t i) const {
    return std > 0 ? logit + A(std) * A(random_normal(key, static_cast<uint64_t>(i))) : logit;
  }
};

template <class T, class A = acc_t<T>>
void forward(Cpu, const T* x, const A* w, A* logits, Noise noise, Sizes s) {
  noise.key = noise.key.at_step();
  parallel_for(s.rows, 16, [=](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row)
      for (int64_t e = 0; e < s.experts; ++e) {
        A sum = 0;
        for (int64_t i = 0; i < s.width; ++i) sum += A(x[row * s.width + i]) * w[e * s.width + i];
        logits[row * s.experts + e] = noise.add_to(sum, row * s.experts + e);
      }
  });
}
template <class T, class A = acc_t<T>>
void backward_x(Cpu, const A* dlogits, const A* w, T* dx, Sizes s) {
  parallel_for(s.rows, 16, [=](int64_t from, int64_t to) {
    std::vector<A> sums(static_cast<size_t>(s.width));
    for (int64_t row = from; row < to; ++row) {
      std::fill(sums.begin(), sums.end(), A(0));
      for (int64_t e = 0; e < s.experts; ++e)
        for (int64_t i = 0; i < s.width; ++i)
          sums[static_cast<size_t>(i)] += dlogits[row * s.experts + e] * w[e * s.width + i];
      for (int64_t i = 0; i < s.width; ++i) dx[row * s.width + i] = T(sums[static_cast<size_t>(i)]);
    }
  });
}
template <class T, class A = acc_t<T>>
void backward_w(Cpu, const A* dlogits, const T* x, A* dw, Sizes s) {
  parallel_for(s.width, 64, [=](int64_t from, int64_t to) {
    for (int64_t e = 0; e < s.experts; ++e) {
      std::fill(dw + e * s.width + from, dw + e * s.width + to, A(0));
      for (int64_t row = 0; row < s.rows; ++row)
        for (int64_t i = from; i < to; ++i)
          dw[e * s.width + i] += dlogits[row * s.experts + e] * A(x[row * s.width + i]);
    }
  });
}

#if WEFT_CUDA
constexpr int kWarps = 4;    // of a block
constexpr int kRows = 4;     // rows that share one reading of W
constexpr int kExperts = 8;  // experts whose sums a thread holds
constexpr int kTile = 64;    // rows of dlogits in shared memory

// A warp makes kRows rows of logits, kExperts at a time.
template <class T>
__global__ void router_forward(const T* x, const float* w, float* logits, Noise noise, Sizes s) {
  constexpr int kN = kPack<T>;
  noise.key = noise.key.at_step();
  const int lane = threadIdx.x % 32;
  const int64_t first = (blockIdx.x * int64_t{kWarps} + threadIdx.x / 32) * kRows;
  if (first >= s.rows) return;
  for (int64_t expert = 0; expert < s.experts; expert += kExperts) {
    float sum[kRows][kExperts] = {};
    for (int64_t i = lane * kN; i < s.width; i += 32 * kN) {
      Pack<T, kN> xs[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) xs[r] = load_pack<kN>(x + min(first + r, s.rows - 1) * s.width + i, s.width - i);
#pragma unroll
      for (int e = 0; e < kExperts; ++e) {
        const auto ws = load_pack<kN>(w + min(expert + e, s.experts - 1) * s.width + i, s.width - i);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int j = 0; j < kN; ++j) sum[r][e] += float(xs[r].v[j]) * ws.v[j];
      }
    }
    float mine = 0;  // lane r * kExperts + e stores sum[r][e]
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int e = 0; e < kExperts; ++e) {
        const float total = warp_sum(sum[r][e]);
        if (lane == r * kExperts + e) mine = total;
      }
    const int64_t row = first + lane / kExperts, e = expert + lane % kExperts;
    if (row < s.rows && e < s.experts) logits[row * s.experts + e] = noise.add_to(mine, row * s.experts + e);
  }
}

// A thread makes one pack of columns of kRows rows of dx.
template <class T>
__global__ void router_backward_x(const float* dlogits, const float* w, T* dx, Sizes s, int64_t packs) {
  constexpr int kN = kPack<T>;
  const int64_t i = element_index(), first = i / packs * kRows, column = i % packs * kN;
  if (first >= s.rows) return;
  float sum[kRows][kN] = {};
#pragma unroll 4
  for (int64_t e = 0; e < s.experts; ++e) {
    const auto ws = load_pack<kN>(w + e * s.width + column, s.width - column);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float d = dlogits[min(first + r, s.rows - 1) * s.experts + e];
#pragma unroll
      for (int j = 0; j < kN; ++j) sum[r][j] += d * ws.v[j];
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (first + r >= s.rows) return;
    Pack<T, kN> out;
#pragma unroll
    for (int j = 0; j < kN; ++j) out.v[j] = T(sum[r][j]);
    store_pack(dx + (first + r) * s.width + column, out, s.width - column);
  }
}

// Block (c, p, g): over strip p of rows, the sums of 128 columns for kExperts experts; partial [strips, E, D].
template <class T>
__global__ void router_partial_w(const float* dlogits, const T* x, float* partial, Sizes s, int64_t strip) {
  __shared__ float4 tile[kTile][kExperts / 4];
  const int64_t column = blockIdx.x * int64_t{blockDim.x} + threadIdx.x, expert = blockIdx.z * int64_t{kExperts};
  const int64_t end = min(s.rows, (blockIdx.y + 1) * strip);
  float sum[kExperts] = {};
  for (int64_t begin = blockIdx.y * strip; begin < end; begin += kTile) {
    const int rows = static_cast<int>(min(int64_t{kTile}, end - begin));
    __syncthreads();
    for (int i = threadIdx.x; i < kTile * kExperts; i += blockDim.x) {
      const int64_t row = begin + i / kExperts, e = expert + i % kExperts;
      reinterpret_cast<float*>(tile)[i] = row < end && e < s.experts ? dlogits[row * s.experts + e] : 0.0f;
    }
    __syncthreads();
    if (column >= s.width) continue;
    const T* from = x + begin * s.width + column;
#pragma unroll 8
    for (int r = 0; r < rows; ++r) {
      const float v = float(from[r * s.width]);
#pragma unroll
      for (int q = 0; q < kExperts / 4; ++q) {
        const float4 d = tile[r][q];
        sum[q * 4] += d.x * v;
        sum[q * 4 + 1] += d.y * v;
        sum[q * 4 + 2] += d.z * v;
        sum[q * 4 + 3] += d.w * v;
      }
    }
  }
  if (column >= s.width) return;
#pragma unroll
  for (int e = 0; e < kExperts; ++e)
    if (expert + e < s.experts) partial[(blockIdx.y * s.experts + expert + e) * s.width + column] = sum[e];
}
// One block sums 32 elements of dW over the strips.
__global__ void router_total_w(const float* partial, float* dw, int64_t strips, int64_t n) {
  constexpr int kParts = 8;
  __shared__ float sums[kParts][32];
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32;
  const int64_t i = blockIdx.x * int64_t{32} + lane;
  float sum = 0;
  if (i < n) {
#pragma unroll 8
    for (int64_t p = part; p < strips; p += kParts) sum += partial[p * n + i];
  }
  sums[part][lane] = sum;
  __syncthreads();
  if (part != 0 || i >= n) return;
  float total = 0;
  for (int p = 0; p < kParts; ++p) total += sums[p][lane];
  dw[i] = total;
}

template <class T>
void forward(Cuda, const T* x, const float* w, float* logits, Noise noise, Sizes s) {
  launch_blocks(router_forward<T>, static_cast<unsigned>((s.rows + kWarps * kRows - 1) / (kWarps * kRows)), kWarps * 32,
                0, x, w, logits, noise, s);
}
template <class T>
void backward_x(Cuda, const float* dlogits, const float* w, T* dx, Sizes s) {
  const int64_t packs = (s.width + kPack<T> - 1) / kPack<T>;
  launch_elements(router_backward_x<T>, (s.rows + kRows - 1) / kRows * packs, dlogits, w, dx, s, packs);
}
template <class T>
void backward_w(Cuda, const float* dlogits, const T* x, float* dw, Sizes s) {
  constexpr int64_t kMostStrips = 256;
  const int64_t tiles = (s.rows + kTile - 1) / kTile;
  const int64_t strip = (tiles + kMostStrips - 1) / kMostStrips * kTile, strips = (s.rows + strip - 1) / strip;
  const int64_t n = s.experts * s.width;
  const MemoryScope scope(Category::workspace);
  const Tensor partial = Tensor::empty({strips, n}, DType::f32, Device::cuda);
  const dim3 blocks(static_cast<unsigned>((s.width + 127) / 128), static_cast<unsigned>(strips),
                    static_cast<unsigned>((s.experts + kExperts - 1) / kExperts));
  launch_blocks(router_partial_w<T>, blocks, 128, 0, dlogits, x, partial.data<float>(), s, strip);
  launch_blocks(router_total_w, static_cast<unsigned>((n + 31) / 32), 256, 0,
                static_cast<const float*>(partial.data<float>()), dw, strips, n);
}
#endif

}  // namespace

Tensor router_logits(const Tensor& x, const Tensor& weight, double noise, RngKey key) {
  const DType wide = x.dtype() == DType::f64 ? DType::f64 : DType::f32;
  check(x.rank() == 2 && weight.rank() == 2 && x.size(1) == weight.size(1) && x.numel() > 0 && weight.numel() > 0,
        "router_logits needs rows [N, D] and a weight [E, D] that are not empty, found {} and {}", x.shape().str(),
        weight.shape().str());
  check(weight.dtype() == wide && weight.device() == x.device(),
        "router_logits of {} on {} needs a weight of {} there, found {} on {}", name_of(x.dtype()),
        name_of(x.device()), name_of(wide), name_of(weight.dtype()), name_of(weight.device()));
  const Sizes sizes{x.size(0), x.size(1), weight.size(0)};
  Tensor logits = Tensor::empty({sizes.rows, sizes.experts}, wide, x.device());
  on_device(x.device(), [&](auto device) {
    dispatch(device, x.dtype(), [&]<class T>() {
      using A = acc_t<T>;
      forward(device, x.data<T>(), weight.data<A>(), logits.data<A>(), Noise{noise, key}, sizes);
    });
  });
  return record("router_logits", logits, {x, weight},
                [x = x.detached(), w = weight.detached(), sizes, need_x = x.needs_grad(),
                 need_w = weight.needs_grad()](const Tensor& dlogits) -> Gradients {
                  Tensor dx, dw;
                  if (need_x) dx = Tensor::like(x);
                  if (need_w) dw = Tensor::like(w);
                  on_device(x.device(), [&](auto device) {
                    dispatch(device, x.dtype(), [&]<class T>() {
                      using A = acc_t<T>;
                      if (need_x) backward_x(device, dlogits.data<A>(), w.data<A>(), dx.data<T>(), sizes);
                      if (need_w) backward_w(device, dlogits.data<A>(), x.data<T>(), dw.data<A>(), sizes);
                    });
                  });
                  return {dx, dw};
                });
}

}  // namespace weft
