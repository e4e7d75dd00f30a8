// The tensor copies of sm_90 (TMA) and the barriers in shared memory that they report to. One thread copies a box of a
// tensor; what lies outside of the tensor arrives as zeros. Used by grouped_matmul.
#pragma once
#include <cuda.h>

#include "engine/cuda/stream.h"
#include "engine/cuda/tensor_core.h"

namespace weft {

constexpr int kBoxSide = 64;  // of every box: 64 rows of 64 bf16, permuted as warpgroup_tile wants them
constexpr int kBoxBytes = kBoxSide * kBoxSide * 2;

// The map of a contiguous [matrices, rows, columns] of bf16 for copies of boxes. columns must be a multiple of 8 and
// the address one of 16 bytes.
inline CUtensorMap box_map(const bf16* from, int64_t matrices, int64_t rows, int64_t columns) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
               "cudaGetDriverEntryPointByVersion");
    check(found != nullptr, "the driver must have cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  CUtensorMap map;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                               static_cast<cuuint64_t>(matrices)};
  const cuuint64_t strides[2] = {sizes[0] * 2, sizes[0] * sizes[1] * 2};
  const cuuint32_t box[3] = {kBoxSide, kBoxSide, 1}, steps[3] = {1, 1, 1};
  const CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<bf16*>(from), sizes, strides,
                                 box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled of [{}, {}, {}] failed: {}", matrices, rows, columns,
        static_cast<int>(status));
  return map;
}

#ifdef __CUDACC__
// A barrier turns its phase when as many arrivals as it was made for, and all bytes they announced, are there.
__device__ inline void init_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After all init_barrier, before a __syncthreads.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives and announces bytes that copies will bring.
__device__ inline void expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Waits until the phase of this parity is over.
__device__ inline void wait_barrier(uint64_t* barrier, uint32_t parity) {
  asm volatile("{\n.reg .pred done;\nagain:\n"
               "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1, 0x989680;\n"
               "@done bra over;\nbra again;\nover:\n}"
               ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}

// Starts the copy of the box whose corner is (matrix, row, column).
__device__ inline void copy_box(void* to, const CUtensorMap* map, uint64_t* barrier, int column, int row, int matrix) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
               "[%2];"
               ::"r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(matrix)
               : "memory");
}
__device__ inline void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
#endif

}  // namespace weft
