// The GPU as the ops see it: one compute stream, checked calls, and launches whose grid arithmetic is in one place.
#pragma once
#include <cuda_runtime.h>

#include "engine/check.h"

namespace weft {

// Throws Fault::device with the failed call's name and CUDA's words.
void cuda_check(cudaError_t status, const char* what);

cudaStream_t compute_stream();  // every kernel and library call is ordered on it
void synchronize();             // waits until the compute stream is idle
int multiprocessors();
bool has_device_code();         // whether this build has kernels for the GPU that is there

#ifdef __CUDACC__
// The index of an element for kernels launched with launch_elements.
__device__ inline int64_t element_index() { return blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; }

// One thread per element, 256 a block.
template <class... P, class... A>
void launch_elements(void (*kernel)(P...), int64_t elements, A&&... args) {
  if (elements == 0) return;
  kernel<<<static_cast<unsigned>((elements + 255) / 256), 256, 0, compute_stream()>>>(std::forward<A>(args)...);
  cuda_check(cudaGetLastError(), "kernel launch");
}

// `blocks` blocks of `threads` with `shared` bytes of dynamic shared memory.
template <class... P, class... A>
void launch_blocks(void (*kernel)(P...), dim3 blocks, unsigned threads, size_t shared, A&&... args) {
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return;
  if (shared > 48 * 1024)
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
               "shared memory size");
  kernel<<<blocks, threads, shared, compute_stream()>>>(std::forward<A>(args)...);
  cuda_check(cudaGetLastError(), "kernel launch");
}
#endif

}  // namespace weft
