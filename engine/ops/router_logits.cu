// logits = x W^T + noise with sums in f32 (f64 for f64) and no copy of x in f32; dx = dlogits W, dW = dlogits^T x. A
// product with a handful of columns is bound by reading x, where a GEMM leaves its tiles empty: cuBLAS took 0.29 ms for
// the dW of 8 experts of width 768 over 8192 rows.
#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "engine/allocator.h"
#include "engine/cpu/parallel.h"
#include "engine/ops.h"
#if WEFT_CUDA
#include "engine/cuda/tensor_core.h"
#include "engine/cuda/vector.h"
#include "engine/ops/column_totals.h"
#endif

namespace weft {
namespace {

struct Sizes {
  int64_t rows, width, experts;
};
// What dx is added to: the sum of `chosen` rows, those of a token's slots; none: nothing.
template <class T>
struct Owed {
  const T* rows = nullptr;
  const int32_t* slots = nullptr;
  int64_t chosen = 0;
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
void backward_x(Cpu, const A* dlogits, const A* w, const Owed<T>& owed, T* dx, Sizes s) {
  parallel_for(s.rows, 16, [=](int64_t from, int64_t to) {
    std::vector<A> sums(static_cast<size_t>(s.width));
    for (int64_t row = from; row < to; ++row) {
      std::fill(sums.begin(), sums.end(), A(0));
      for (int64_t k = 0; k < owed.chosen; ++k)
        for (int64_t i = 0; i < s.width; ++i)
          sums[static_cast<size_t>(i)] += A(owed.rows[owed.slots[row * owed.chosen + k] * s.width + i]);
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
constexpr int kExperts = 8;  // experts whose sums a thread holds
constexpr int kWarps = 8;    // of a block

// A warp makes kRows rows of logits, kExperts at a time: of f32, and of rows that are not whole packs.
constexpr int kRows = 4;
template <class T>
__global__ void __launch_bounds__(kWarps * 32) router_forward(const T* x, const float* w, float* logits, Noise noise,
                                                              Sizes s) {
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

// A block makes kTiles x 16 rows of kExperts logits with the matrix instruction, its warps taking turns at 32 columns;
// W goes in as three bf16 parts that add up to it. The order of the columns is that of the loads: lane 4 g + c has 8
// adjacent ones of row g, where the instruction has two pairs, and the same ones of W.
constexpr int kTiles = 2;   // that share a warp's W
constexpr int kChunks = 3;  // of 32 columns, on the way at once
__global__ void __launch_bounds__(kWarps * 32, 2) router_forward_mma(const bf16* x, const float* w, float* logits,
                                                                     Noise noise, Sizes s) {
  __shared__ float sums[kWarps][kTiles * 16][kExperts];
  noise.key = noise.key.at_step();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  const int64_t first = blockIdx.x * int64_t{kTiles * 16}, expert = blockIdx.y * int64_t{kExperts};
  const float* w_row = w + min(expert + g, s.experts - 1) * s.width;
  float sum[kTiles][4] = {};
  for (int64_t from = warp * 32; from < s.width; from += kChunks * kWarps * 32) {
    uint4 xs[kChunks][kTiles * 2] = {};
    float4 ws[kChunks][2] = {};
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const int64_t column = from + k * kWarps * 32 + c * 8;
      if (column >= s.width) continue;
#pragma unroll
      for (int r = 0; r < kTiles * 2; ++r)
        xs[k][r] = *reinterpret_cast<const uint4*>(x + min(first + r * 8 + g, s.rows - 1) * s.width + column);
      ws[k][0] = *reinterpret_cast<const float4*>(w_row + column);
      ws[k][1] = *reinterpret_cast<const float4*>(w_row + column + 4);
    }
#pragma unroll
    for (int k = 0; k < kChunks; ++k)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float4 rest = ws[k][half];
#pragma unroll
        for (int part = 0; part < 3; ++part) {
          const bf16 b[4] = {bf16(rest.x), bf16(rest.y), bf16(rest.z), bf16(rest.w)};
          const uint32_t b0 = pack(rest.x, rest.y), b1 = pack(rest.z, rest.w);
          rest = {rest.x - float(b[0]), rest.y - float(b[1]), rest.z - float(b[2]), rest.w - float(b[3])};
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            const uint4 &top = xs[k][t * 2], &low = xs[k][t * 2 + 1];
            multiply_add(sum[t], half ? Quad{top.z, low.z, top.w, low.w} : Quad{top.x, low.x, top.y, low.y}, b0, b1);
          }
        }
      }
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[warp][t * 16 + g + e / 2 * 8][c * 2 + e % 2] = sum[t][e];
  __syncthreads();
  for (int i = threadIdx.x; i < kTiles * 16 * kExperts; i += blockDim.x) {
    const int64_t row = first + i / kExperts, e = expert + i % kExperts;
    if (row >= s.rows || e >= s.experts) continue;
    float total = 0;
#pragma unroll
    for (int part = 0; part < kWarps; ++part) total += sums[part][i / kExperts][i % kExperts];
    logits[row * s.experts + e] = noise.add_to(total, row * s.experts + e);
  }
}

// A thread makes one pack of columns of kEach rows of dx. kWhole: its packs are whole, at addresses for 16 bytes.
// Of [8192, 768] in bf16, 8 experts and two rows a token on an H200, from memory (the L2): 15.4 us (10.6), where a pass
// for the sums of the rows and one that added to them took 29.0 (21.4).
template <class T, int kEach, bool kWhole>
__global__ void __launch_bounds__(kWarps * 32, kWhole ? 3 : 1)
    router_backward_x(const float* __restrict__ dlogits, const float* __restrict__ w, Owed<T> owed, T* dx, Sizes s) {
  constexpr int kN = kPack<T>, kTile = kEach * kWarps;
  __shared__ alignas(16) float tile[kExperts][kTile];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = (blockIdx.y * int64_t{32} + lane) * kN;
  const int64_t top = blockIdx.x * int64_t{kTile}, first = top + warp * kEach;
  const auto load = [&](const auto* row) { return load_part<kWhole, kN>(row + column, s.width - column); };
  float sum[kEach][kN] = {};
#pragma unroll 2
  for (int64_t k = 0; k < owed.chosen; ++k) {
    Pack<T, kN> rows[kEach];
#pragma unroll
    for (int r = 0; r < kEach; ++r)
      rows[r] = load(owed.rows + owed.slots[min(first + r, s.rows - 1) * owed.chosen + k] * s.width);
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      float values[kN];
      widen(rows[r], values);
#pragma unroll
      for (int j = 0; j < kN; ++j) sum[r][j] += values[j];
    }
  }
  for (int64_t expert = 0; expert < s.experts; expert += kExperts) {
    __syncthreads();
    for (int i = threadIdx.x; i < kTile * kExperts; i += blockDim.x) {
      const int64_t row = top + i / kExperts, e = expert + i % kExperts;
      tile[i % kExperts][i / kExperts] = row < s.rows && e < s.experts ? dlogits[row * s.experts + e] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kExperts; ++e) {
      const auto ws = load(w + min(expert + e, s.experts - 1) * s.width);
      const auto ds = load_whole_pack<kEach>(&tile[e][warp * kEach]);
#pragma unroll
      for (int r = 0; r < kEach; ++r)
#pragma unroll
        for (int j = 0; j < kN; ++j) sum[r][j] += ds.v[r] * ws.v[j];
    }
  }
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    if (first + r >= s.rows) break;
    store_part<kWhole>(dx + (first + r) * s.width + column, narrow<T>(sum[r]), s.width - column);
  }
}

// Block (p, c, g): over strip p of rows, the sums of 32 packs of columns for kExperts experts, a warp to every
// kWarps-th row, kEach of them on the way at once; partial [strips, E, D]. Of [8192, 768] in bf16 on an H200 8.5 us.
template <class T, int kEach, bool kWhole>
__global__ void __launch_bounds__(kWarps * 32, kWhole ? 2 : 1)
    router_partial_w(const float* __restrict__ dlogits, const T* __restrict__ x, float* __restrict__ partial, Sizes s,
                     int64_t strip) {
  constexpr int kN = kPack<T>, kTile = kEach * kWarps, kHalf = kExperts / 2;
  __shared__ alignas(16) float tile[kTile][kExperts], sums[kWarps][kHalf][32 * kN];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t left_column = blockIdx.y * int64_t{32 * kN}, column = left_column + lane * kN;
  const int64_t expert = blockIdx.z * int64_t{kExperts}, end = min(s.rows, (blockIdx.x + 1) * strip);
  Pack<float, kN> sum[kExperts] = {};
  for (int64_t begin = blockIdx.x * strip; begin < end; begin += kTile) {
    Pack<T, kN> xs[kEach];
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int64_t row = begin + warp + k * kWarps;
      xs[k] = kWhole ? load_whole_pack<kN>(x + min(row, end - 1) * s.width + column)
                     : load_pack<kN>(x + row * s.width + column, row < end ? s.width - column : 0);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kTile * kExperts; i += blockDim.x) {
      const int64_t row = begin + i / kExperts, e = expert + i % kExperts;
      tile[i / kExperts][i % kExperts] = row < end && e < s.experts ? dlogits[row * s.experts + e] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const auto ds = load_whole_pack<kExperts>(tile[warp + k * kWarps]);
      float values[kN];
      widen(xs[k], values);
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int e = 0; e < kExperts; ++e) sum[e].v[j] += ds.v[e] * values[j];
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kHalf; ++e) store_whole_pack(&sums[warp][e][lane * kN], sum[half * kHalf + e]);
    __syncthreads();
    for (int i = threadIdx.x; i < kHalf * 32 * kN; i += blockDim.x) {
      const int64_t e = expert + half * kHalf + i / (32 * kN), to = left_column + i % (32 * kN);
      if (e >= s.experts || to >= s.width) continue;
      float total = 0;
#pragma unroll
      for (int part = 0; part < kWarps; ++part) total += sums[part][i / (32 * kN)][i % (32 * kN)];
      partial[(blockIdx.x * s.experts + e) * s.width + to] = total;
    }
  }
}

unsigned blocks_of(int64_t elements, int64_t each) { return static_cast<unsigned>((elements + each - 1) / each); }

template <class T>
void forward(Cuda, const T* x, const float* w, float* logits, Noise noise, Sizes s) {
  if constexpr (std::is_same_v<T, bf16>) {
    const auto odd = (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(w)) % 16;
    if (odd == 0 && s.width % kPack<T> == 0)
      return launch_blocks(router_forward_mma, dim3(blocks_of(s.rows, kTiles * 16), blocks_of(s.experts, kExperts)),
                           kWarps * 32, 0, x, w, logits, noise, s);
  }
  launch_blocks(router_forward<T>, blocks_of(s.rows, kWarps * kRows), kWarps * 32, 0, x, w, logits, noise, s);
}
template <class T>
void backward_x(Cuda, const float* dlogits, const float* w, const Owed<T>& owed, T* dx, Sizes s) {
  constexpr int kEach = 4;
  const auto odd = (reinterpret_cast<uintptr_t>(w) | reinterpret_cast<uintptr_t>(owed.rows) |
                    reinterpret_cast<uintptr_t>(dx)) % 16;
  const bool whole = odd == 0 && s.width % (32 * kPack<T>) == 0;
  launch_blocks(whole ? router_backward_x<T, kEach, true> : router_backward_x<T, kEach, false>,
                dim3(blocks_of(s.rows, kEach * kWarps), blocks_of(s.width, 32 * kPack<T>)), kWarps * 32, 0, dlogits, w,
                owed, dx, s);
}
template <class T>
void backward_w(Cuda, const float* dlogits, const T* x, float* dw, Sizes s) {
  constexpr int kWholeEach = 12, kEach = 4, kMostStrips = 88;
  const bool whole = reinterpret_cast<uintptr_t>(x) % 16 == 0 && s.width % (32 * kPack<T>) == 0;
  const int64_t tile = (whole ? kWholeEach : kEach) * kWarps;
  const int64_t strip = blocks_of(blocks_of(s.rows, tile), kMostStrips) * tile, n = s.experts * s.width;
  const unsigned strips = blocks_of(s.rows, strip);
  const MemoryScope scope(Category::workspace);
  const Tensor partial = Tensor::empty({strips, n}, DType::f32, Device::cuda);
  launch_blocks(whole ? router_partial_w<T, kWholeEach, true> : router_partial_w<T, kEach, false>,
                dim3(strips, blocks_of(s.width, 32 * kPack<T>), blocks_of(s.experts, kExperts)), kWarps * 32, 0,
                dlogits, x, partial.data<float>(), s, strip);
  total_columns(partial, dw);
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
  return record(
      "router_logits", logits, {x, weight},
      [x = x.detached(), w = weight.detached(), sizes, x_node = x.node(),
       need_w = weight.needs_grad()](const Tensor& dlogits) -> Gradients {
        const Node::Owed owed = x_node ? std::exchange(x_node->owed, {}) : Node::Owed{};
        Tensor dx, dw;
        if (x_node) dx = Tensor::like(x);
        if (need_w) dw = Tensor::like(w);
        on_device(x.device(), [&](auto device) {
          dispatch(device, x.dtype(), [&]<class T>() {
            using A = acc_t<T>;
            Owed<T> rows;
            if (owed.sum) rows = {owed.rows.data<T>(), owed.slots.data<int32_t>(), owed.slots.size(1)};
            if (x_node) backward_x(device, dlogits.data<A>(), w.data<A>(), rows, dx.data<T>(), sizes);
            if (need_w) backward_w(device, dlogits.data<A>(), x.data<T>(), dw.data<A>(), sizes);
          });
        });
        return {dx, dw};
      });
}

}  // namespace weft
