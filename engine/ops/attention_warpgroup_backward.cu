// Attention of bf16 on sm_90a, backward. A warpgroup owns 64 keys and walks over the queries that see them: it sums dv
// and leaves the gradients of the scores, ds, in memory. dq and dk are plain products of those and k or q. So no sum
// needs atomics, and every score is computed once; blocks and widths are as in the forward kernel.
#if WEFT_CUDA
#include "engine/ops/attention_warpgroup.h"
#include "engine/tensor.h"

namespace weft {
namespace {

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
            uint4{pack(factor * total[0], factor * total[1]), pack(factor * total[2], factor * total[3]),
                  pack(factor * total[4], factor * total[5]), pack(factor * total[6], factor * total[7])};
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

}  // namespace

bool attention_backward_warpgroup(const AttentionSize& a, const AttentionBackward<bf16>& t) {
  return aligned({t.q, t.k, t.v, t.y, t.dy, t.dq, t.dk, t.dv, a.angles}) &&
         with_widths(a, [&]<class W>() { backward<W>(a, t); });
}

}  // namespace weft
#endif
