// Attention of bf16 on sm_90a (after Shah et al., "FlashAttention-3", 2024): a warpgroup owns 64 rows and walks over
// tiles of the other side, which are copied to shared memory one ahead. Probabilities never leave registers. Queries
// are rows in the forward kernel, keys in that of dv, which leaves the gradients of the scores, ds, in memory; dq and dk
// are plain products of those and k or q. So no sum needs atomics, and the backward pass computes no score twice.
// Several blocks share a multiprocessor: while one multiplies, another computes exponentials. Widths are padded with
// zeros to those of the instantiation.
#if WEFT_CUDA
#include "engine/cuda/vector.h"
#include "engine/cuda/warpgroup_rows.h"
#include "engine/ops/attention_kernels.h"
#include "engine/tensor.h"

namespace weft {
namespace {

constexpr int kRows = 64, kThreads = 128;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

extern __shared__ __align__(1024) bf16 shared_panels[];

// A tile [rows, width] lies in panels of 64 columns, each laid out for warpgroup_tile. Lane: the thread in its warp and
// where its pieces of 16 bytes begin in a panel: 8 threads a row, 16 rows a pass.
struct Lane {
  int warp, g, c, row, column, piece;
  __device__ Lane()
      : warp(threadIdx.x / 32), g(threadIdx.x % 32 / 4), c(threadIdx.x % 4), row(threadIdx.x / 8),
        column(threadIdx.x % 8 * 8), piece(row * 64 + (threadIdx.x % 8 ^ row % 8) * 8) {}
  // Its piece of the first 16 rows.
  __device__ const bf16* of(const bf16* rows, int64_t stride) const { return rows + row * stride + column; }
};

// Starts the copy of kCount rows of kWidth columns; zeros past `rows` and `width`. `from`: this lane's piece of row 0.
template <int kCount, int kWidth>
__device__ void copy_tile(bf16* tile, const bf16* from, int64_t stride, int rows, int width, const Lane& lane) {
#pragma unroll
  for (int i = 0; i < kCount / 16; ++i)
#pragma unroll
    for (int panel = 0; panel < kWidth / 64; ++panel)
      copy_16_bytes(tile + panel * kCount * 64 + 16 * 64 * i + lane.piece, from + 16 * i * stride + 64 * panel,
                    lane.row + 16 * i < rows && 64 * panel + lane.column < width);
}

// The tile so many elements further on.
__device__ uint64_t further(uint64_t tile, int elements) {
  return (tile & ~uint64_t{0xffffffffu}) | (static_cast<uint32_t>(tile) + static_cast<uint32_t>(elements) / 8);
}

// products[64, kColumns] = rows of a times rows of b, both kWidth wide: only started.
template <int kColumns, int kWidth>
__device__ void start_products(float (&products)[kColumns / 8][4], const bf16* a, const bf16* b) {
  const uint64_t left = warpgroup_tile(a), right = warpgroup_tile(b);
#pragma unroll
  for (int d = 0; d < kWidth; d += 16)
    multiply_rows(products, further(left, d / 64 * kRows * 64 + d % 64),
                  further(right, d / 64 * kColumns * 64 + d % 64), d > 0);
}

// sums[64, kWidth] += weights[64, kColumns] tile[kColumns, kWidth]: only started.
template <int kColumns, int kWidth>
__device__ void start_sums(float (&sums)[kWidth / 64][8][4], const Quad (&weights)[kColumns / 16], const bf16* tile) {
  const uint64_t right = warpgroup_tile(tile);
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k)
#pragma unroll
    for (int panel = 0; panel < kWidth / 64; ++panel)
      multiply_sums(sums[panel], weights[k], further(right, panel * kColumns * 64 + k * 16 * 64));
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
  static constexpr int forward_step = 64, forward_blocks = wide ? 2 : 4;
  static constexpr int keys_step = 64, keys_blocks = wide ? 2 : 3;
  static constexpr int product_stages = 3, product_blocks = wide ? 3 : 4;
  static constexpr size_t forward_bytes = sizeof(bf16) * (kRows * kDk + 2 * forward_step * (kDk + kDv));
  static constexpr size_t keys_bytes =
      sizeof(bf16) * (kRows * (kDk + kDv) + keys_step * (kDk + 2 * kDv)) + sizeof(float) * 2 * 4 * keys_step;
  static constexpr size_t product_bytes = sizeof(bf16) * product_stages * kRows * (kRows + kDk);
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
    const bf16 *next_k = lane.of(x.k + at.k, at.k_stride), *next_v = lane.of(x.v + at.v, at.v_stride);
    const auto copy_keys = [&](int tile) {
      const int left = a.time - tile * kKeys, slot = tile % 2;
      copy_tile<kKeys, W::key>(k + slot * kKeys * W::key, next_k, at.k_stride, left, a.key_width, lane);
      copy_tile<kKeys, W::value>(v + slot * kKeys * W::value, next_v, at.v_stride, left, a.value_width, lane);
      next_k += kKeys * at.k_stride, next_v += kKeys * at.v_stride;
    };
    copy_tile<kRows, W::key>(q, lane.of(x.q + at.q + t0 * at.q_stride, at.q_stride), at.q_stride, a.time - t0,
                             a.key_width, lane);
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
      float highest[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& most = highest[half] = p[0][2 * half];
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) most = fmaxf(most, fmaxf(p[j][2 * half], p[j][2 * half + 1]));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      }
      // `top` need not be the largest score: as long as none is 2^kLate times its weight, sums stay as they are.
      constexpr float kLate = 8;
      if (__any_sync(~0u, scale * (highest[0] - top[0]) > kLate || scale * (highest[1] - top[1]) > kLate)) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float next = fmaxf(top[half], highest[half]);  // key 0 is in the first tile: finite
          const float shrink = exp2_approx(scale * (top[half] - next));
          top[half] = next;
          total[half] *= shrink;
#pragma unroll
          for (int panel = 0; panel < W::value / 64; ++panel)
#pragma unroll
            for (int j = 0; j < 8; ++j) {
              out[panel][j][2 * half] *= shrink;
              out[panel][j][2 * half + 1] *= shrink;
            }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float shift = -scale * top[half];
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

// Turns p into the dropped probability and dy.v into ds, both but for the factor keep_scale (ds: and scale); so `delta`
// is divided by it.
__device__ void element_gradient(float& p, float& dyv, bool kept, float delta) {
  const float all = p;
  p = kept ? all : 0.0f;
  dyv = fmaf(p, dyv, -all * delta);
}

__device__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// What lies at this address of the shared memory of the cluster's block `rank`.
__device__ float4 load_from_block(const float* p, int rank) {
  float4 v;
  asm volatile("{.reg .u32 there;\nmapa.shared::cluster.u32 there, %4, %5;\n"
               "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];}"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(shared_address(p)), "r"(rank) : "memory");
  return v;
}

// delta = dy . y / keep_scale of every row, and its log sum exp for exp2. A block has 32 rows of one head.
__global__ void __launch_bounds__(256) warpgroup_backward_rows(AttentionSize a, AttentionBackward<bf16> x) {
  const Place at(a, blockIdx.x);
  const int t = blockIdx.y * 32 + threadIdx.x / 8;
  if (t >= a.time) return;
  float sum = 0;
#pragma unroll 3
  for (int column = threadIdx.x % 8 * 8; column < a.value_width; column += 64) {
    const int64_t place = at.y + t * at.y_stride + column;
    const Pack<bf16, 8> left = load_whole_pack<8>(x.y + place), right = load_whole_pack<8>(x.dy + place);
#pragma unroll
    for (int d = 0; d < 8; ++d) sum += float(left.v[d]) * float(right.v[d]);
  }
  const unsigned lanes = 0xffu << threadIdx.x % 32 / 8 * 8;
#pragma unroll
  for (int step = 1; step < 8; step *= 2) sum += __shfl_xor_sync(lanes, sum, step);
  if (threadIdx.x % 8 == 0) {
    x.delta[at.rows + t] = sum / static_cast<float>(a.keep_scale);
    x.delta[int64_t{a.batch} * a.heads * a.time + at.rows + t] = x.lse[at.rows + t] * kLog2e;
  }
}

// A block's tile and (sequence, head): heads in groups whose rows stay in the L2 cache, in a group the tiles with the
// most work first.
struct Unit {
  int head, tile;
  __device__ Unit(const AttentionSize& a, int tiles) {
    constexpr int kHeads = 48;
    const int group = blockIdx.x / (kHeads * tiles), first = group * kHeads, rest = blockIdx.x - first * tiles;
    const int count = min(kHeads, a.batch * a.heads - first);
    tile = rest / count;
    head = first + rest % count;
  }
};

// ds of 64 keys (tile i) and of the 64 queries that see them (tile j >= i), as it is copied to shared memory: rows are
// keys, permuted for warpgroup_tile. The tiles of the same keys lie one after another.
constexpr int kScores = kRows * kRows;
WEFT_HD inline int64_t score_tiles(int tiles) { return int64_t{tiles} * (tiles + 1) / 2; }
__device__ inline bf16* score_tile(bf16* scores, int tiles, int64_t head, int i, int j) {
  return scores + (head * score_tiles(tiles) + i * tiles - i * (i + 1) / 2 + j) * kScores;
}

// Starts the copy of kCount queries; `from`: this lane's piece of the first. Each 32 lie in such an order that a
// thread's 8 sums of one key are of 8 queries one after another: query 8 c + 2 j + e of them in row 8 j + 2 c + e.
template <int kCount, int kWidth>
__device__ void copy_queries(bf16* tile, const bf16* from, int64_t stride, int rows, int width, const Lane& lane) {
  const int first = lane.row % 8 / 2 * 8 + lane.row / 8 * 2 + lane.row % 2;
  const int piece = first * 64 + (threadIdx.x % 8 ^ first % 8) * 8;
#pragma unroll
  for (int i = 0; i < kCount / 16; ++i)
#pragma unroll
    for (int panel = 0; panel < kWidth / 64; ++panel)
      copy_16_bytes(tile + panel * kCount * 64 + i / 2 * 32 * 64 + (i % 2 ? (piece + 4 * 64) ^ 32 : piece),
                    from + 16 * i * stride + 64 * panel,
                    lane.row + 16 * i < rows && 64 * panel + lane.column < width);
}

// dv of 64 keys, and ds of them and of the queries that see them: rows are keys.
template <class W>
__global__ void __launch_bounds__(kThreads, W::keys_blocks) warpgroup_backward_keys(AttentionSize a,
                                                                                   AttentionBackward<bf16> x,
                                                                                   bf16* scores) {
  if (kHasWarpgroups) {
    constexpr int kQueries = W::keys_step;
    bf16* k = shared_panels;                                              // [64, Dk]
    bf16* v = k + kRows * W::key;                                         // [64, Dv]
    bf16* q = v + kRows * W::value;                                       // [kQueries, Dk]
    bf16* dy = q + kQueries * W::key;                                     // [2, kQueries, Dv]
    float* lse = reinterpret_cast<float*>(dy + 2 * kQueries * W::value);  // [2, kQueries]
    float* delta = lse + 2 * kQueries;                                    // [2, kQueries]
    uint32_t* kept_bits = reinterpret_cast<uint32_t*>(delta + 2 * kQueries);  // [2, 2, kQueries]
    const int key_tiles = (a.time + kRows - 1) / kRows;
    const Unit unit(a, key_tiles);
    const Place at(a, unit.head);
    const Lane lane;
    const int s0 = unit.tile * kRows, row = 16 * lane.warp + lane.g;
    const int steps = (key_tiles - unit.tile) * (kRows / kQueries);
    const float scale = static_cast<float>(a.scale) * kLog2e, keep_scale = static_cast<float>(a.keep_scale);
    // Where this thread's pieces of the next step are.
    const bf16* next_q = lane.of(x.q + at.q + s0 * at.q_stride, at.q_stride);
    const bf16* next_dy = lane.of(x.dy + at.y + s0 * at.y_stride, at.y_stride);
    const int half = threadIdx.x / kQueries, query = threadIdx.x % kQueries;  // the first two are for rows of their own
    const float* next_row = x.delta + (half ? int64_t{0} : int64_t{a.batch} * a.heads * a.time) + at.rows + s0 + query;
    const uint32_t* next_kept = a.kept + (at.rows + s0 + query) * a.kept_words + s0 / 32 + half;
    const auto copy_step = [&](int step) {
      const int left = a.time - s0 - step * kQueries, slot = step % 2;
      copy_queries<kQueries, W::key>(q, next_q, at.q_stride, left, a.key_width, lane);
      copy_queries<kQueries, W::value>(dy + slot * kQueries * W::value, next_dy, at.y_stride, left, a.value_width,
                                       lane);
      if (half < 2) {
        copy_4_bytes(lse + (2 * half + slot) * kQueries + query, next_row, query < left);
        if (a.kept) copy_4_bytes(kept_bits + (2 * half + slot) * kQueries + query, next_kept, query < left);
      }
      next_q += kQueries * at.q_stride, next_dy += kQueries * at.y_stride;
      next_row += kQueries, next_kept += kQueries * a.kept_words;
    };
    copy_tile<kRows, W::key>(k, lane.of(x.k + at.k + s0 * at.k_stride, at.k_stride), at.k_stride, a.time - s0,
                             a.key_width, lane);
    copy_tile<kRows, W::value>(v, lane.of(x.v + at.v + s0 * at.v_stride, at.v_stride), at.v_stride, a.time - s0,
                               a.value_width, lane);
    copy_step(0);
    close_copies();
    if (!a.kept)
      for (int i = threadIdx.x; i < 4 * kQueries; i += kThreads) kept_bits[i] = ~0u;

    bf16* to = score_tile(scores, key_tiles, unit.head, unit.tile, unit.tile) + row * kRows;
    const uint32_t first_key = 1u << row % 32, second_key = first_key << 8;  // of this thread, in a word of the mask
    float dv[W::value / 64][8][4] = {};
    for (int step = 0; step < steps; ++step) {
      wait_copies<0>();
      publish_to_warpgroups();
      __syncthreads();
      const int t0 = s0 + step * kQueries, slot = step % 2;
      const bf16* dy_tile = dy + slot * kQueries * W::value;
      float p[kQueries / 8][4], ds[kQueries / 8][4];
      open_products();
      start_products<kQueries, W::key>(p, k, q);
      close_products();
      start_products<kQueries, W::value>(ds, v, dy_tile);
      close_products();
      wait_products<1>();
      settle(p);
      if (t0 < s0 + 16 * lane.warp + 15) {
#pragma unroll
        for (int j = 0; j < kQueries / 8; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (s0 + row + e / 2 * 8 > t0 + j / 4 * 32 + 8 * lane.c + j % 4 * 2 + e % 2) p[j][e] = -INFINITY;
      }
#pragma unroll
      for (int j = 0; j < kQueries / 8; ++j)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const float row_lse = lse[slot * kQueries + j / 4 * 32 + 8 * lane.c + j % 4 * 2 + odd];
          p[j][odd] = exp2_approx(fmaf(p[j][odd], scale, -row_lse));
          p[j][odd + 2] = exp2_approx(fmaf(p[j][odd + 2], scale, -row_lse));
        }
      wait_products<0>();
      settle(ds);
      settle_panels(dv);
      __syncthreads();
      if (step + 1 < steps) copy_step(step + 1);
      close_copies();
#pragma unroll
      for (int j = 0; j < kQueries / 8; ++j)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int i = slot * kQueries + j / 4 * 32 + 8 * lane.c + j % 4 * 2 + odd;
          const float row_delta = delta[i];
          const uint32_t kept = kept_bits[i + lane.warp / 2 * 2 * kQueries];
          element_gradient(p[j][odd], ds[j][odd], kept & first_key, row_delta);
          element_gradient(p[j][odd + 2], ds[j][odd + 2], kept & second_key, row_delta);
        }
      Quad dropped[kQueries / 16], gradients[kQueries / 16];
      round_sums(dropped, p);
      round_sums(gradients, ds);
      open_products();
      start_sums<kQueries, W::value>(dv, dropped, dy_tile);
      close_products();
#pragma unroll
      for (int group = 0; group < kQueries / 32; ++group)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Quad &left = gradients[2 * group], &right = gradients[2 * group + 1];
          const int piece = (lane.c ^ lane.g) ^ 4 * ((t0 / 32 + group) % 2);
          *reinterpret_cast<uint4*>(to + 8 * half * kRows + 8 * piece) =
              uint4{left.r[half], left.r[half + 2], right.r[half], right.r[half + 2]};
        }
      if ((t0 + kQueries) % kRows == 0) to += kScores;
      wait_products<0>();
      settle_panels(dv);
    }
    __syncthreads();
    store_rows(x.dv + at.v, at.v_stride, s0, a.time, a.value_width, dv, {keep_scale, keep_scale}, shared_panels, lane);
  }
}

// Where this lane's pieces of the factors of one product are: a tile of ds and up to 64 rows of k or q.
struct Factors {
  const bf16 *scores, *rows;
  int left;  // rows from there on
};

// sums[64, Dk] of `count` products, by keys or by queries; next(f) moves f on to the next one's.
template <class W, bool kByKeys, class F>
__device__ void sum_products(float (&sums)[W::key / 8][4], int count, Factors f, int64_t stride, int width,
                             const Lane& lane, F&& next) {
  constexpr int kStage = kScores + kRows * W::key, kStages = W::product_stages;
  const auto copy = [&](int n) {
    bf16* stage = shared_panels + n % kStages * kStage;
#pragma unroll
    for (int i = 0; i < kScores; i += 8 * kThreads)
      copy_16_bytes(stage + i + 8 * threadIdx.x, f.scores + i, true);
    copy_tile<kRows, W::key>(stage + kScores, f.rows, stride, f.left, width, lane);
    next(f);
  };
#pragma unroll
  for (int n = 0; n < kStages - 1; ++n) {
    if (n < count) copy(n);
    close_copies();
  }
#pragma unroll
  for (int j = 0; j < W::key / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[j][e] = 0;
  for (int n = 0; n < count; ++n) {
    wait_copies<kStages - 2>();
    wait_products<0>();
    publish_to_warpgroups();
    __syncthreads();
    const bf16* stage = shared_panels + n % kStages * kStage;
    const uint64_t left = warpgroup_tile(stage), right = warpgroup_tile(stage + kScores, kRows * 128);
    settle(sums);
    open_products();
#pragma unroll
    for (int i = 0; i < kRows; i += 16)
      multiply_warpgroup<!kByKeys, true>(sums, further(left, kByKeys ? i : i * 64), further(right, i * 64));
    close_products();
    if (n + kStages - 1 < count) copy(n + kStages - 1);
    close_copies();
  }
  wait_products<0>();
  settle(sums);
  __syncthreads();
}

__device__ void turn_pair_back(float& x, float& y, const float* angle) {
  const float2 turn = *reinterpret_cast<const float2*>(angle);
  const float a = x, b = y;
  x = a * turn.x + b * turn.y;
  y = b * turn.x - a * turn.y;
}

// Turns the pairs of rows from `first` of dq or dk back (rope.cu).
template <int kCount>
__device__ void turn_back(float (&sums)[kCount][4], const AttentionSize& a, int first, const Lane& lane) {
  const int kept = a.key_width - a.rotated;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int t = first + 16 * lane.warp + lane.g + 8 * half;
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      if (const int column = 8 * j + 2 * lane.c; t < a.time && column >= kept && column < a.key_width)
        turn_pair_back(sums[j][2 * half], sums[j][2 * half + 1], a.angles + t * a.rotated + column - kept);
  }
}

// dq and dk from ds. Where all heads share one key head, clusters of kParts blocks sum dk of 64 keys over them: each of
// them over every kParts-th head, then over the blocks.
constexpr int kParts = 4;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define WEFT_CLUSTER(n) __cluster_dims__(n)
#else
#define WEFT_CLUSTER(n)
#endif
template <class W, bool kShared>
__global__ void __launch_bounds__(kThreads, W::product_blocks) WEFT_CLUSTER(kShared ? kParts : 1)
    warpgroup_backward_products(AttentionSize a, AttentionBackward<bf16> x, bf16* scores) {
  if (kHasWarpgroups) {
    const Lane lane;
    const int tiles = (a.time + kRows - 1) / kRows, parts = kShared ? kParts : a.heads;
    // A round: the blocks of dk with the most work that is left, then those of dq.
    const int round = (parts + a.heads + kParts - 1) / kParts * kParts;
    const int b = blockIdx.x / (round * tiles), level = blockIdx.x / round % tiles, which = blockIdx.x % round;
    if (which >= parts + a.heads) return;
    const float factor = static_cast<float>(a.scale * a.keep_scale);
    float sums[W::key / 8][4];
    float(&panels)[W::key / 64][8][4] = reinterpret_cast<float(&)[W::key / 64][8][4]>(sums);
    if (which >= parts) {
      const int tile = tiles - 1 - level, head = b * a.heads + which - parts;
      const Place at(a, head);
      const Factors first{score_tile(scores, tiles, head, 0, tile) + 8 * threadIdx.x,
                          lane.of(x.k + at.k, at.k_stride), a.time};
      int64_t step = (tiles - 1) * kScores;
      sum_products<W, false>(sums, tile + 1, first, at.k_stride, a.key_width, lane, [&](Factors& f) {
        f.scores += step, f.rows += kRows * at.k_stride, f.left -= kRows;
        step -= kScores;
      });
      turn_back(sums, a, tile * kRows, lane);
      store_rows(x.dq + at.q, at.q_stride, tile * kRows, a.time, a.key_width, panels, {factor, factor}, shared_panels,
                 lane);
      return;
    }
    const int s0 = level * kRows, length = tiles - level, heads = kShared ? (a.heads - which + kParts - 1) / kParts : 1;
    int head = b * a.heads + which;
    const auto first_of_head = [&] {
      return Factors{score_tile(scores, tiles, head, level, level) + 8 * threadIdx.x,
                     lane.of(x.q + Place(a, head).q + s0 * a.q_stride, a.q_stride), a.time - s0};
    };
    sum_products<W, true>(sums, heads * length, first_of_head(), a.q_stride, a.key_width, lane, [&](Factors& f) {
      f.scores += kScores, f.rows += kRows * a.q_stride, f.left -= kRows;
      if (kShared && f.left <= 0) head += kParts, f = first_of_head();
    });
    const Place at(a, int64_t{b} * a.heads + (kShared ? 0 : which));
    if constexpr (!kShared) {
      turn_back(sums, a, s0, lane);
      store_rows(x.dk + at.k, at.k_stride, s0, a.time, a.key_width, panels, {factor, factor}, shared_panels, lane);
    } else {
      constexpr int kWidth = W::key + 4;
      float* mine = reinterpret_cast<float*>(shared_panels);  // [64, kWidth]
#pragma unroll
      for (int j = 0; j < W::key / 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<float2*>(mine + (16 * lane.warp + lane.g + 8 * half) * kWidth + 8 * j + 2 * lane.c) =
              float2{sums[j][2 * half], sums[j][2 * half + 1]};
      sync_cluster();
      constexpr int kPart = kRows / kParts, kPieces = W::key / 8;
#pragma unroll
      for (int i = 0; i < kPart * kPieces / kThreads; ++i) {
        const int piece = i * kThreads + static_cast<int>(threadIdx.x);
        const int row = which * kPart + piece / kPieces, column = piece % kPieces * 8, s = s0 + row;
        float total[8] = {};
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
          for (int quad = 0; quad < 2; ++quad) {
            const float4 more = load_from_block(mine + row * kWidth + column + 4 * quad, part);
            total[4 * quad] += more.x, total[4 * quad + 1] += more.y;
            total[4 * quad + 2] += more.z, total[4 * quad + 3] += more.w;
          }
        if (s >= a.time || column >= a.key_width) continue;
        const int turned = column - (a.key_width - a.rotated);
#pragma unroll
        for (int j = 0; j < 8; j += 2)
          if (turned + j >= 0) turn_pair_back(total[j], total[j + 1], a.angles + s * a.rotated + turned + j);
        *reinterpret_cast<uint4*>(x.dk + at.k + s * at.k_stride + column) =
            uint4{round_pair(factor * total[0], factor * total[1]), round_pair(factor * total[2], factor * total[3]),
                  round_pair(factor * total[4], factor * total[5]), round_pair(factor * total[6], factor * total[7])};
      }
      sync_cluster();
    }
  }
}

#undef WEFT_CLUSTER

template <class W>
void backward(const AttentionSize& a, AttentionBackward<bf16> t) {
  const int tiles = (a.time + kRows - 1) / kRows, heads = a.batch * a.heads;
  const bool shared = a.key_heads != a.heads;
  const int parts = shared ? kParts : a.heads, round = (parts + a.heads + kParts - 1) / kParts * kParts;
  // With 16 sequences of 512 tokens and 12 heads the scores take 57 MB.
  const Tensor scores = Tensor::empty({heads * score_tiles(tiles) * kScores}, DType::bf16, Device::cuda);
  const Tensor rows = Tensor::empty({2, heads, a.time}, DType::f32, Device::cuda);
  t.delta = rows.data<float>();
  launch_blocks(warpgroup_backward_rows, dim3(static_cast<unsigned>(heads), static_cast<unsigned>((a.time + 31) / 32)),
                256, 0, a, t);
  launch_blocks(warpgroup_backward_keys<W>, static_cast<unsigned>(heads * tiles), kThreads, W::keys_bytes, a, t,
                scores.data<bf16>());
  launch_blocks(shared ? warpgroup_backward_products<W, true> : warpgroup_backward_products<W, false>,
                static_cast<unsigned>(a.batch * round * tiles), kThreads, W::product_bytes, a, t, scores.data<bf16>());
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
  return aligned({t.q, t.k, t.v, t.y, t.dy, t.dq, t.dk, t.dv, a.angles}) &&
         with_widths(a, [&]<class W>() { backward<W>(a, t); });
}

}  // namespace weft
#endif
