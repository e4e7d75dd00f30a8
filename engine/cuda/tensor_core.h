// The warp's matrix instructions (sm_80 and later) and the asynchronous copies that feed them, one function each.
// Used by attention, grouped products, the router and the loss. In all layouts below lane = 4 g + c, with g in [0, 8)
// and c in [0, 4).
#pragma once
#include <cuda_runtime.h>

#include "engine/dtype.h"

namespace weft {

// Four 8x8 tiles of bf16, one register (two adjacent columns of one row) a lane and tile.
struct Quad {
  uint32_t r[4];
};

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Lanes 8i .. 8i+7 give the 8 rows of tile i (16 bytes each); r[i] gets row g, columns 2c and 2c+1 of it.
__device__ inline Quad load_quad(const bf16* row) {
  Quad q;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(q.r[0]), "=r"(q.r[1]), "=r"(q.r[2]), "=r"(q.r[3])
               : "r"(shared_address(row)));
  return q;
}
// The same of the transposed tiles: r[i] gets rows 2c and 2c+1 of column g.
__device__ inline Quad load_quad_transposed(const bf16* row) {
  Quad q;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(q.r[0]), "=r"(q.r[1]), "=r"(q.r[2]), "=r"(q.r[3])
               : "r"(shared_address(row)));
  return q;
}

// The other way round (sm_90): stores what load_quad would read.
__device__ inline void store_quad(bf16* row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(shared_address(row)), "r"(r0), "r"(r1), "r"(r2), "r"(r3) : "memory");
}

// sum[16, 8] += a[16, 16] b[16, 8]. sum: element e is row g + 8 (e / 2), column 2c + e % 2. a: tiles (rows 0-7, columns
// 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15). b0, b1: rows (2c, 2c+1) and (2c+8, 2c+9) of column g.
__device__ inline void multiply_add(float (&sum)[4], const Quad& a, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b0), "r"(b1));
}

// Two floats as bf16 in one register, the first in the low half.
__device__ inline uint32_t pack(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Starts a copy to shared memory; fills with zeros instead where not `inside` (`from` is not read then).
__device__ inline void copy_16_bytes(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               ::"r"(shared_address(to)), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
__device__ inline void copy_4_bytes(void* to, const void* from, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               ::"r"(shared_address(to)), "l"(from), "r"(inside ? 4 : 0) : "memory");
}
// Closes the group of copies started since the last call.
__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's copies but for the latest kPending groups.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace weft
