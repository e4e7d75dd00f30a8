// grouped_matmul of bf16 on the tensor cores of sm_80 and later: a block of 8 warps computes 128x256 of one expert's
// product, 64x64 a warp, from tiles 64 deep that are copied to shared memory ahead. One kernel serves the three
// products: an operand whose stored rows run along the sums is read transposed. Rows of an expert start anywhere; what
// lies past its last row is filled with zeros.
#if WEFT_CUDA
#include "engine/cuda/stream.h"
#include "engine/cuda/tensor_core.h"
#include "engine/ops/grouped_matmul_kernels.h"

namespace weft {
namespace {

constexpr int kTileM = 128, kTileN = 256, kDepth = 64, kStages = 4, kThreads = 256;
constexpr int kStageElements = (kTileM + kTileN) * kDepth;
constexpr size_t kSharedBytes = kStages * kStageElements * sizeof(bf16);
constexpr int kWarpRows = 64, kWarpColumns = 64;  // of C, a warp
constexpr int kWarpsAcross = kTileN / kWarpColumns;
constexpr int kOutStride = kWarpColumns + 8;  // of the finished tile of a warp: 16 bytes longer, so that banks differ
static_assert(kSharedBytes >= kThreads / 32 * kWarpRows * kOutStride * sizeof(bf16));
using Sums = float[kWarpRows / 16][kWarpColumns / 8][4];  // [16 rows, 8 columns] each, as multiply_add has them

extern __shared__ __align__(1024) uint4 shared_stages[];

// One operand's tile of shared memory: kSize along m or n, kDepth along the sums, in rows of 64 elements. Rows are
// along m or n, or along the sums and then 64 of m or n wide, the next 64 after them. The row's number permutes its
// pieces of 16 bytes, so that 8 rows of one column of pieces touch all banks once.
template <int kSize, bool kRowsAreDepth>
struct Operand {
  static constexpr int pieces = (kRowsAreDepth ? kSize : kDepth) / 8;  // of a stored row
  static constexpr int row_step = kThreads / pieces;                   // between the rows that a thread copies
  static constexpr int copies = kSize * kDepth / 8 / kThreads;
  static_assert(row_step % 8 == 0 && kDepth == 64);

  __device__ static int position(int row, int piece) {
    return (piece / 8 * kDepth + row) * 64 + (piece % 8 ^ row % 8) * 8;
  }

  // What this thread copies of each tile.
  const bf16* from;
  int64_t stride;
  int to, row, column, left;
  __device__ Operand(const bf16* corner, int64_t ld, int size_left) : stride(ld), left(size_left) {
    row = threadIdx.x / pieces;
    column = threadIdx.x % pieces * 8;
    from = corner + row * ld + column;
    to = position(row, threadIdx.x % pieces);
  }
  // Starts the copy of the tile at depth k of `depth` in all.
  __device__ void copy(bf16* tile, int k, int depth) const {
    const bf16 *const safe = from - row * stride - column, *const source = from + (kRowsAreDepth ? k * stride : k);
    const int rows = kRowsAreDepth ? depth - k : left, columns = kRowsAreDepth ? left : depth - k;
#pragma unroll
    for (int i = 0; i < copies; ++i) {
      const bool inside = row + i * row_step < rows && column < columns;
      copy_16_bytes(tile + to + i * row_step * 64, inside ? source + i * row_step * stride : safe, inside);
    }
  }

  // 16 along m (n) from x, 16 of the sums from k, as a left (right) operand of multiply_add.
  __device__ static Quad left_quad(const bf16* tile, int x, int k) {
    const int lane = threadIdx.x % 32, i = lane / 8;
    if constexpr (kRowsAreDepth)
      return load_quad_transposed(tile + position(k + i / 2 * 8 + lane % 8, x / 8 + i % 2));
    else
      return load_quad(tile + position(x + i % 2 * 8 + lane % 8, k / 8 + i / 2));
  }
  __device__ static Quad right_quad(const bf16* tile, int x, int k) {
    const int lane = threadIdx.x % 32, i = lane / 8;
    if constexpr (kRowsAreDepth)
      return load_quad_transposed(tile + position(k + i % 2 * 8 + lane % 8, x / 8 + i / 2));
    else
      return load_quad(tile + position(x + i / 2 * 8 + lane % 8, k / 8 + i % 2));
  }
};

// sums += a tile of A times a tile of B, by this warp alone.
template <class A, class B>
__device__ void multiply_tile(Sums& sums, const bf16* a_tile, const bf16* b_tile, int row, int column) {
  Quad left[2][4], right[2][4];  // one step ahead
  const auto load = [&](int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      left[step % 2][i] = A::left_quad(a_tile, row + 16 * i, 16 * step);
      right[step % 2][i] = B::right_quad(b_tile, column + 16 * i, 16 * step);
    }
  };
  load(0);
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    if (step + 1 < kDepth / 16) load(step + 1);
#pragma unroll
    for (int i = 0; i < kWarpRows / 16; ++i)
#pragma unroll
      for (int j = 0; j < kWarpColumns / 8; ++j)
        multiply_add(sums[i][j], left[step % 2][i], right[step % 2][j / 2].r[j % 2 * 2],
                     right[step % 2][j / 2].r[j % 2 * 2 + 1]);
  }
}

template <GroupedProduct kProduct>
__global__ void __launch_bounds__(kThreads, 1) grouped_matmul_kernel(Grouped<bf16> g) {
  using Layout = GroupedLayout<kProduct>;
  using A = Operand<kTileM, Layout::a_rows_are_k>;
  using B = Operand<kTileN, Layout::b_rows_are_k>;
  GroupedTile<bf16> t;
  if (!find_tile<kProduct, kTileM, kTileN>(g, t)) return;
  bf16* const stages = reinterpret_cast<bf16*>(shared_stages);
  const A a(t.a, t.lda, t.m);
  const B b(t.b, t.ldb, t.n);
  const int tiles = (t.k + kDepth - 1) / kDepth, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp / kWarpsAcross * kWarpRows, warp_column = warp % kWarpsAcross * kWarpColumns;
  const auto copy = [&](int tile) {
    bf16* const stage = stages + tile % kStages * kStageElements;
    if (tile < tiles) {
      a.copy(stage, tile * kDepth, t.k);
      b.copy(stage + kTileM * kDepth, tile * kDepth, t.k);
    }
    close_copies();
  };
  constexpr int kAhead = kStages - 1;
#pragma unroll
  for (int tile = 0; tile < kAhead; ++tile) copy(tile);

  Sums sums = {};
  for (int tile = 0; tile < tiles; ++tile) {
    wait_copies<kAhead - 1>();
    __syncthreads();
    const bf16* const a_tile = stages + tile % kStages * kStageElements;
    const bf16* const b_tile = a_tile + kTileM * kDepth;
    copy(tile + kAhead);
    multiply_tile<A, B>(sums, a_tile, b_tile, warp_row, warp_column);
  }

  // Through shared memory, so that rows are written in pieces of at least 128 bytes.
  wait_copies<0>();
  __syncthreads();
  bf16* const out = stages + warp * kWarpRows * kOutStride;
#pragma unroll
  for (int i = 0; i < kWarpRows / 16; ++i)
#pragma unroll
    for (int j = 0; j < kWarpColumns / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint32_t*>(out + (16 * i + 8 * half + lane / 4) * kOutStride + 8 * j + lane % 4 * 2) =
            pack(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
  __syncwarp();
  constexpr int kLanes = kWarpColumns / 8, kRows = 32 / kLanes;  // lanes on a row; rows at a time
  const int column = lane % kLanes * 8;
  if (warp_column + column >= t.n) return;
#pragma unroll 4
  for (int row = lane / kLanes; row < kWarpRows; row += kRows)
    if (warp_row + row < t.m)
      *reinterpret_cast<uint4*>(t.c + (warp_row + row) * t.ldc + warp_column + column) =
          *reinterpret_cast<const uint4*>(out + row * kOutStride + column);
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

bool enough_shared_memory() {
  static const bool enough = [] {
    int device = 0, bytes = 0;
    cuda_check(cudaGetDevice(&device), "cudaGetDevice");
    cuda_check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "cudaDeviceGetAttribute");
    return static_cast<size_t>(bytes) >= kSharedBytes;
  }();
  return enough;
}

}  // namespace

bool grouped_matmul_mma(GroupedProduct product, const Grouped<bf16>& g) {
  if (g.inputs % 8 || g.outputs % 8 || !aligned(g.a) || !aligned(g.b) || !aligned(g.c) || !enough_shared_memory())
    return false;
  const int64_t blocks = grouped_blocks(product, g.rows, g.inputs, g.outputs, g.experts, kTileM, kTileN);
  using Product = GroupedProduct;
  const auto kernel = product == Product::forward          ? grouped_matmul_kernel<Product::forward>
                      : product == Product::input_gradient ? grouped_matmul_kernel<Product::input_gradient>
                                                           : grouped_matmul_kernel<Product::weight_gradient>;
  launch_blocks(kernel, static_cast<unsigned>(blocks), kThreads, kSharedBytes, g);
  return true;
}

}  // namespace weft
#endif
