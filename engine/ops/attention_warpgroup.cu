// Attention of bf16 on sm_90a (after Shah et al., "FlashAttention-3", 2024): a warpgroup owns 64 rows and walks over
// tiles of the other side, which are copied to shared memory one ahead. Probabilities never leave registers. Queries
// are rows in the forward kernel and that of dq; keys are rows in the kernel of dk and dv: so no sum needs atomics. The
// latter leaves the gradients of the scores in memory, and dq is a plain product of those and k.
// Several blocks share a multiprocessor: while one multiplies, another computes exponentials. Widths are padded with
// zeros to those of the instantiation.
#if WEFT_CUDA
#include "engine/allocator.h"
#include "engine/cuda/tensor_copy.h"
#include "engine/cuda/vector.h"
#include "engine/cuda/warpgroup_rows.h"
#include "engine/ops/attention_kernels.h"
#include "engine/tensor.h"

namespace weft {
namespace {

constexpr int kRows = 64, kThreads = 128;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

extern __shared__ __align__(1024) bf16 shared_panels[];

// A tile [rows, width] lies in panels of 64 columns, each laid out for warpgroup_tile. Lane: the thread in its warp, and
// where its pieces of 16 bytes begin in a panel: 8 threads a row, 16 rows a pass.
struct Lane {
  int warp, g, c, row, column, piece;
  __device__ Lane()
      : warp(threadIdx.x / 32), g(threadIdx.x % 32 / 4), c(threadIdx.x % 4), row(threadIdx.x / 8),
        column(threadIdx.x % 8 * 8), piece(row * 64 + (threadIdx.x % 8 ^ row % 8) * 8) {}
};

// Starts the copy of kCount rows of kWidth columns; zeros past `rows` and `width`.
template <int kCount, int kWidth>
__device__ void copy_tile(bf16* tile, const bf16* from, int64_t stride, int rows, int width, const Lane& lane) {
#pragma unroll
  for (int i = 0; i < kCount / 16; ++i) {
    const int row = lane.row + 16 * i;
    const bf16* source = from + row * stride + lane.column;
#pragma unroll
    for (int panel = 0; panel < kWidth / 64; ++panel) {
      const bool inside = row < rows && 64 * panel + lane.column < width;
      copy_16_bytes(tile + panel * kCount * 64 + 16 * 64 * i + lane.piece, inside ? source + 64 * panel : from, inside);
    }
  }
}

// products[64, kColumns] = rows of a times rows of b, both kWidth wide: only started.
template <int kColumns, int kWidth>
__device__ void start_products(float (&products)[kColumns / 8][4], const bf16* a, const bf16* b) {
#pragma unroll
  for (int d = 0; d < kWidth; d += 16)
    multiply_rows(products, warpgroup_tile(a + d / 64 * kRows * 64 + d % 64),
                  warpgroup_tile(b + d / 64 * kColumns * 64 + d % 64), d > 0);
}

// sums[64, kWidth] += weights[64, kColumns] tile[kColumns, kWidth]: only started.
template <int kColumns, int kWidth>
__device__ void start_sums(float (&sums)[kWidth / 64][8][4], const Quad (&weights)[kColumns / 16], const bf16* tile) {
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k)
#pragma unroll
    for (int panel = 0; panel < kWidth / 64; ++panel)
      multiply_sums(sums[panel], weights[k], warpgroup_tile(tile + panel * kColumns * 64 + k * 16 * 64));
}

template <int kPanels>
__device__ void settle_panels(float (&sums)[kPanels][8][4]) {
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) settle(sums[panel]);
}

// Sums as a left operand.
template <int kTiles>
__device__ void round_sums(Quad (&rounded)[kTiles / 2], const float (&x)[kTiles][4]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    rounded[j / 2].r[j % 2 * 2] = round_pair(x[j][0], x[j][1]);
    rounded[j / 2].r[j % 2 * 2 + 1] = round_pair(x[j][2], x[j][3]);
  }
}

// Writes factor[row half] * sums to rows from `first` of a tensor, as far as it has rows and columns, through this
// warp's rows of `panels`.
template <int kPanels>
__device__ void store_rows(bf16* to, int64_t stride, int first, int rows, int width,
                           const float (&sums)[kPanels][8][4], const float (&factor)[2], bf16* panels,
                           const Lane& lane) {
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint32_t*>(panels + panel * kRows * 64 + (16 * lane.warp + lane.g + 8 * half) * 64 +
                                     (j ^ lane.g) * 8 + 2 * lane.c) =
            round_pair(factor[half] * sums[panel][j][2 * half], factor[half] * sums[panel][j][2 * half + 1]);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = threadIdx.x % 32 / 8 + 4 * i, row = 16 * lane.warp + r;
    if (first + row >= rows) continue;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      if (64 * panel + lane.column < width)
        *reinterpret_cast<uint4*>(to + (first + row) * stride + 64 * panel + lane.column) =
            *reinterpret_cast<const uint4*>(panels + panel * kRows * 64 + row * 64 + (threadIdx.x % 8 ^ r % 8) * 8);
  }
}

// A row's mask bits of up to 64 keys, turned so that bits 8 j + 7 and 8 j + 8 are of this lane's elements of tile j.
struct KeptRow {
  uint32_t word[2];
  __device__ void set(int i, uint32_t bits) { word[i] = __funnelshift_l(bits, bits, 7 - threadIdx.x % 4 * 2); }
  __device__ bool operator()(int j, int e) const { return word[j / 4] >> ((j % 4 * 8 + 7 + e) % 32) & 1u; }
  // `pair`, the two elements of tile j as bf16, without what is dropped.
  __device__ uint32_t drop(int j, uint32_t pair) const {
    const uint32_t even = word[j / 4], odd = __funnelshift_r(even, even, 1), sign = 8 | j % 4;  // copies a byte's sign
    uint32_t both;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(both) : "r"(even), "r"(odd), "r"(sign * 0x11u | (sign + 4) * 0x1100u));
    return pair & both;
  }
};

// Draws and stores the mask of this warp's 16 rows from t and of 64 keys from s: a word a lane. Then lanes swap words.
__device__ void draw_rows(KeptRow (&kept)[2], const AttentionSize& a, const Mask& mask, uint32_t* kept_bits,
                          int64_t rows, int t, int s) {
  if (!kept_bits) {
    kept[0].word[0] = kept[0].word[1] = kept[1].word[0] = kept[1].word[1] = ~0u;
    return;
  }
  const int lane = threadIdx.x % 32;
  const int64_t place = (rows + t + lane / 2) * a.kept_words + s / 32 + lane % 2;
  const uint32_t drawn = kept_word(mask, static_cast<uint64_t>(place));
  if (t + lane / 2 < a.time) kept_bits[place] = drawn;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      kept[half].set(i, __shfl_sync(~0u, drawn, lane / 4 * 2 + 16 * half + i));
}

template <int kDk, int kDv>
struct Widths {
  static constexpr int key = kDk, value = kDv;
  static constexpr bool wide = kDk + kDv > 128;
  // Rows of the other side that are copied at once, and blocks that share a multiprocessor: the best measured.
  static constexpr int forward_step = 64, keys_step = 32;
  static constexpr int forward_blocks = wide ? 2 : 4, queries_blocks = wide ? 4 : 6, keys_blocks = wide ? 2 : 4;
  static constexpr size_t forward_bytes = sizeof(bf16) * (kRows * kDk + 2 * forward_step * (kDk + kDv));
  static constexpr size_t queries_bytes = sizeof(bf16) * 2 * kRows * (kRows + kDk);
  static constexpr size_t keys_bytes =
      sizeof(bf16) * ((kRows + 2 * keys_step) * (kDk + kDv) + 2 * kRows * kRows) + sizeof(float) * 2 * 4 * keys_step;
};

template <class W>
__global__ void __launch_bounds__(kThreads, W::forward_blocks) warpgroup_forward(AttentionSize a, Mask mask,
                                                                                uint32_t* kept_bits,
                                                                                AttentionForward<bf16> x) {
  if (kHasWarpgroups) {
    mask.key = mask.key.at_step();
    constexpr int kKeys = W::forward_step;
    bf16* q = shared_panels;              // [64, Dk]
    bf16* k = q + kRows * W::key;         // [2, kKeys, Dk]
    bf16* v = k + 2 * kKeys * W::key;     // [2, kKeys, Dv]
    const Place at(a, blockIdx.x);
    const Lane lane;
    const int t0 = (gridDim.y - 1 - blockIdx.y) * kRows;  // the longest rows first
    const int row = 16 * lane.warp + lane.g;              // of this thread, in the tile; and row + 8
    const int tiles = (min(t0 + kRows, a.time) + kKeys - 1) / kKeys;
    const float scale = static_cast<float>(a.scale) * kLog2e;  // exp is computed as exp2
    const auto copy_keys = [&](int tile) {
      const int s0 = tile * kKeys, slot = tile % 2;
      copy_tile<kKeys, W::key>(k + slot * kKeys * W::key, x.k + at.k + s0 * at.k_stride, at.k_stride, a.time - s0,
                               a.key_width, lane);
      copy_tile<kKeys, W::value>(v + slot * kKeys * W::value, x.v + at.v + s0 * at.v_stride, at.v_stride, a.time - s0,
                                 a.value_width, lane);
    };
    copy_tile<kRows, W::key>(q, x.q + at.q + t0 * at.q_stride, at.q_stride, a.time - t0, a.key_width, lane);
    copy_keys(0);
    close_copies();

    float out[W::value / 64][8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
    for (int tile = 0; tile < tiles; ++tile) {
      if (tile + 1 < tiles) copy_keys(tile + 1);
      close_copies();
      const int s0 = tile * kKeys;
      wait_copies<1>();
      publish_to_warpgroups();
      __syncthreads();
      float p[kKeys / 8][4];
      open_products();
      start_products<kKeys, W::key>(p, q, k + tile % 2 * kKeys * W::key);
      close_products();
      KeptRow kept[2];  // drawn while the products run
      draw_rows(kept, a, mask, kept_bits, at.rows, t0 + 16 * lane.warp, s0);
      wait_products<0>();
      settle(p);
      if (s0 + kKeys > t0) {
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (s0 + 8 * j + 2 * lane.c + e % 2 > t0 + row + e / 2 * 8) p[j][e] = -INFINITY;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = top[half];
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) highest = fmaxf(highest, fmaxf(p[j][2 * half], p[j][2 * half + 1]));
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
        const float shrink = exp2f(scale * (top[half] - highest));  // key 0 is in the first tile: `highest` is finite
        top[half] = highest;
        total[half] *= shrink;
#pragma unroll
        for (int panel = 0; panel < W::value / 64; ++panel)
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            out[panel][j][2 * half] *= shrink;
            out[panel][j][2 * half + 1] *= shrink;
          }
        const float shift = -scale * highest;
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& weight = p[j][2 * half + e];
            weight = exp2_approx(fmaf(scale, weight, shift));
            total[half] += weight;
          }
      }
      Quad weights[kKeys / 16];
      round_sums(weights, p);
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t& pair = weights[j / 2].r[j % 2 * 2 + half];
          pair = kept[half].drop(j, pair);
        }
      settle_panels(out);
      open_products();
      start_sums<kKeys, W::value>(out, weights, v + tile % 2 * kKeys * W::value);
      close_products();
      wait_products<0>();
      settle_panels(out);
      __syncthreads();
    }
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] += __shfl_xor_sync(~0u, total[half], 1);
      total[half] += __shfl_xor_sync(~0u, total[half], 2);
      factor[half] = static_cast<float>(a.keep_scale) / total[half];
      const int t = t0 + row + 8 * half;
      if (lane.c == 0 && t < a.time) x.lse[at.rows + t] = (scale * top[half] + log2f(total[half])) * kLn2;
    }
    store_rows(x.out + at.y, at.y_stride, t0, a.time, a.value_width, out, factor, shared_panels, lane);
  }
}

// Turns q.k into the dropped probability and dy.v into ds, both but for the factor keep_scale (ds: and scale); so
// `delta` is divided by it. `scale` and `lse` are for exp2.
__device__ void element_gradient(float& qk, float& dyv, bool kept, float scale, float lse, float delta) {
  const float p = exp2_approx(fmaf(qk, scale, -lse));
  qk = kept ? p : 0.0f;
  dyv = fmaf(qk, dyv, -p * delta);
}

// ds of 64 keys by 64 queries that see them, as warpgroup_tile's rows along the sums: row = key. A head has those of key
// tiles in turn, from a key tile's own queries on.
constexpr int kScores = kRows * kRows;
WEFT_HD int64_t score_tiles(int time) {
  const int64_t n = (time + kRows - 1) / kRows;
  return n * (n + 1) / 2;
}
__device__ int64_t score_tile(const AttentionSize& a, int head, int key_tile, int query_tile) {
  const int n = (a.time + kRows - 1) / kRows;
  return (head * score_tiles(a.time) + key_tile * n - key_tile * (key_tile + 1) / 2 + query_tile) * kScores;
}

// dq of 64 queries.
template <class W>
__global__ void __launch_bounds__(kThreads, W::queries_blocks) warpgroup_backward_queries(AttentionSize a,
                                                                                         AttentionBackward<bf16> x,
                                                                                         const bf16* scores) {
  if (kHasWarpgroups) {
    bf16* ds = shared_panels;       // [2, 64, 64]
    bf16* k = ds + 2 * kScores;     // [2, 64, Dk]
    const Place at(a, blockIdx.x);
    const Lane lane;
    const int last = gridDim.y - 1 - blockIdx.y;  // the longest rows first
    const auto copy_keys = [&](int tile) {
      const int slot = tile % 2, s0 = tile * kRows;
      const bf16* from = scores + score_tile(a, blockIdx.x, tile, last);
#pragma unroll
      for (int i = 0; i < kScores; i += kThreads * 8) {
        const int piece = i + threadIdx.x * 8;
        copy_16_bytes(ds + slot * kScores + piece, from + piece, true);
      }
      copy_tile<kRows, W::key>(k + slot * kRows * W::key, x.k + at.k + s0 * at.k_stride, at.k_stride, a.time - s0,
                               a.key_width, lane);
    };
    copy_keys(0);
    close_copies();
    float dq[W::key / 64][8][4] = {};
    for (int tile = 0; tile <= last; ++tile) {
      if (tile < last) copy_keys(tile + 1);
      close_copies();
      wait_copies<1>();
      publish_to_warpgroups();
      __syncthreads();
      const bf16 *ds_tile = ds + tile % 2 * kScores, *k_tile = k + tile % 2 * kRows * W::key;
      open_products();
#pragma unroll
      for (int s = 0; s < kRows; s += 16)
#pragma unroll
        for (int panel = 0; panel < W::key / 64; ++panel)
          multiply_warpgroup<true, true>(dq[panel], warpgroup_tile(ds_tile + s * 64),
                                         warpgroup_tile(k_tile + panel * kRows * 64 + s * 64));
      close_products();
      wait_products<0>();
      settle_panels(dq);
      __syncthreads();
    }
    const float factor = static_cast<float>(a.scale * a.keep_scale);
    store_rows(x.dq + at.q, at.q_stride, last * kRows, a.time, a.key_width, dq, {factor, factor}, shared_panels, lane);
  }
}

// dk and dv of 64 keys, and ds: rows are keys, columns the queries that see them.
template <class W>
__global__ void __launch_bounds__(kThreads, W::keys_blocks) warpgroup_backward_keys(AttentionSize a,
                                                                                   AttentionBackward<bf16> x,
                                                                                   bf16* scores) {
  if (kHasWarpgroups) {
    constexpr int kQueries = W::keys_step;
    bf16* k = shared_panels;                                                    // [64, Dk]
    bf16* v = k + kRows * W::key;                                               // [64, Dv]
    bf16* q = v + kRows * W::value;                                             // [2, kQueries, Dk]
    bf16* dy = q + 2 * kQueries * W::key;                                       // [2, kQueries, Dv]
    bf16* finished = dy + 2 * kQueries * W::value;                              // [2, 64, 64] of ds
    float* lse = reinterpret_cast<float*>(finished + 2 * kScores);              // [2, kQueries]
    float* delta = lse + 2 * kQueries;                                          // [2, kQueries]
    uint32_t* kept_bits = reinterpret_cast<uint32_t*>(delta + 2 * kQueries);    // [2, 2, kQueries]
    const Place at(a, blockIdx.x);
    const Lane lane;
    const int s0 = blockIdx.y * kRows, row = 16 * lane.warp + lane.g;
    const int tiles = (a.time - s0 + kQueries - 1) / kQueries;
    const float scale = static_cast<float>(a.scale) * kLog2e, keep_scale = static_cast<float>(a.keep_scale);
    const float less_keep = 1 / keep_scale;
    const auto copy_queries = [&](int tile) {
      const int t0 = s0 + tile * kQueries, slot = tile % 2;
      copy_tile<kQueries, W::key>(q + slot * kQueries * W::key, x.q + at.q + t0 * at.q_stride, at.q_stride,
                                  a.time - t0, a.key_width, lane);
      copy_tile<kQueries, W::value>(dy + slot * kQueries * W::value, x.dy + at.y + t0 * at.y_stride, at.y_stride,
                                    a.time - t0, a.value_width, lane);
      const int i = threadIdx.x % kQueries, part = threadIdx.x / kQueries;
      const bool inside = t0 + i < a.time;
      const int64_t query = at.rows + (inside ? t0 + i : 0);
      if (part == 0) copy_4_bytes(lse + slot * kQueries + i, x.lse + query, inside);
      if (part == 1) copy_4_bytes(delta + slot * kQueries + i, x.delta + query, inside);
      if (const int half = part % 2; part / 2 == kThreads / kQueries / 2 - 1 && a.kept)
        copy_4_bytes(kept_bits + (2 * slot + half) * kQueries + i, a.kept + query * a.kept_words + s0 / 32 + half,
                     inside);
    };
    copy_tile<kRows, W::key>(k, x.k + at.k + s0 * at.k_stride, at.k_stride, a.time - s0, a.key_width, lane);
    copy_tile<kRows, W::value>(v, x.v + at.v + s0 * at.v_stride, at.v_stride, a.time - s0, a.value_width, lane);
    copy_queries(0);
    close_copies();

    static_assert(2 * kQueries == kRows);  // two steps make a tile of ds
    float dk[W::key / 64][8][4] = {}, dv[W::value / 64][8][4] = {};
    for (int tile = 0; tile < tiles; ++tile) {
      if (tile + 1 < tiles) copy_queries(tile + 1);
      close_copies();
      wait_copies<1>();
      if (threadIdx.x == 0) wait_stores<1>();
      publish_to_warpgroups();
      __syncthreads();
      const int t0 = s0 + tile * kQueries, slot = tile % 2;
      const bf16 *q_tile = q + slot * kQueries * W::key, *dy_tile = dy + slot * kQueries * W::value;
      float p[kQueries / 8][4], ds[kQueries / 8][4];
      open_products();
      start_products<kQueries, W::key>(p, k, q_tile);
      start_products<kQueries, W::value>(ds, v, dy_tile);
      close_products();
      wait_products<0>();
      settle(p);
      settle(ds);
      if (t0 < s0 + kRows) {
#pragma unroll
        for (int j = 0; j < kQueries / 8; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (s0 + row + e / 2 * 8 > t0 + 8 * j + 2 * lane.c + e % 2) p[j][e] = -INFINITY;
      }
#pragma unroll
      for (int j = 0; j < kQueries / 8; ++j)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int i = slot * kQueries + 8 * j + 2 * lane.c + odd;
          const float row_lse = lse[i] * kLog2e, row_delta = delta[i] * less_keep;
          // Bits 0 and 8 are those of this lane's two keys.
          const uint32_t kept =
              a.kept ? kept_bits[i + (slot + lane.warp / 2) * kQueries] >> (row % 32) : ~0u;
          element_gradient(p[j][odd], ds[j][odd], kept & 1u, scale, row_lse, row_delta);
          element_gradient(p[j][odd + 2], ds[j][odd + 2], kept & 256u, scale, row_lse, row_delta);
        }
      Quad dropped[kQueries / 16], gradients[kQueries / 16];
      round_sums(dropped, p);
      round_sums(gradients, ds);
      bf16* const own = finished + tile / 2 % 2 * kScores + (16 * lane.warp + threadIdx.x % 16) * 64;
#pragma unroll
      for (int i = 0; i < kQueries / 16; ++i) {
        const int piece = tile % 2 * kQueries / 8 + 2 * i + threadIdx.x % 32 / 16;
        const uint32_t(&r)[4] = gradients[i].r;
        store_quad(own + (piece ^ threadIdx.x % 8) * 8, r[0], r[1], r[2], r[3]);
      }
      publish_to_warpgroups();
      settle_panels(dv);
      settle_panels(dk);
      open_products();
      start_sums<kQueries, W::value>(dv, dropped, dy_tile);
      start_sums<kQueries, W::key>(dk, gradients, q_tile);
      close_products();
      wait_products<0>();
      settle_panels(dv);
      settle_panels(dk);
      __syncthreads();
      if (threadIdx.x == 0 && (tile % 2 == 1 || tile + 1 == tiles))
        store_bytes(scores + score_tile(a, blockIdx.x, blockIdx.y, blockIdx.y + tile / 2),
                    finished + tile / 2 % 2 * kScores, kScores * sizeof(bf16));
    }
    if (threadIdx.x == 0) wait_stores<0>();
    const float factor = static_cast<float>(a.scale * a.keep_scale);
    store_rows(x.dv + at.v, at.v_stride, s0, a.time, a.value_width, dv, {keep_scale, keep_scale}, shared_panels, lane);
    if (!x.dk_heads) {
      __syncwarp();
      store_rows(x.dk + at.k, at.k_stride, s0, a.time, a.key_width, dk, {factor, factor}, shared_panels, lane);
      return;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int s = s0 + row + 8 * half;
      if (s >= a.time) continue;
#pragma unroll
      for (int j = 0; j < W::key / 8; ++j)
        if (8 * j < a.key_width)
          *reinterpret_cast<float2*>(x.dk_heads + at.dk + s * at.dk_stride + 8 * j + 2 * lane.c) =
              float2{factor * dk[j / 8][j % 8][2 * half], factor * dk[j / 8][j % 8][2 * half + 1]};
    }
  }
}

// Its launch bounds tell the host which pass of the compiler made the code that the GPU runs.
__global__ void __launch_bounds__(kHasWarpgroups ? kThreads : 32) probe() {}

bool has_warpgroups() {
  static const bool has = [] {
    cudaFuncAttributes attributes;
    cuda_check(cudaFuncGetAttributes(&attributes, probe), "cudaFuncGetAttributes");
    return attributes.maxThreadsPerBlock == kThreads;
  }();
  return has;
}

// Calls run<Widths>() with the smallest instantiation that holds both widths; false where none does.
template <class F>
bool with_widths(const AttentionSize& a, F&& run) {
  const int key = a.key_width, value = a.value_width;
  if (!has_warpgroups() || a.scale <= 0 || !whole_packs(a)) return false;
  if (key <= 64 && value <= 64) return run.template operator()<Widths<64, 64>>(), true;
  if (key <= 128 && value <= 192) return run.template operator()<Widths<128, 192>>(), true;
  return false;
}

dim3 grid(const AttentionSize& a) {
  return dim3(static_cast<unsigned>(a.batch * a.heads), static_cast<unsigned>((a.time + kRows - 1) / kRows));
}

}  // namespace

bool attention_forward_warpgroup(const AttentionSize& a, const Mask& mask, uint32_t* kept,
                                 const AttentionForward<bf16>& t) {
  return aligned({t.q, t.k, t.v, t.out}) && with_widths(a, [&]<class W>() {
           launch_blocks(warpgroup_forward<W>, grid(a), kThreads, W::forward_bytes, a, mask, kept, t);
         });
}

bool attention_backward_warpgroup(const AttentionSize& a, const AttentionBackward<bf16>& t) {
  return aligned({t.q, t.k, t.v, t.y, t.dy, t.dq, t.dk, t.dv, t.dk_heads}) && with_widths(a, [&]<class W>() {
           const int64_t elements = int64_t{a.batch} * a.heads * score_tiles(a.time) * kScores;
           const MemoryScope scope(Category::workspace);
           const Tensor scores = Tensor::empty({elements}, DType::bf16, Device::cuda);
           launch_blocks(warpgroup_backward_keys<W>, grid(a), kThreads, W::keys_bytes, a, t, scores.data<bf16>());
           launch_blocks(warpgroup_backward_queries<W>, grid(a), kThreads, W::queries_bytes, a, t,
                         static_cast<const bf16*>(scores.data<bf16>()));
         });
}

}  // namespace weft
#endif
