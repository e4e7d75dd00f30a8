// The warpgroup's matrix instruction of sm_90a: 128 threads multiply tiles straight from shared memory, and go on while
// the product is computed. Used by grouped_matmul and attention.
#pragma once
#include "engine/cuda/tensor_core.h"

namespace weft {

// True in the pass of the compiler that may use these instructions.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHasWarpgroups = true;
#else
constexpr bool kHasWarpgroups = false;
#endif

// A tile for multiply_warpgroup. It lies in rows of 128 bytes, whose pieces of 16 are permuted by XOR with the row's
// number modulo 8; 8 rows on a multiple of 1024 bytes make an atom. Rows along m or n: 64 terms of the sums a row,
// atoms one after another. Rows along the sums: 64 of m or n a row, atoms one after another, and the next 64 of
// m or n after `next_columns` bytes.
__device__ inline uint64_t warpgroup_tile(const bf16* tile, int next_columns = 16) {
  constexpr uint64_t kNextAtom = 1024 / 16, kSwizzle128 = 1;
  const uint64_t start = shared_address(tile) / 16 & 0x3fffu, next = static_cast<uint64_t>(next_columns) / 16;
  return start | next << 16 | kNextAtom << 32 | kSwizzle128 << 62;
}

// Makes this thread's writes to shared memory visible to the matrix instructions.
__device__ inline void publish_to_warpgroups() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Orders earlier accesses to the sums before the products that follow.
__device__ inline void open_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for this warpgroup's products but for the latest kPending groups.
template <int kPending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Hands registers of this warpgroup back, or takes such: each thread has kCount afterwards.
template <int kCount>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
// Waits for the 128 threads of one warpgroup; number: 1 to 15, its own.
__device__ inline void sync_warpgroup(int number) { asm volatile("bar.sync %0, 128;" ::"r"(number) : "memory"); }

// After the wait: keeps the compiler from reading the sums earlier.
template <int kCount>
__device__ void settle(float (&d)[kCount][4]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])::"memory");
}

// The products. d: element e of d[j] in warp w of the four is row 16 w + g + 8 (e / 2), column 8 j + 2c + e % 2.
#define WEFT_SUMS(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define WEFT_SUMS_4(j) WEFT_SUMS(j), WEFT_SUMS(j + 1), WEFT_SUMS(j + 2), WEFT_SUMS(j + 3)
#define WEFT_SUMS_8(j) WEFT_SUMS_4(j), WEFT_SUMS_4(j + 4)
#define WEFT_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WEFT_NAMES_32 \
  WEFT_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WEFT_NAMES_64 WEFT_NAMES_32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" ", " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WEFT_NAMES_96 WEFT_NAMES_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" ", " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WEFT_WGMMA(n, names) "wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 {" names "}, "

// d[64, 8 kCount] += a[64, 16] b[16, 8 kCount]; kCount is 8, 16 or 24. kARowsAreSums, kBRowsAreSums: how the tile is
// stored.
#define WEFT_MULTIPLY(n, names, a_at, b_at, a_rows, b_rows, ...)                                               \
  asm volatile(WEFT_WGMMA(n, names) "%" a_at ", %" b_at ", 1, 1, 1, %" a_rows ", %" b_rows ";" : __VA_ARGS__    \
               : "l"(a), "l"(b), "n"(kARowsAreSums ? 1 : 0), "n"(kBRowsAreSums ? 1 : 0))
template <bool kARowsAreSums, bool kBRowsAreSums, int kCount>
__device__ inline void multiply_warpgroup(float (&d)[kCount][4], uint64_t a, uint64_t b) {
  if constexpr (kCount == 24) {
    WEFT_MULTIPLY("192", WEFT_NAMES_96, "96", "97", "98", "99", WEFT_SUMS_8(0), WEFT_SUMS_8(8), WEFT_SUMS_8(16));
  } else if constexpr (kCount == 16) {
    WEFT_MULTIPLY("128", WEFT_NAMES_64, "64", "65", "66", "67", WEFT_SUMS_8(0), WEFT_SUMS_8(8));
  } else {
    static_assert(kCount == 8);
    WEFT_MULTIPLY("64", WEFT_NAMES_32, "32", "33", "34", "35", WEFT_SUMS_8(0));
  }
}

// d[64, 32] = a[64, 16] b[16, 32], or += where `add`; both tiles have rows along m or n.
__device__ inline void multiply_rows(float (&d)[4][4], uint64_t a, uint64_t b, bool add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %18, 0; " WEFT_WGMMA("32", WEFT_NAMES_16) "%16, %17, p, 1, 1, 0, 0;}"
               : WEFT_SUMS_4(0) : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}
// The same of 64 columns.
__device__ inline void multiply_rows(float (&d)[8][4], uint64_t a, uint64_t b, bool add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; " WEFT_WGMMA("64", WEFT_NAMES_32) "%32, %33, p, 1, 1, 0, 0;}"
               : WEFT_SUMS_8(0) : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

// d[64, 64] += a[64, 16] b[16, 64]: a in registers, like the left operand of multiply_add for each warp's 16 rows; the
// tile b has rows along the sums.
__device__ inline void multiply_sums(float (&d)[8][4], const Quad& a, uint64_t b) {
  asm volatile(WEFT_WGMMA("64", WEFT_NAMES_32) "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
               : WEFT_SUMS_8(0) : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "l"(b));
}
#undef WEFT_SUMS
#undef WEFT_SUMS_4
#undef WEFT_SUMS_8
#undef WEFT_NAMES_16
#undef WEFT_NAMES_32
#undef WEFT_NAMES_64
#undef WEFT_NAMES_96
#undef WEFT_WGMMA
#undef WEFT_MULTIPLY

}  // namespace weft
