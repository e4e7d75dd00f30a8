// Attention of bf16 on the tensor cores (after Dao, "FlashAttention-2", 2023): four warps own 16 rows each of a tile of
// 64 and walk over tiles of the other side, which are copied to shared memory one ahead. Probabilities never leave
// registers: an accumulator of one product is the left operand of the next. The two gradient kernels compute the
// probabilities again, each for its own side, so that no sum needs atomics. Widths are padded with zeros to those
// of the instantiation.
#if WEFT_CUDA
#include <algorithm>

#include "engine/cuda/stream.h"
#include "engine/cuda/tensor_core.h"
#include "engine/ops/attention_kernels.h"

namespace weft {
namespace {

constexpr int kRows = 64, kThreads = 128;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Rows of shared memory are 16 bytes longer than their columns: the 8 rows of a quad's tile then touch all banks once.
constexpr int stride_of(int width) { return width + 8; }

// This thread in its warp and block.
struct Lane {
  int warp_row, lane, g, c;
  __device__ Lane() : warp_row(threadIdx.x / 32 * 16), lane(threadIdx.x % 32), g(lane / 4), c(lane % 4) {}
  // What this lane passes to load_quad for a 16x16 block at `corner`: as a left operand (or, transposed, as a right
  // operand stored [K, N]), and as a right operand stored [N, K].
  __device__ const bf16* left(const bf16* corner, int stride) const {
    return corner + lane % 16 * stride + lane / 16 * 8;
  }
  __device__ const bf16* right(const bf16* corner, int stride) const {
    return corner + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8;
  }
};

// Starts the copy of kCount rows of kWidth columns; zeros past `rows` and `width`.
template <int kCount, int kWidth>
__device__ void copy_tile(bf16* tile, const bf16* from, int64_t stride, int rows, int width) {
  constexpr int kPieces = kWidth / 8;
  for (int i = threadIdx.x; i < kCount * kPieces; i += kThreads) {
    const int row = i / kPieces, column = i % kPieces * 8;
    const bool inside = row < rows && column < width;
    copy_16_bytes(tile + row * stride_of(kWidth) + column, inside ? from + row * stride + column : from, inside);
  }
}

// products[16, kColumns] = rows of a (16 from `a`) times rows of b, both kWidth wide.
template <int kColumns, int kWidth>
__device__ void row_products(float (&products)[kColumns / 8][4], const bf16* a, const bf16* b, const Lane& lane) {
  constexpr int kStride = stride_of(kWidth);
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j)
    for (int e = 0; e < 4; ++e) products[j][e] = 0;
#pragma unroll
  for (int d = 0; d < kWidth; d += 16) {
    const Quad left = load_quad(lane.left(a + d, kStride));
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      const Quad right = load_quad(lane.right(b + n * 16 * kStride + d, kStride));
      multiply_add(products[2 * n], left, right.r[0], right.r[1]);
      multiply_add(products[2 * n + 1], left, right.r[2], right.r[3]);
    }
  }
}

// sums[16, kWidth] += weights[16, kColumns] tile[kColumns, kWidth]; the weights are an accumulator, rounded to bf16.
template <int kColumns, int kWidth>
__device__ void add_products(float (&sums)[kWidth / 8][4], const float (&weights)[kColumns / 8][4], const bf16* tile,
                             const Lane& lane) {
  constexpr int kStride = stride_of(kWidth);
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k) {
    const auto &x = weights[2 * k], &y = weights[2 * k + 1];
    const Quad left{{pack(x[0], x[1]), pack(x[2], x[3]), pack(y[0], y[1]), pack(y[2], y[3])}};
#pragma unroll
    for (int n = 0; n < kWidth / 16; ++n) {
      const Quad right = load_quad_transposed(lane.left(tile + k * 16 * kStride + n * 16, kStride));
      multiply_add(sums[2 * n], left, right.r[0], right.r[1]);
      multiply_add(sums[2 * n + 1], left, right.r[2], right.r[3]);
    }
  }
}

// Bits of the mask of query t from key s on.
__device__ uint32_t kept_from(const AttentionSize& a, int64_t rows, int t, int s) {
  return a.kept[(rows + min(t, a.time - 1)) * a.kept_words + s / 32] >> s % 32;
}
// Which elements of an accumulator the dropout keeps, bit e for element e.
// With queries (from t) as rows and keys (from s, a multiple of 8) as columns:
__device__ uint32_t kept_by_query(const AttentionSize& a, const Lane& lane, int64_t rows, int t, int s) {
  if (!a.kept) return 15u;
  const uint32_t low = kept_from(a, rows, t + lane.g, s + 2 * lane.c);
  const uint32_t high = kept_from(a, rows, t + lane.g + 8, s + 2 * lane.c);
  return (low & 3u) | (high & 3u) << 2;
}
// With keys (from s, a multiple of 16) as rows and queries (from t) as columns:
__device__ uint32_t kept_by_key(const AttentionSize& a, const Lane& lane, int64_t rows, int t, int s) {
  if (!a.kept) return 15u;
  const uint32_t even = kept_from(a, rows, t + 2 * lane.c, s + lane.g);
  const uint32_t odd = kept_from(a, rows, t + 2 * lane.c + 1, s + lane.g);
  return (even & 1u) | (odd & 1u) << 1 | (even >> 6 & 4u) | (odd >> 5 & 8u);
}

__device__ void store_pair(bf16* to, float x, float y) { *reinterpret_cast<uint32_t*>(to) = pack(x, y); }
__device__ void store_pair(float* to, float x, float y) {
  to[0] = x;
  to[1] = y;
}

// Writes factor * sums, whose row 0 is row `first` of a tensor, as far as it has rows and columns.
template <class T, int kWidth>
__device__ void store_rows(T* to, int64_t stride, int first, int rows, int width, const float (&sums)[kWidth / 8][4],
                           float factor, const Lane& lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + lane.g + 8 * half;
    if (row >= rows) continue;
#pragma unroll
    for (int j = 0; j < kWidth / 8; ++j)
      if (8 * j < width)
        store_pair(to + row * stride + 8 * j + 2 * lane.c, factor * sums[j][2 * half], factor * sums[j][2 * half + 1]);
  }
}

extern __shared__ uint4 shared_tiles[];

template <int kDk, int kDv>
struct Widths {
  static constexpr int key = kDk, value = kDv, key_stride = stride_of(kDk), value_stride = stride_of(kDv);
  static constexpr int forward_keys = kDk <= 64 && kDv <= 64 ? 64 : 32;  // keys a step of the forward kernel
  static constexpr int step = 32;                                        // of the gradient kernels
  static constexpr bool split = kDk + kDv > 320;  // dk and dv do not fit the registers together: one kernel for each
  static constexpr size_t forward_bytes =
      sizeof(bf16) * (kRows * key_stride + 2 * forward_keys * (key_stride + value_stride));
  static constexpr size_t backward_bytes =
      sizeof(bf16) * (kRows + 2 * step) * (key_stride + value_stride) + sizeof(float) * 4 * step;
};

template <class W>
__global__ void __launch_bounds__(kThreads) mma_forward(AttentionSize a, AttentionForward<bf16> x) {
  constexpr int kKeys = W::forward_keys;
  bf16* q = reinterpret_cast<bf16*>(shared_tiles);  // [64, Dk]
  bf16* k = q + kRows * W::key_stride;              // [2, kKeys, Dk]
  bf16* v = k + 2 * kKeys * W::key_stride;          // [2, kKeys, Dv]
  const Place at(a, blockIdx.x);
  const Lane lane;
  const int t0 = (gridDim.y - 1 - blockIdx.y) * kRows;  // the longest rows first
  const int first = t0 + lane.warp_row;                 // of this warp
  const int tiles = (min(t0 + kRows, a.time) + kKeys - 1) / kKeys;
  const float scale = static_cast<float>(a.scale) * kLog2e;  // exp is computed as exp2
  const auto copy_keys = [&](int tile) {
    const int s0 = tile * kKeys, slot = tile % 2;
    copy_tile<kKeys, W::key>(k + slot * kKeys * W::key_stride, x.k + at.k + s0 * at.k_stride, at.k_stride, a.time - s0,
                             a.key_width);
    copy_tile<kKeys, W::value>(v + slot * kKeys * W::value_stride, x.v + at.v + s0 * at.v_stride, at.v_stride,
                               a.time - s0, a.value_width);
  };
  copy_tile<kRows, W::key>(q, x.q + at.q + t0 * at.q_stride, at.q_stride, a.time - t0, a.key_width);
  copy_keys(0);
  close_copies();

  float out[W::value / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) copy_keys(tile + 1);
    close_copies();
    wait_copies<1>();
    __syncthreads();
    const int s0 = tile * kKeys;
    if (s0 < first + 16) {
      float p[kKeys / 8][4];
      row_products<kKeys, W::key>(p, q + lane.warp_row * W::key_stride, k + tile % 2 * kKeys * W::key_stride, lane);
      const bool diagonal = s0 + kKeys - 1 > first;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          p[j][e] *= scale;
          if (diagonal && s0 + 8 * j + 2 * lane.c + e % 2 > first + lane.g + e / 2 * 8) p[j][e] = -INFINITY;
        }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = top[half];
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) highest = fmaxf(highest, fmaxf(p[j][2 * half], p[j][2 * half + 1]));
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
        const float shrink = exp2f(top[half] - highest);  // key 0 is in the first tile, so `highest` is finite
        top[half] = highest;
        total[half] *= shrink;
#pragma unroll
        for (int j = 0; j < W::value / 8; ++j) {
          out[j][2 * half] *= shrink;
          out[j][2 * half + 1] *= shrink;
        }
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            p[j][e] = exp2f(p[j][e] - highest);
            total[half] += p[j][e];
          }
      }
      if (a.kept)
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
          const uint32_t kept = kept_by_query(a, lane, at.rows, first, s0 + 8 * j);
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (!(kept >> e & 1u)) p[j][e] = 0;
        }
      add_products<kKeys, W::value>(out, p, v + tile % 2 * kKeys * W::value_stride, lane);
    }
    __syncthreads();
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] += __shfl_xor_sync(~0u, total[half], 1);
    total[half] += __shfl_xor_sync(~0u, total[half], 2);
    const float factor = static_cast<float>(a.keep_scale) / total[half];
#pragma unroll
    for (int j = 0; j < W::value / 8; ++j) {
      out[j][2 * half] *= factor;
      out[j][2 * half + 1] *= factor;
    }
    const int t = first + lane.g + 8 * half;
    if (lane.c == 0 && t < a.time) x.lse[at.rows + t] = (top[half] + log2f(total[half])) * kLn2;
  }
  store_rows<bf16, W::value>(x.out + at.y, at.y_stride, first, a.time, a.value_width, out, 1.0f, lane);
}

// Turns q.k into the dropped probability and dy.v into ds / scale; `scale` and `lse` are for exp2.
__device__ void element_gradient(float& qk, float& dyv, bool seen, float factor, float scale, float lse, float delta) {
  const float p = seen ? exp2f(qk * scale - lse) : 0.0f;
  dyv = p * (dyv * factor - delta);
  qk = p * factor;
}

// dk, dv or both of 64 keys: rows are keys, columns the queries that see them.
template <class W, bool kKeyGradient, bool kValueGradient>
__global__ void __launch_bounds__(kThreads) mma_backward_keys(AttentionSize a, AttentionBackward<bf16> x) {
  constexpr int kQueries = W::step;
  bf16* k = reinterpret_cast<bf16*>(shared_tiles);                              // [64, Dk]
  bf16* v = k + kRows * W::key_stride;                                          // [64, Dv]
  bf16* q = v + kRows * W::value_stride;                                        // [2, 32, Dk]
  bf16* dy = q + 2 * kQueries * W::key_stride;                                  // [2, 32, Dv]
  float* lse = reinterpret_cast<float*>(dy + 2 * kQueries * W::value_stride);   // [2, 32]
  float* delta = lse + 2 * kQueries;                                            // [2, 32]
  const Place at(a, blockIdx.x);
  const Lane lane;
  const int s0 = blockIdx.y * kRows, first = s0 + lane.warp_row;
  const int tiles = (a.time - s0 + kQueries - 1) / kQueries;
  const float scale = static_cast<float>(a.scale) * kLog2e, keep_scale = static_cast<float>(a.keep_scale);
  const auto copy_queries = [&](int tile) {
    const int t0 = s0 + tile * kQueries, slot = tile % 2;
    copy_tile<kQueries, W::key>(q + slot * kQueries * W::key_stride, x.q + at.q + t0 * at.q_stride, at.q_stride,
                                a.time - t0, a.key_width);
    copy_tile<kQueries, W::value>(dy + slot * kQueries * W::value_stride, x.dy + at.y + t0 * at.y_stride, at.y_stride,
                                  a.time - t0, a.value_width);
    if (const int i = threadIdx.x; i < kQueries) {
      const bool inside = t0 + i < a.time;
      copy_4_bytes(lse + slot * kQueries + i, x.lse + at.rows + (inside ? t0 + i : 0), inside);
      copy_4_bytes(delta + slot * kQueries + i, x.delta + at.rows + (inside ? t0 + i : 0), inside);
    }
  };
  copy_tile<kRows, W::key>(k, x.k + at.k + s0 * at.k_stride, at.k_stride, a.time - s0, a.key_width);
  copy_tile<kRows, W::value>(v, x.v + at.v + s0 * at.v_stride, at.v_stride, a.time - s0, a.value_width);
  copy_queries(0);
  close_copies();

  float dk[kKeyGradient ? W::key / 8 : 1][4] = {}, dv[kValueGradient ? W::value / 8 : 1][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) copy_queries(tile + 1);
    close_copies();
    wait_copies<1>();
    __syncthreads();
    const int t0 = s0 + tile * kQueries, slot = tile % 2;
    if (t0 + kQueries > first) {
      const bf16* q_tile = q + slot * kQueries * W::key_stride;
      const bf16* dy_tile = dy + slot * kQueries * W::value_stride;
      float p[kQueries / 8][4], ds[kQueries / 8][4] = {};
      row_products<kQueries, W::key>(p, k + lane.warp_row * W::key_stride, q_tile, lane);
      if constexpr (kKeyGradient)
        row_products<kQueries, W::value>(ds, v + lane.warp_row * W::value_stride, dy_tile, lane);
#pragma unroll
      for (int j = 0; j < kQueries / 8; ++j) {
        const uint32_t kept = kept_by_key(a, lane, at.rows, t0 + 8 * j, first);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int column = 8 * j + 2 * lane.c + e % 2, t = t0 + column, s = first + lane.g + e / 2 * 8;
          element_gradient(p[j][e], ds[j][e], s <= t && t < a.time, kept >> e & 1u ? keep_scale : 0.0f, scale,
                           lse[slot * kQueries + column] * kLog2e, delta[slot * kQueries + column]);
        }
      }
      if constexpr (kValueGradient) add_products<kQueries, W::value>(dv, p, dy_tile, lane);
      if constexpr (kKeyGradient) add_products<kQueries, W::key>(dk, ds, q_tile, lane);
    }
    __syncthreads();
  }
  if constexpr (kValueGradient)
    store_rows<bf16, W::value>(x.dv + at.v, at.v_stride, first, a.time, a.value_width, dv, 1.0f, lane);
  if constexpr (kKeyGradient) {
    const float factor = static_cast<float>(a.scale);
    if (x.dk_heads)
      store_rows<float, W::key>(x.dk_heads + at.dk, at.dk_stride, first, a.time, a.key_width, dk, factor, lane);
    else
      store_rows<bf16, W::key>(x.dk + at.k, at.k_stride, first, a.time, a.key_width, dk, factor, lane);
  }
}

// dq of 64 queries: rows are queries, columns the keys they see.
template <class W>
__global__ void __launch_bounds__(kThreads) mma_backward_queries(AttentionSize a, AttentionBackward<bf16> x) {
  constexpr int kKeys = W::step;
  bf16* q = reinterpret_cast<bf16*>(shared_tiles);  // [64, Dk]
  bf16* dy = q + kRows * W::key_stride;             // [64, Dv]
  bf16* k = dy + kRows * W::value_stride;           // [2, 32, Dk]
  bf16* v = k + 2 * kKeys * W::key_stride;          // [2, 32, Dv]
  const Place at(a, blockIdx.x);
  const Lane lane;
  const int t0 = (gridDim.y - 1 - blockIdx.y) * kRows, first = t0 + lane.warp_row;
  const int tiles = (min(t0 + kRows, a.time) + kKeys - 1) / kKeys;
  const float scale = static_cast<float>(a.scale) * kLog2e, keep_scale = static_cast<float>(a.keep_scale);
  const auto copy_keys = [&](int tile) {
    const int s0 = tile * kKeys, slot = tile % 2;
    copy_tile<kKeys, W::key>(k + slot * kKeys * W::key_stride, x.k + at.k + s0 * at.k_stride, at.k_stride, a.time - s0,
                             a.key_width);
    copy_tile<kKeys, W::value>(v + slot * kKeys * W::value_stride, x.v + at.v + s0 * at.v_stride, at.v_stride,
                               a.time - s0, a.value_width);
  };
  copy_tile<kRows, W::key>(q, x.q + at.q + t0 * at.q_stride, at.q_stride, a.time - t0, a.key_width);
  copy_tile<kRows, W::value>(dy, x.dy + at.y + t0 * at.y_stride, at.y_stride, a.time - t0, a.value_width);
  copy_keys(0);
  close_copies();

  float lse[2], delta[2], dq[W::key / 8][4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int t = first + lane.g + 8 * half;
    lse[half] = t < a.time ? x.lse[at.rows + t] * kLog2e : 0.0f;
    delta[half] = t < a.time ? x.delta[at.rows + t] : 0.0f;
  }
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) copy_keys(tile + 1);
    close_copies();
    wait_copies<1>();
    __syncthreads();
    const int s0 = tile * kKeys;
    if (s0 < first + 16) {
      const bf16* k_tile = k + tile % 2 * kKeys * W::key_stride;
      float p[kKeys / 8][4], ds[kKeys / 8][4];
      row_products<kKeys, W::key>(p, q + lane.warp_row * W::key_stride, k_tile, lane);
      row_products<kKeys, W::value>(ds, dy + lane.warp_row * W::value_stride, v + tile % 2 * kKeys * W::value_stride,
                                    lane);
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        const uint32_t kept = kept_by_query(a, lane, at.rows, first, s0 + 8 * j);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int s = s0 + 8 * j + 2 * lane.c + e % 2, t = first + lane.g + e / 2 * 8;
          element_gradient(p[j][e], ds[j][e], s <= t && t < a.time, kept >> e & 1u ? keep_scale : 0.0f, scale,
                           lse[e / 2], delta[e / 2]);
        }
      }
      add_products<kKeys, W::key>(dq, ds, k_tile, lane);
    }
    __syncthreads();
  }
  store_rows<bf16, W::key>(x.dq + at.q, at.q_stride, first, a.time, a.key_width, dq, static_cast<float>(a.scale), lane);
}

dim3 grid(const AttentionSize& a) {
  return dim3(static_cast<unsigned>(a.batch * a.heads), static_cast<unsigned>((a.time + kRows - 1) / kRows));
}

int shared_limit() {
  static const int bytes = [] {
    int device = 0, n = 0;
    cuda_check(cudaGetDevice(&device), "cudaGetDevice");
    cuda_check(cudaDeviceGetAttribute(&n, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
    return n;
  }();
  return bytes;
}

// Calls run<Widths>() with the smallest instantiation that holds both widths; false where none does.
template <class F>
bool with_widths(const AttentionSize& a, F&& run) {
  const int key = a.key_width, value = a.value_width;
  if (!whole_packs(a) || key > 256 || value > 256) return false;
  const auto try_one = [&]<int kDk, int kDv>() {
    using W = Widths<kDk, kDv>;
    if (static_cast<size_t>(shared_limit()) < std::max(W::forward_bytes, W::backward_bytes)) return false;
    run.template operator()<W>();
    return true;
  };
  if (key <= 64 && value <= 64) return try_one.template operator()<64, 64>();
  if (key <= 128 && value <= 128) return try_one.template operator()<128, 128>();
  if (key <= 128 && value <= 192) return try_one.template operator()<128, 192>();
  return try_one.template operator()<256, 256>();
}

}  // namespace

bool attention_forward_mma(const AttentionSize& a, const AttentionForward<bf16>& t) {
  return aligned({t.q, t.k, t.v, t.out}) && with_widths(a, [&]<class W>() {
           launch_blocks(mma_forward<W>, grid(a), kThreads, W::forward_bytes, a, t);
         });
}

bool attention_backward_mma(const AttentionSize& a, const AttentionBackward<bf16>& t) {
  return aligned({t.q, t.k, t.v, t.dy, t.dq, t.dk, t.dv, t.dk_heads}) && with_widths(a, [&]<class W>() {
           if constexpr (W::split) {
             launch_blocks(mma_backward_keys<W, true, false>, grid(a), kThreads, W::backward_bytes, a, t);
             launch_blocks(mma_backward_keys<W, false, true>, grid(a), kThreads, W::backward_bytes, a, t);
           } else {
             launch_blocks(mma_backward_keys<W, true, true>, grid(a), kThreads, W::backward_bytes, a, t);
           }
           launch_blocks(mma_backward_queries<W>, grid(a), kThreads, W::backward_bytes, a, t);
         });
}

}  // namespace weft
#endif
