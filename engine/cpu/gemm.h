// Matrix products: the CPU's over BLAS, and the description of a product that the GPU's (engine/cuda/blas.h) shares.
// Used by matmul, grouped matmul, the composed attention and Muon.
#pragma once
#include <string>

#include "engine/dtype.h"

namespace weft {

// C = op(A) op(B) + beta C + bias, row-major; op(A) is [m, k], op(B) [k, n], C [m, n].
//   gemm(Cpu{}, {.a = x, .b = w, .c = y, .dtype = DType::f32, .m = 8, .n = 4, .k = 2, .transpose_b = true});
struct Gemm {
  const void* a = nullptr;
  const void* b = nullptr;
  void* c = nullptr;
  DType dtype = DType::f32;      // of a, b and bias; sums are kept in f32 (f64 for f64)
  DType out = dtype;             // of c: dtype, or f32 for bf16
  int64_t m = 0, n = 0, k = 0;
  bool transpose_a = false;      // a is stored as [k, m]
  bool transpose_b = false;      // b is stored as [n, k]
  int64_t lda = 0, ldb = 0, ldc = 0;  // elements between stored rows; 0: dense
  double beta = 0;
  const void* bias = nullptr;    // [n], added to every row; needs beta 0
  int64_t batch = 1;             // this many products, whose matrices lie `stride` elements apart
  int64_t stride_a = 0, stride_b = 0, stride_c = 0;

  int64_t row_a() const { return lda ? lda : transpose_a ? m : k; }
  int64_t row_b() const { return ldb ? ldb : transpose_b ? k : n; }
  int64_t row_c() const { return ldc ? ldc : n; }
  std::string str() const;  // shapes and types, for messages
};

// Runs on the threads of parallel_for, and in line inside one: BLAS itself is kept to one thread.
void gemm(Cpu, const Gemm& g);

// Throws where g contradicts itself or a size exceeds BLAS's 32 bits.
void check_gemm(const Gemm& g);

}  // namespace weft
