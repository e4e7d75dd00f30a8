// y = x w[e]^T for the rows of each expert e; dx = dy w[e]; dw[e] = dy^T x over those rows, zero where there are none.
#include <algorithm>

#include "engine/allocator.h"
#include "engine/cpu/gemm.h"
#include "engine/ops/grouped_matmul_kernels.h"
#include "engine/ops/routing.h"
#if WEFT_CUDA
#include "engine/cuda/stream.h"
#endif

namespace weft {
namespace {

using Product = GroupedProduct;

// Whether g.squares were written.
template <class T>
bool multiply(Cpu, Product product, const Grouped<T>& g) {
  for (int64_t e = 0; e < g.experts; ++e) {
    const int64_t first = g.offsets[e], rows = g.offsets[e + 1] - first, matrix = e * g.outputs * g.inputs;
    constexpr DType kType = dtype_of<T>;
    if (product == Product::weight_gradient)
      gemm(Cpu{}, {.a = g.a + first * g.outputs, .b = g.b + first * g.inputs, .c = g.c + matrix, .dtype = kType,
                   .m = g.outputs, .n = g.inputs, .k = rows, .transpose_a = true});
    else if (rows == 0)
      continue;
    else if (product == Product::forward)
      gemm(Cpu{}, {.a = g.a + first * g.inputs, .b = g.b + matrix, .c = g.c + first * g.outputs, .dtype = kType,
                   .m = rows, .n = g.outputs, .k = g.inputs, .transpose_b = true});
    else
      gemm(Cpu{}, {.a = g.a + first * g.outputs, .b = g.b + matrix, .c = g.c + first * g.inputs, .dtype = kType,
                   .m = rows, .n = g.inputs, .k = g.outputs});
  }
  return false;
}

#if WEFT_CUDA
constexpr int kTile = 128, kDepth = 8, kThreads = 256, kLoads = kTile * kDepth / kThreads;
constexpr int kStride = kTile + 4;  // of a row of shared memory: its 16-byte columns stay aligned

// Loads this thread's elements of a [kTile, kDepth] tile of A or B: neighbours along the stored row.
template <bool kRowsAreDepth, class T>
__device__ void load(float (&values)[kLoads], const T* from, int64_t stride, int left, int depth) {
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int at = threadIdx.x + i * kThreads;
    const int x = kRowsAreDepth ? at % kTile : at / kDepth, k = kRowsAreDepth ? at / kTile : at % kDepth;
    const bool inside = x < left && k < depth;
    values[i] = inside ? float(from[kRowsAreDepth ? k * stride + x : x * stride + k]) : 0.0f;
  }
}
template <bool kRowsAreDepth>
__device__ void store(float (*to)[kStride], const float (&values)[kLoads]) {
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int at = threadIdx.x + i * kThreads;
    const int x = kRowsAreDepth ? at % kTile : at / kDepth, k = kRowsAreDepth ? at / kTile : at % kDepth;
    to[k][x] = values[i];
  }
}

// A block computes 128x128 of C, each thread 2x2 pieces of 4x4, 64 apart so that a warp reads neighbouring addresses.
template <Product kProduct, class T>
__global__ void __launch_bounds__(kThreads, 2) grouped_matmul_simt(Grouped<T> g) {
  using Layout = GroupedLayout<kProduct>;
  __shared__ __align__(16) float a[kDepth][kStride], b[kDepth][kStride];
  GroupedTile<T> t;
  if (!find_tile<kProduct, kTile, kTile>(g, t)) return;
  const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
  float sums[8][8] = {}, next_a[kLoads], next_b[kLoads];
  load<Layout::a_rows_are_k>(next_a, t.a, t.lda, t.m, t.k);
  load<Layout::b_rows_are_k>(next_b, t.b, t.ldb, t.n, t.k);
  for (int k = 0; k < t.k; k += kDepth) {
    store<Layout::a_rows_are_k>(a, next_a);
    store<Layout::b_rows_are_k>(b, next_b);
    __syncthreads();
    if (const int next = k + kDepth; next < t.k) {
      load<Layout::a_rows_are_k>(next_a, t.a + (Layout::a_rows_are_k ? next * t.lda : next), t.lda, t.m, t.k - next);
      load<Layout::b_rows_are_k>(next_b, t.b + (Layout::b_rows_are_k ? next * t.ldb : next), t.ldb, t.n, t.k - next);
    }
#pragma unroll 2  // more would spill: two blocks share the registers
    for (int d = 0; d < kDepth; ++d) {
      float as[8], bs[8];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 x = *reinterpret_cast<const float4*>(&a[d][row + 64 * half]);
        const float4 y = *reinterpret_cast<const float4*>(&b[d][column + 64 * half]);
        as[4 * half] = x.x, as[4 * half + 1] = x.y, as[4 * half + 2] = x.z, as[4 * half + 3] = x.w;
        bs[4 * half] = y.x, bs[4 * half + 1] = y.y, bs[4 * half + 2] = y.z, bs[4 * half + 3] = y.w;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[i][j] += as[i] * bs[j];
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int m = row + i % 4 + i / 4 * 64;
    if (m >= t.m) continue;
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (const int n = column + j % 4 + j / 4 * 64; n < t.n) t.c[m * t.ldc + n] = T(sums[i][j]);
  }
}

template <class T>
bool multiply(Cuda, Product product, const Grouped<T>& g) {
  if constexpr (std::is_same_v<T, bf16>) {
    if (grouped_matmul_warpgroup(product, g)) return g.squares != nullptr;
    if (grouped_matmul_mma(product, g)) return false;
  }
  const int64_t blocks = grouped_blocks(product, g.rows, g.inputs, g.outputs, g.experts, kTile, kTile);
  const auto kernel = product == Product::forward          ? grouped_matmul_simt<Product::forward, T>
                      : product == Product::input_gradient ? grouped_matmul_simt<Product::input_gradient, T>
                                                           : grouped_matmul_simt<Product::weight_gradient, T>;
  launch_blocks(kernel, static_cast<unsigned>(blocks), kThreads, 0, g);
  return false;
}
#endif

}  // namespace

void check_grouped_sizes(const char* op, int64_t rows, const Tensor& w) {
  check(w.size(1) > 0 && w.size(2) > 0 && std::max({rows, w.size(1), w.size(2)}) < (int64_t{1} << 30),
        "{} of {} rows by w {}: w's rows and columns must be at least 1, and all sizes less than 2^30", op, rows,
        w.shape().str());
}

void multiply_grouped(GroupedProduct product, const Tensor& a, const Tensor& b, Tensor& c, const Tensor& offsets) {
  const Tensor& inputs = product == Product::forward ? a : product == Product::input_gradient ? c : b;
  const Tensor& outputs = product == Product::forward ? c : a;
  Tensor squares;
  if (product == Product::weight_gradient && c.device() == Device::cuda && c.dtype() == DType::bf16) {
    const MemoryScope memory(Category::gradient);
    squares = Tensor::empty({c.size(0), (c.size(1) + kSquaredRows - 1) / kSquaredRows,
                             (c.size(2) + kSquaredColumns - 1) / kSquaredColumns},
                            DType::f32, c.device());
  }
  on_device(a.device(), [&](auto device) {
    dispatch(device, a.dtype(), [&]<class T>() {
      const bool squared = multiply(
          device, product,
          Grouped<T>{.a = a.data<T>(), .b = b.data<T>(), .c = c.data<T>(), .offsets = offsets.data<int32_t>(),
                     .rows = a.size(0), .inputs = inputs.size(1), .outputs = outputs.size(1),
                     .experts = offsets.numel() - 1, .squares = squares.data<float>()});
      c.set_squares(squared ? squares : Tensor{});  // not those of what was there before
    });
  });
}

Tensor grouped_matmul(const Tensor& x, const Tensor& w, const Routing& r) {
  const RoutingSize s = size_of_routing("grouped_matmul", x, r);
  const int64_t rows = s.tokens * s.chosen;
  check(x.rank() == 2 && x.size(0) == rows && w.rank() == 3 && w.size(0) == s.experts && w.size(2) == x.size(1) &&
            w.dtype() == x.dtype() && w.device() == x.device(),
        "grouped_matmul needs x [{}, I] and w [{}, O, I] of one dtype on one device, found x {} of {}, w {} of {}",
        rows, s.experts, x.shape().str(), name_of(x.dtype()), w.shape().str(), name_of(w.dtype()));
  check_grouped_sizes("grouped_matmul", rows, w);
  Tensor y = Tensor::like(x, {rows, w.size(1)});
  multiply_grouped(Product::forward, x, w, y, r.offsets);
  return record("grouped_matmul", y, {x, w},
                [x = x.detached(), w = w.detached(), offsets = r.offsets,
                 for_x = x.needs_grad(), for_w = w.needs_grad()](const Tensor& dy) -> Gradients {
                  Gradients gradients(2);
                  if (for_x) {
                    gradients[0] = Tensor::like(x);
                    multiply_grouped(Product::input_gradient, dy, w, gradients[0], offsets);
                  }
                  if (for_w) {
                    gradients[1] = Tensor::like(w);
                    multiply_grouped(Product::weight_gradient, dy, x, gradients[1], offsets);
                  }
                  return gradients;
                });
}

}  // namespace weft
