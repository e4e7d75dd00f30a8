// What engine/ops/attention.cu shares with its three sets of CUDA kernels: attention_simt.cu (any width up to 256, f32
// sums on the ordinary cores), attention_mma.cu (bf16 on the tensor cores) and attention_warpgroup*.cu (on sm_90a's).
#pragma once
#include <initializer_list>

#include "engine/device.h"
#include "engine/dtype.h"

namespace weft {

struct AttentionSize {
  int batch, time, heads, key_heads, key_width, value_width;
  double scale;          // of q.k
  double keep_scale;     // 1 / (1 - p)
  const uint32_t* kept;  // [B, H, T, kept_words]: bit s % 32 of word s / 32 says whether (t, s) is kept; null: all are
  int64_t kept_words;    // in a row: whole pairs, so that a tile of 64 keys has two
  int64_t q_stride, k_stride, v_stride;  // from a token to the next, also of their gradients
  const float* angles;  // [time, rotated]: cos in even, sin in odd columns
  int rotated;          // columns of a head of q and k, the last; 0: none
};

// Word i of `kept`; mask.key is already at_step().
WEFT_HD inline uint32_t kept_word(const Mask& mask, uint64_t i) {
  uint32_t bits = 0;
  for (int byte = 0; byte < 4; ++byte) {
    const Kept8 kept(mask, 4 * i + static_cast<uint64_t>(byte));
    for (int j = 0; j < 8; ++j) bits |= static_cast<uint32_t>(kept[j]) << (8 * byte + j);
  }
  return bits;
}

// Rotates (or `back`) the heads of q and k in place.
enum class Turn : uint8_t { forward, back };
void rotate(Device device, DType dtype, const AttentionSize& a, void* q, void* k, Turn turn);

template <class T>
struct AttentionForward {
  const T *q, *k, *v;
  T* out;
  acc_t<T>* lse;  // [B, H, T]: log sum exp of a row's scores
};

template <class T>
struct AttentionBackward {
  const T *q, *k, *v, *y, *dy;
  const acc_t<T>* lse;  // [B, H, T]
  T *dq, *dk, *dv;
  acc_t<T>* delta = nullptr;     // [B, H, T]: sum(dy * y), which is sum_s(p_s dp_s)
  acc_t<T>* dk_heads = nullptr;  // [B, T, H, Dk], in place of dk, where the key head is shared; else null
};

inline bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if (reinterpret_cast<uintptr_t>(p) % 16) return false;
  return true;
}

// One head of one sequence: offsets of row 0 and row strides. y: of dy too; dk: of dk_heads.
struct Place {
  int64_t q, k, v, y, dk, q_stride, k_stride, v_stride, y_stride, dk_stride, rows;  // rows: of lse and of the mask
  WEFT_HD Place(const AttentionSize& a, int64_t i) {
    const int64_t b = i / a.heads, h = i % a.heads, kh = a.key_heads == 1 ? 0 : h;
    q_stride = a.q_stride, k_stride = a.k_stride, v_stride = a.v_stride;
    y_stride = int64_t{a.heads} * a.value_width, dk_stride = int64_t{a.heads} * a.key_width;
    q = b * a.time * q_stride + h * a.key_width;
    k = b * a.time * k_stride + kh * a.key_width;
    v = b * a.time * v_stride + h * a.value_width;
    y = b * a.time * y_stride + h * a.value_width;
    dk = b * a.time * dk_stride + h * a.key_width;
    rows = i * a.time;
  }
};

// Whether all rows of heads are 16-byte packs of bf16, as far from a 16-byte address.
inline bool whole_packs(const AttentionSize& a) {
  return a.key_width % 8 == 0 && a.value_width % 8 == 0 && a.q_stride % 8 == 0 && a.k_stride % 8 == 0 &&
         a.v_stride % 8 == 0;
}

void attention_forward_simt(const AttentionSize& size, const AttentionForward<float>& t);
void attention_forward_simt(const AttentionSize& size, const AttentionForward<bf16>& t);
void attention_backward_simt(const AttentionSize& size, const AttentionBackward<float>& t);
void attention_backward_simt(const AttentionSize& size, const AttentionBackward<bf16>& t);

// Fill dq, dk and dv; the forward kernels fill out and lse. Those of the warpgroups also draw `kept`, and sum dk over
// the heads and turn dq and dk back, without delta and dk_heads. False, with nothing done, where the widths, the
// alignment or the GPU do not suit the tensor cores.
bool attention_forward_warpgroup(const AttentionSize& size, const Mask& mask, uint32_t* kept,
                                 const AttentionForward<bf16>& t);
bool attention_backward_warpgroup(const AttentionSize& size, const AttentionBackward<bf16>& t);
bool attention_forward_mma(const AttentionSize& size, const AttentionForward<bf16>& t);
bool attention_backward_mma(const AttentionSize& size, const AttentionBackward<bf16>& t);

}  // namespace weft
