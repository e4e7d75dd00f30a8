// Attention of bf16 on sm_90a, forward (after Shah et al., "FlashAttention-3", 2024): a warpgroup owns 64 queries and
// walks over tiles of keys and values, which are copied to shared memory one ahead. Probabilities never leave
// registers. Several blocks share a multiprocessor: while one multiplies, another computes exponentials. Widths are
// padded with zeros to those of the instantiation.
#if WEFT_CUDA
#include "engine/ops/attention_warpgroup.h"

namespace weft {
namespace {

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

// Its launch bounds tell the host which pass of the compiler made the code that the GPU runs.
__global__ void __launch_bounds__(kHasWarpgroups ? kThreads : 32) probe() {}

}  // namespace

bool has_warpgroups() {
  static const bool has = [] {
    cudaFuncAttributes attributes;
    cuda_check(cudaFuncGetAttributes(&attributes, probe), "cudaFuncGetAttributes");
    return attributes.maxThreadsPerBlock == kThreads;
  }();
  return has;
}

bool attention_forward_warpgroup(const AttentionSize& a, const Mask& mask, uint32_t* kept,
                                 const AttentionForward<bf16>& t) {
  const dim3 blocks(static_cast<unsigned>(a.batch * a.heads), static_cast<unsigned>((a.time + kRows - 1) / kRows));
  return aligned({t.q, t.k, t.v, t.out}) && with_widths(a, [&]<class W>() {
           launch_blocks(warpgroup_forward<W>, blocks, kThreads, W::forward_bytes, a, mask, kept, t);
         });
}

}  // namespace weft
#endif
