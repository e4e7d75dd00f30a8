#include "engine/cpu/gemm.h"

#include <cblas.h>

#include <algorithm>
#include <climits>
#include <vector>

#include "engine/cpu/parallel.h"

// OpenBLAS has threads of its own; parallel_for's are used instead. Another BLAS has no such function.
extern "C" void openblas_set_num_threads(int) __attribute__((weak));

namespace weft {
namespace {

// One product on this thread.
void blas(const Gemm& g, const float* a, const float* b, float* c) {
  cblas_sgemm(CblasRowMajor, g.transpose_a ? CblasTrans : CblasNoTrans, g.transpose_b ? CblasTrans : CblasNoTrans,
              static_cast<int>(g.m), static_cast<int>(g.n), static_cast<int>(g.k), 1.0f, a, static_cast<int>(g.row_a()),
              b, static_cast<int>(g.row_b()), static_cast<float>(g.beta), c, static_cast<int>(g.row_c()));
}
void blas(const Gemm& g, const double* a, const double* b, double* c) {
  cblas_dgemm(CblasRowMajor, g.transpose_a ? CblasTrans : CblasNoTrans, g.transpose_b ? CblasTrans : CblasNoTrans,
              static_cast<int>(g.m), static_cast<int>(g.n), static_cast<int>(g.k), 1.0, a, static_cast<int>(g.row_a()),
              b, static_cast<int>(g.row_b()), g.beta, c, static_cast<int>(g.row_c()));
}

// A block of rows (or columns) of C on this thread, bias included.
template <class T>
void block(Gemm g, const T* a, const T* b, T* c, const T* bias) {
  if (bias) {
    for (int64_t i = 0; i < g.m; ++i) std::copy_n(bias, g.n, c + i * g.row_c());
    g.beta = 1;
  } else if (g.k == 0 && g.beta == 0) {
    for (int64_t i = 0; i < g.m; ++i) std::fill_n(c + i * g.row_c(), g.n, T(0));
  }
  if (g.k > 0) blas(g, a, b, c);
}

// Stored rows of bf16 as dense f32.
void widen(const bf16* from, int64_t rows, int64_t columns, int64_t pitch, std::vector<float>& to) {
  to.resize(static_cast<size_t>(rows * columns));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < columns; ++i) to[static_cast<size_t>(r * columns + i)] = from[r * pitch + i];
}

// bf16 is widened block by block, so that the copies stay small next to the matrices.
template <class Out>
void block_bf16(const Gemm& g, const bf16* a, const bf16* b, Out* c, const bf16* bias) {
  constexpr int64_t kElements = 1 << 20;
  const int64_t step = std::clamp<int64_t>(kElements / std::max<int64_t>(g.k, 1), 32, 4096);
  thread_local std::vector<float> wide_a, wide_b, wide_c;
  for (int64_t i = 0; i < g.m; i += step) {
    const int64_t m = std::min(step, g.m - i);
    if (g.transpose_a) widen(a + i, g.k, m, g.row_a(), wide_a);
    else widen(a + i * g.row_a(), m, g.k, g.row_a(), wide_a);
    for (int64_t j = 0; j < g.n; j += step) {
      const int64_t n = std::min(step, g.n - j);
      if (g.transpose_b) widen(b + j * g.row_b(), n, g.k, g.row_b(), wide_b);
      else widen(b + j, g.k, n, g.row_b(), wide_b);
      wide_c.assign(static_cast<size_t>(m * n), 0.0f);
      if (g.k > 0)
        blas({.m = m, .n = n, .k = g.k, .transpose_a = g.transpose_a, .transpose_b = g.transpose_b}, wide_a.data(),
             wide_b.data(), wide_c.data());
      for (int64_t r = 0; r < m; ++r)
        for (int64_t q = 0; q < n; ++q) {
          Out& to = c[(i + r) * g.row_c() + j + q];
          float value = wide_c[static_cast<size_t>(r * n + q)];
          if (bias) value += bias[j + q];
          if (g.beta != 0) value += static_cast<float>(g.beta) * to;
          to = Out(value);
        }
    }
  }
}

template <class T, class Out>
void run(const Gemm& g) {
  // Threads divide the batch, or else the longer side of C in multiples of 16.
  const bool by_rows = g.m >= g.n;
  const int64_t side = by_rows ? g.m : g.n;
  const double work = static_cast<double>(g.m) * static_cast<double>(g.n) * static_cast<double>(g.k);
  int64_t parts = g.batch >= cpu_threads() || work < 1e5 ? 1 : std::min<int64_t>(cpu_threads(), (side + 15) / 16);
  const int64_t step = ((side + parts - 1) / parts + 15) / 16 * 16;
  parts = (side + step - 1) / step;
  const int64_t grain = work * static_cast<double>(g.batch) < 1e5 ? g.batch * parts : 1;
  parallel_for(g.batch * parts, grain, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t matrix = task / parts, from = task % parts * step, size = std::min(step, side - from);
      const T* a = static_cast<const T*>(g.a) + matrix * g.stride_a;
      const T* b = static_cast<const T*>(g.b) + matrix * g.stride_b;
      Out* c = static_cast<Out*>(g.c) + matrix * g.stride_c;
      const T* bias = static_cast<const T*>(g.bias);
      Gemm part = g;
      part.lda = g.row_a(), part.ldb = g.row_b(), part.ldc = g.row_c();
      if (by_rows) {
        part.m = size;
        a += from * (g.transpose_a ? 1 : part.lda);
        c += from * part.ldc;
      } else {
        part.n = size;
        b += from * (g.transpose_b ? part.ldb : 1);
        c += from;
        if (bias) bias += from;
      }
      if constexpr (std::is_same_v<T, bf16>) block_bf16(part, a, b, c, bias);
      else block(part, a, b, c, bias);
    }
  });
}

}  // namespace

std::string Gemm::str() const {
  return fmt::format("[{}, {}]{} x [{}, {}]{} in {} to {}, batch {}, rows of {}, {} and {}", m, k,
                     transpose_a ? " (transposed)" : "", k, n, transpose_b ? " (transposed)" : "", name_of(dtype),
                     name_of(out), batch, row_a(), row_b(), row_c());
}

void check_gemm(const Gemm& g) {
  const bool types_agree = g.out == g.dtype || (g.dtype == DType::bf16 && g.out == DType::f32);
  check(g.m >= 0 && g.n >= 0 && g.k >= 0 && g.batch >= 0 && types_agree && (!g.bias || g.beta == 0),
        "a product that contradicts itself: {}", g.str());
  check(std::max({g.m, g.n, g.k, g.batch, g.row_a(), g.row_b(), g.row_c()}) <= INT_MAX,
        "a product is too large for BLAS: {}", g.str());
}

void gemm(Cpu, const Gemm& g) {
  check_gemm(g);
  if (g.m == 0 || g.n == 0 || g.batch == 0) return;
  static const bool single = [] {
    if (openblas_set_num_threads) openblas_set_num_threads(1);
    return true;
  }();
  static_cast<void>(single);
  switch (g.dtype) {
    case DType::f32: return run<float, float>(g);
    case DType::f64: return run<double, double>(g);
    case DType::bf16: return g.out == DType::f32 ? run<bf16, float>(g) : run<bf16, bf16>(g);
    default: check(false, "a product of {}", name_of(g.dtype));
  }
}

}  // namespace weft
