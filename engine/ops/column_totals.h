// The last step of a sum over rows on a GPU: earlier blocks left the sums of a range of rows each. Used by ops that sum
// columns: biases' gradients, the weights' of norms and routers.
#pragma once
#include "engine/cuda/vector.h"
#include "engine/tensor.h"

#ifdef __CUDACC__
namespace weft {

// One block of 32 warps per 32 columns.
template <class T>
__global__ void __launch_bounds__(1024) total_columns_kernel(const float* partial, int64_t ranges, int64_t columns,
                                                             T* y) {
  __shared__ float sums[32][33];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t c = blockIdx.x * int64_t{32} + lane;
  float total = 0;
  if (c < columns) {
#pragma unroll 8
    for (int64_t r = warp; r < ranges; r += 32) total += partial[r * columns + c];
  }
  sums[warp][lane] = total;
  __syncthreads();
  total = warp_sum(sums[lane][warp]);
  const int64_t column = blockIdx.x * int64_t{32} + warp;
  if (lane == 0 && column < columns) y[column] = T(total);
}
// y[c] = the sum over r of partial[r, c], f32 [ranges, columns] on the GPU, in an order that does not change.
template <class T>
void total_columns(const Tensor& partial, T* y) {
  const int64_t columns = partial.size(1);
  launch_blocks(total_columns_kernel<T>, static_cast<unsigned>((columns + 31) / 32), 1024, 0,
                static_cast<const float*>(partial.data<float>()), partial.size(0), columns, y);
}

}  // namespace weft
#endif
