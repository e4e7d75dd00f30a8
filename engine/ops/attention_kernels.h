// What engine/ops/attention.cu shares with its two sets of CUDA kernels: attention_simt.cu (any width up to 256, f32
// sums on the ordinary cores) and attention_mma.cu (bf16 on the tensor cores).
#pragma once
#include "engine/dtype.h"

namespace weft {

struct AttentionSize {
  int batch, time, heads, key_heads, key_width, value_width;
  double scale;       // of q.k
  double keep_scale;  // 1 / (1 - p)
  uint32_t keep;      // the threshold of random.h
  bool drops;         // p > 0
  RngKey key;
};

template <class T>
struct AttentionForward {
  const T *q, *k, *v;
  T* out;
  float* lse;  // [B, H, T]: log sum exp of a row's scores
};

// dk has a head for every query head: the caller sums them where the key head is shared.
template <class T>
struct AttentionBackward {
  const T *q, *k, *v, *dy;
  const float *lse, *delta;  // [B, H, T]; delta = sum(dy * out), which is sum_s(p_s dp_s)
  T *dq, *dk, *dv;
  float* dk_heads;  // [B, T, H, Dk], in place of dk, where the key head is shared; else null
};

#ifdef __CUDACC__
// Where a block works: one head of one sequence. Offsets of row 0 in q-like, k and v-like tensors, and row strides.
struct Place {
  int64_t q, k, v, q_stride, k_stride, v_stride, rows;  // rows: of lse and of the dropout mask
  __device__ Place(const AttentionSize& a, int block) {
    const int64_t b = block / a.heads, h = block % a.heads, kh = a.key_heads == 1 ? 0 : h;
    q_stride = int64_t{a.heads} * a.key_width;
    k_stride = int64_t{a.key_heads} * a.key_width;
    v_stride = int64_t{a.heads} * a.value_width;
    q = b * a.time * q_stride + h * a.key_width;
    k = b * a.time * k_stride + kh * a.key_width;
    v = b * a.time * v_stride + h * a.value_width;
    rows = (b * a.heads + h) * a.time;
  }
};
#endif

void attention_forward_simt(const AttentionSize& size, const AttentionForward<float>& t);
void attention_forward_simt(const AttentionSize& size, const AttentionForward<bf16>& t);
void attention_backward_simt(const AttentionSize& size, const AttentionBackward<float>& t);
void attention_backward_simt(const AttentionSize& size, const AttentionBackward<bf16>& t);

// False, with nothing done, where the widths, the alignment or the GPU do not suit the tensor cores.
bool attention_forward_mma(const AttentionSize& size, const AttentionForward<bf16>& t);
bool attention_backward_mma(const AttentionSize& size, const AttentionBackward<bf16>& t);

}  // namespace weft
