// For kernels: 16-byte accesses that fall back to single elements at a ragged end or on an odd address, sums over a warp
// or a block in a fixed order, and a fast power of two.
#pragma once
#include <cstring>

#include "engine/cuda/stream.h"
#include "engine/dtype.h"

#ifdef __CUDACC__
namespace weft {

template <class T, int N>
struct Pack {
  T v[N];
};
// Elements of T in 16 bytes.
template <class T>
constexpr int kPack = static_cast<int>(16 / sizeof(T));

// p[0..N): whole multiples of 16 bytes at an address for them.
template <int N, class T>
__device__ inline Pack<T, N> load_whole_pack(const T* p) {
  static_assert(N * sizeof(T) % 16 == 0);
  uint4 raw[N * sizeof(T) / 16];
#pragma unroll
  for (int i = 0; i < static_cast<int>(N * sizeof(T) / 16); ++i) raw[i] = reinterpret_cast<const uint4*>(p)[i];
  Pack<T, N> pack;
  memcpy(&pack, raw, sizeof pack);
  return pack;
}
template <int N, class T>
__device__ inline void store_whole_pack(T* p, const Pack<T, N>& pack) {
  static_assert(N * sizeof(T) % 16 == 0);
  uint4 raw[N * sizeof(T) / 16];
  memcpy(raw, &pack, sizeof pack);
#pragma unroll
  for (int i = 0; i < static_cast<int>(N * sizeof(T) / 16); ++i)  // C++ becomes four stores of 4 bytes in some kernels
    asm volatile("st.v4.b32 [%0], {%1, %2, %3, %4};"
                 ::"l"(reinterpret_cast<uint4*>(p) + i), "r"(raw[i].x), "r"(raw[i].y), "r"(raw[i].z), "r"(raw[i].w)
                 : "memory");
}

// p[0..N), of which only the first `left` exist; the others are zero.
template <int N, class T>
__device__ inline Pack<T, N> load_pack(const T* p, int64_t left) {
  if constexpr (N * sizeof(T) % 16 == 0)
    if (left >= N && reinterpret_cast<uintptr_t>(p) % 16 == 0) return load_whole_pack<N>(p);
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.v[i] = i < left ? p[i] : T(0.0f);
  return pack;
}

template <int N, class T>
__device__ inline void store_pack(T* p, const Pack<T, N>& pack, int64_t left) {
  if constexpr (N * sizeof(T) % 16 == 0)
    if (left >= N && reinterpret_cast<uintptr_t>(p) % 16 == 0) return store_whole_pack(p, pack);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < left) p[i] = pack.v[i];
}

// The same where the kernel may know that the pack is whole and at an address for 16 bytes: the test of that makes each
// load wait for the one before.
template <bool kWhole, int N, class T>
__device__ inline Pack<T, N> load_part(const T* p, int64_t left) {
  if constexpr (kWhole) return load_whole_pack<N>(p);
  else return load_pack<N>(p, left);
}
template <bool kWhole, int N, class T>
__device__ inline void store_part(T* p, const Pack<T, N>& pack, int64_t left) {
  if constexpr (kWhole) store_whole_pack(p, pack);
  else store_pack(p, pack, left);
}

// Its values as floats: of two bf16 in a register, a shift and a mask.
template <class T, int N>
__device__ inline void widen(const Pack<T, N>& pack, float (&v)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = float(pack.v[i]);
}
template <int N>
__device__ inline void widen(const Pack<bf16, N>& pack, float (&v)[N]) {
  uint32_t two[N / 2];
  memcpy(two, &pack, sizeof two);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    v[2 * i] = __uint_as_float(two[i] << 16);
    v[2 * i + 1] = __uint_as_float(two[i] & 0xffff0000u);
  }
}
template <class T, int N>
__device__ inline Pack<T, N> narrow(const float (&v)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.v[i] = T(v[i]);
  return pack;
}

// The sum over the warp, in every lane.
__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}
__device__ inline float warp_max(float v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, step));
  return v;
}

// The sum over a block of whole warps, in every thread.
__device__ inline float block_sum(float v) {
  __shared__ float partial[32];
  v = warp_sum(v);
  const unsigned warps = blockDim.x / 32, lane = threadIdx.x % 32;
  if (warps == 1) return v;
  __syncthreads();
  if (lane == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  return warp_sum(lane < warps ? partial[lane] : 0.0f);
}
__device__ inline float block_max(float v) {
  __shared__ float partial[32];
  v = warp_max(v);
  const unsigned warps = blockDim.x / 32, lane = threadIdx.x % 32;
  if (warps == 1) return v;
  __syncthreads();
  if (lane == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  return warp_max(lane < warps ? partial[lane] : -INFINITY);
}

// 2^x to 2 units in the last place.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Threads of a block that walks one row of `width` elements in packs: whole warps, at most `most`.
template <class T>
unsigned row_threads(int64_t width, unsigned most) {
  const int64_t packs = (width + kPack<T> - 1) / kPack<T>;
  return packs >= most ? most : static_cast<unsigned>((packs + 31) / 32 * 32);
}

}  // namespace weft
#endif
