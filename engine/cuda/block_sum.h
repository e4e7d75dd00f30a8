// Sums over the threads of a block, in a fixed order, for the kernels of reductions.
#pragma once

namespace weft {

#ifdef __CUDACC__
// The sum of v over a block of kThreads threads (a multiple of 32, at most 1024), given to every thread. Call it with
// all threads; it may be called again at once.
template <int kThreads, class T>
__device__ T block_sum(T v) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  constexpr int kWarps = kThreads / 32;
  __shared__ T sums[kWarps];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
  __syncthreads();
  T total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) total += sums[i];
  __syncthreads();
  return total;
}
#endif

}  // namespace weft
