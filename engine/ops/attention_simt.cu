// Attention on the ordinary cores: tiles of 32 queries by 32 keys in shared memory as f32, online softmax. Four threads
// share a row of a tile; each keeps every fourth column of the row's result in registers. Serves f32, and bf16 where
// the tensor cores cannot.
#if WEFT_CUDA
#include "engine/cuda/stream.h"
#include "engine/ops/attention_kernels.h"

namespace weft {
namespace {

constexpr int kTile = 32, kThreads = 128;

// Rows [0, kTile) of `width` columns as f32, one float of padding a row against bank conflicts; zeros past `rows`.
template <class T>
__device__ void load_tile(float* tile, const T* from, int64_t stride, int rows, int width) {
  for (int i = threadIdx.x; i < kTile * width; i += kThreads) {
    const int row = i / width, column = i % width;
    tile[row * (width + 1) + column] = row < rows ? float(from[row * stride + column]) : 0.0f;
  }
}

__device__ float dot(const float* a, const float* b, int n) {
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// 1/(1-p) where the mask keeps (t, s), else 0.
__device__ float dropout_factor(const AttentionSize& a, int64_t rows, int t, int s) {
  if (!a.kept) return 1.0f;
  return a.kept[(rows + t) * a.kept_words + s / 32] >> s % 32 & 1u ? static_cast<float>(a.keep_scale) : 0.0f;
}

// sums[i] += sum_c weights[c] * tile[c][part + 4 i]
template <int kColumns>
__device__ void add_rows(float (&sums)[kColumns], const float* weights, const float* tile, int width, int part) {
  for (int c = 0; c < kTile; ++c) {
    const float w = weights[c];
    const float* row = tile + c * (width + 1) + part;
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      if (part + 4 * i < width) sums[i] += w * row[4 * i];
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) simt_forward(AttentionSize a, AttentionForward<T> x) {
  extern __shared__ float shared[];
  float* q = shared;                           // [32, Dk + 1]
  float* k = q + kTile * (a.key_width + 1);    // [32, Dk + 1]
  float* v = k + kTile * (a.key_width + 1);    // [32, Dv + 1]
  float* p = v + kTile * (a.value_width + 1);  // [32, 33]
  const Place at(a, blockIdx.x);
  const int t0 = (gridDim.y - 1 - blockIdx.y) * kTile;
  const int row = threadIdx.x / 4, part = threadIdx.x % 4, t = t0 + row;
  const float scale = static_cast<float>(a.scale);
  load_tile(q, x.q + at.q + t0 * at.q_stride, at.q_stride, a.time - t0, a.key_width);
  float top = -INFINITY, total = 0, out[kWidth / 4] = {};
  for (int s0 = 0; s0 <= t0; s0 += kTile) {
    __syncthreads();
    load_tile(k, x.k + at.k + s0 * at.k_stride, at.k_stride, a.time - s0, a.key_width);
    load_tile(v, x.v + at.v + s0 * at.v_stride, at.v_stride, a.time - s0, a.value_width);
    __syncthreads();
    float score[kTile / 4], highest = top;
    for (int i = 0; i < kTile / 4; ++i) {
      const int column = part + 4 * i;
      score[i] = s0 + column <= t
                     ? scale * dot(q + row * (a.key_width + 1), k + column * (a.key_width + 1), a.key_width)
                     : -INFINITY;
      highest = fmaxf(highest, score[i]);
    }
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
    const float shrink = expf(top - highest);  // key 0 is in the first tile, so `highest` is finite
    top = highest;
    total *= shrink;
#pragma unroll
    for (int i = 0; i < kWidth / 4; ++i) out[i] *= shrink;
    for (int i = 0; i < kTile / 4; ++i) {
      const int column = part + 4 * i;
      const float e = expf(score[i] - top);
      total += e;
      p[row * (kTile + 1) + column] = e * dropout_factor(a, at.rows, t, s0 + column);
    }
    __syncwarp();
    add_rows(out, p + row * (kTile + 1), v, a.value_width, part);
  }
  total += __shfl_xor_sync(~0u, total, 1);
  total += __shfl_xor_sync(~0u, total, 2);
  if (t >= a.time) return;
#pragma unroll
  for (int i = 0; i < kWidth / 4; ++i)
    if (part + 4 * i < a.value_width) x.out[at.y + t * at.y_stride + part + 4 * i] = T(out[i] / total);
  if (part == 0) x.lse[at.rows + t] = top + logf(total);
}

// p and ds of one element from its q.k and dy.v.
struct Element {
  float dropped, ds;
};
__device__ Element element_gradient(const AttentionSize& a, int64_t rows, int t, int s, float qk, float dyv, float lse,
                                    float delta) {
  const float scale = static_cast<float>(a.scale), factor = dropout_factor(a, rows, t, s);
  const float p = expf(scale * qk - lse);
  return {p * factor, scale * p * (dyv * factor - delta)};
}

// dk and dv of 32 keys: each row is a key, the loop runs over the queries that see it.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) simt_backward_keys(AttentionSize a, AttentionBackward<T> x) {
  extern __shared__ float shared[];
  float* k = shared;                             // [32, Dk + 1]
  float* q = k + kTile * (a.key_width + 1);      // [32, Dk + 1]
  float* v = q + kTile * (a.key_width + 1);      // [32, Dv + 1]
  float* dy = v + kTile * (a.value_width + 1);   // [32, Dv + 1]
  float* p = dy + kTile * (a.value_width + 1);   // [32, 33]
  float* ds = p + kTile * (kTile + 1);           // [32, 33]
  const Place at(a, blockIdx.x);
  const int s0 = blockIdx.y * kTile, row = threadIdx.x / 4, part = threadIdx.x % 4, s = s0 + row;
  load_tile(k, x.k + at.k + s0 * at.k_stride, at.k_stride, a.time - s0, a.key_width);
  load_tile(v, x.v + at.v + s0 * at.v_stride, at.v_stride, a.time - s0, a.value_width);
  float dk[kWidth / 4] = {}, dv[kWidth / 4] = {};
  for (int t0 = s0; t0 < a.time; t0 += kTile) {
    __syncthreads();
    load_tile(q, x.q + at.q + t0 * at.q_stride, at.q_stride, a.time - t0, a.key_width);
    load_tile(dy, x.dy + at.y + t0 * at.y_stride, at.y_stride, a.time - t0, a.value_width);
    __syncthreads();
    for (int i = 0; i < kTile / 4; ++i) {
      const int column = part + 4 * i, t = t0 + column;
      Element e{0, 0};
      if (s <= t && t < a.time)
        e = element_gradient(a, at.rows, t, s,
                             dot(k + row * (a.key_width + 1), q + column * (a.key_width + 1), a.key_width),
                             dot(v + row * (a.value_width + 1), dy + column * (a.value_width + 1), a.value_width),
                             x.lse[at.rows + t], x.delta[at.rows + t]);
      p[row * (kTile + 1) + column] = e.dropped;
      ds[row * (kTile + 1) + column] = e.ds;
    }
    __syncwarp();
    add_rows(dv, p + row * (kTile + 1), dy, a.value_width, part);
    add_rows(dk, ds + row * (kTile + 1), q, a.key_width, part);
  }
  if (s >= a.time) return;
#pragma unroll
  for (int i = 0; i < kWidth / 4; ++i) {
    const int column = part + 4 * i;
    if (column < a.value_width) x.dv[at.v + s * at.v_stride + column] = T(dv[i]);
    if (column < a.key_width) {
      if (x.dk_heads)
        x.dk_heads[at.dk + s * at.dk_stride + column] = dk[i];
      else
        x.dk[at.k + s * at.k_stride + column] = T(dk[i]);
    }
  }
}

// dq of 32 queries: each row is a query, the loop runs over the keys it sees.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) simt_backward_queries(AttentionSize a, AttentionBackward<T> x) {
  extern __shared__ float shared[];
  float* q = shared;                            // [32, Dk + 1]
  float* k = q + kTile * (a.key_width + 1);     // [32, Dk + 1]
  float* dy = k + kTile * (a.key_width + 1);    // [32, Dv + 1]
  float* v = dy + kTile * (a.value_width + 1);  // [32, Dv + 1]
  float* ds = v + kTile * (a.value_width + 1);  // [32, 33]
  const Place at(a, blockIdx.x);
  const int t0 = (gridDim.y - 1 - blockIdx.y) * kTile, row = threadIdx.x / 4, part = threadIdx.x % 4, t = t0 + row;
  load_tile(q, x.q + at.q + t0 * at.q_stride, at.q_stride, a.time - t0, a.key_width);
  load_tile(dy, x.dy + at.y + t0 * at.y_stride, at.y_stride, a.time - t0, a.value_width);
  const float lse = t < a.time ? x.lse[at.rows + t] : 0.0f, delta = t < a.time ? x.delta[at.rows + t] : 0.0f;
  float dq[kWidth / 4] = {};
  for (int s0 = 0; s0 <= t0; s0 += kTile) {
    __syncthreads();
    load_tile(k, x.k + at.k + s0 * at.k_stride, at.k_stride, a.time - s0, a.key_width);
    load_tile(v, x.v + at.v + s0 * at.v_stride, at.v_stride, a.time - s0, a.value_width);
    __syncthreads();
    for (int i = 0; i < kTile / 4; ++i) {
      const int column = part + 4 * i, s = s0 + column;
      float e = 0;
      if (s <= t && t < a.time)
        e = element_gradient(a, at.rows, t, s,
                             dot(q + row * (a.key_width + 1), k + column * (a.key_width + 1), a.key_width),
                             dot(dy + row * (a.value_width + 1), v + column * (a.value_width + 1), a.value_width), lse,
                             delta)
                .ds;
      ds[row * (kTile + 1) + column] = e;
    }
    __syncwarp();
    add_rows(dq, ds + row * (kTile + 1), k, a.key_width, part);
  }
  if (t >= a.time) return;
#pragma unroll
  for (int i = 0; i < kWidth / 4; ++i)
    if (part + 4 * i < a.key_width) x.dq[at.q + t * at.q_stride + part + 4 * i] = T(dq[i]);
}

dim3 grid(const AttentionSize& a) {
  return dim3(static_cast<unsigned>(a.batch * a.heads), static_cast<unsigned>((a.time + kTile - 1) / kTile));
}

// Bytes of `keys` tiles of Dk columns, `values` of Dv and `squares` of 32.
size_t tile_bytes(const AttentionSize& a, int keys, int values, int squares) {
  return sizeof(float) * kTile * (keys * (a.key_width + 1) + values * (a.value_width + 1) + squares * (kTile + 1));
}

// Calls run<kWidth>() with a bound of both widths: it sizes the registers that hold a row's result.
template <class F>
void with_width(const AttentionSize& a, F&& run) {
  const int width = a.key_width > a.value_width ? a.key_width : a.value_width;
  check(width <= 256,
        "on a GPU a head of attention has at most 256 columns, found {} and {}", a.key_width, a.value_width);
  width <= 64 ? run.template operator()<64>() : run.template operator()<256>();
}

template <class T>
void forward(const AttentionSize& a, const AttentionForward<T>& t) {
  with_width(a, [&]<int kWidth>() {
    launch_blocks(simt_forward<T, kWidth>, grid(a), kThreads, tile_bytes(a, 2, 1, 1), a, t);
  });
}

template <class T>
void backward(const AttentionSize& a, const AttentionBackward<T>& t) {
  with_width(a, [&]<int kWidth>() {
    launch_blocks(simt_backward_keys<T, kWidth>, grid(a), kThreads, tile_bytes(a, 2, 2, 2), a, t);
    launch_blocks(simt_backward_queries<T, kWidth>, grid(a), kThreads, tile_bytes(a, 2, 2, 1), a, t);
  });
}

}  // namespace

void attention_forward_simt(const AttentionSize& size, const AttentionForward<float>& t) { forward(size, t); }
void attention_forward_simt(const AttentionSize& size, const AttentionForward<bf16>& t) { forward(size, t); }
void attention_backward_simt(const AttentionSize& size, const AttentionBackward<float>& t) { backward(size, t); }
void attention_backward_simt(const AttentionSize& size, const AttentionBackward<bf16>& t) { backward(size, t); }

}  // namespace weft
#endif
