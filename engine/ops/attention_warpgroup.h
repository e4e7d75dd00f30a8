// What the warpgroup kernels of attention share: attention_warpgroup.cu, forward, and attention_warpgroup_backward.cu.
#pragma once
#include "engine/cuda/stream.h"
#include "engine/cuda/vector.h"
#include "engine/cuda/warpgroup.h"
#include "engine/ops/attention_kernels.h"

namespace weft {

constexpr int kRows = 64, kThreads = 128;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

extern __shared__ __align__(1024) bf16 shared_panels[];

// A tile [rows, width] lies in panels of 64 columns, each laid out for warpgroup_tile. Lane: the thread in its warp and
// where its pieces of 16 bytes begin in a panel: 8 threads a row, 16 rows a pass.
struct Lane {
  int warp, g, c, row, column, piece;
  __device__ Lane()
      : warp(threadIdx.x / 32), g(threadIdx.x % 32 / 4), c(threadIdx.x % 4), row(threadIdx.x / 8),
        column(threadIdx.x % 8 * 8), piece(row * 64 + (threadIdx.x % 8 ^ row % 8) * 8) {}
  // Its piece of the first 16 rows.
  __device__ const bf16* of(const bf16* rows, int64_t stride) const { return rows + row * stride + column; }
};

// Starts the copy of kCount rows of kWidth columns; zeros past `rows` and `width`. `from`: this lane's piece of row 0.
template <int kCount, int kWidth>
__device__ void copy_tile(bf16* tile, const bf16* from, int64_t stride, int rows, int width, const Lane& lane) {
#pragma unroll
  for (int i = 0; i < kCount / 16; ++i)
#pragma unroll
    for (int panel = 0; panel < kWidth / 64; ++panel)
      copy_16_bytes(tile + panel * kCount * 64 + 16 * 64 * i + lane.piece, from + 16 * i * stride + 64 * panel,
                    lane.row + 16 * i < rows && 64 * panel + lane.column < width);
}

// The tile so many elements further on.
__device__ inline uint64_t further(uint64_t tile, int elements) {
  return (tile & ~uint64_t{0xffffffffu}) | (static_cast<uint32_t>(tile) + static_cast<uint32_t>(elements) / 8);
}

// products[64, kColumns] = rows of a times rows of b, both kWidth wide: only started.
template <int kColumns, int kWidth>
__device__ void start_products(float (&products)[kColumns / 8][4], const bf16* a, const bf16* b) {
  const uint64_t left = warpgroup_tile(a), right = warpgroup_tile(b);
#pragma unroll
  for (int d = 0; d < kWidth; d += 16)
    multiply_rows(products, further(left, d / 64 * kRows * 64 + d % 64),
                  further(right, d / 64 * kColumns * 64 + d % 64), d > 0);
}

// sums[64, kWidth] += weights[64, kColumns] tile[kColumns, kWidth]: only started.
template <int kColumns, int kWidth>
__device__ void start_sums(float (&sums)[kWidth / 64][8][4], const Quad (&weights)[kColumns / 16], const bf16* tile) {
  const uint64_t right = warpgroup_tile(tile);
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k)
#pragma unroll
    for (int panel = 0; panel < kWidth / 64; ++panel)
      multiply_sums(sums[panel], weights[k], further(right, panel * kColumns * 64 + k * 16 * 64));
}

template <int kPanels>
__device__ void settle_panels(float (&sums)[kPanels][8][4]) {
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) settle(sums[panel]);
}

// Sums as a left operand.
template <int kTiles>
__device__ void round_sums(Quad (&rounded)[kTiles / 2], const float (&x)[kTiles][4]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    rounded[j / 2].r[j % 2 * 2] = pack(x[j][0], x[j][1]);
    rounded[j / 2].r[j % 2 * 2 + 1] = pack(x[j][2], x[j][3]);
  }
}

// Writes factor[row half] * sums to rows from `first` of a tensor, as far as it has rows and columns, through this
// warp's rows of `panels`.
template <int kPanels>
__device__ void store_rows(bf16* to, int64_t stride, int first, int rows, int width,
                           const float (&sums)[kPanels][8][4], const float (&factor)[2], bf16* panels,
                           const Lane& lane) {
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint32_t*>(panels + panel * kRows * 64 + (16 * lane.warp + lane.g + 8 * half) * 64 +
                                     (j ^ lane.g) * 8 + 2 * lane.c) =
            pack(factor[half] * sums[panel][j][2 * half], factor[half] * sums[panel][j][2 * half + 1]);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = threadIdx.x % 32 / 8 + 4 * i, row = 16 * lane.warp + r;
    if (first + row >= rows) continue;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      if (64 * panel + lane.column < width)
        *reinterpret_cast<uint4*>(to + (first + row) * stride + 64 * panel + lane.column) =
            *reinterpret_cast<const uint4*>(panels + panel * kRows * 64 + row * 64 + (threadIdx.x % 8 ^ r % 8) * 8);
  }
}

template <int kDk, int kDv>
struct Widths {
  static constexpr int key = kDk, value = kDv;
  static constexpr bool wide = kDk + kDv > 128;
  // Rows of the other side that are copied at once, and blocks that share a multiprocessor: the best measured.
  static constexpr int forward_step = 64, forward_blocks = wide ? 2 : 4;
  static constexpr int keys_step = 64, keys_blocks = wide ? 2 : 3;
  static constexpr int product_stages = 3, product_blocks = wide ? 3 : 4;
  static constexpr size_t forward_bytes = sizeof(bf16) * (kRows * kDk + 2 * forward_step * (kDk + kDv));
  static constexpr size_t keys_bytes =
      sizeof(bf16) * (kRows * (kDk + kDv) + keys_step * (kDk + 2 * kDv)) + sizeof(float) * 2 * 4 * keys_step;
  static constexpr size_t product_bytes = sizeof(bf16) * product_stages * kRows * (kRows + kDk);
};

// Whether the GPU runs code that the compiler made with warpgroups.
bool has_warpgroups();

// Calls run<Widths>() with the smallest instantiation that holds both widths; false where none does.
template <class F>
bool with_widths(const AttentionSize& a, F&& run) {
  const int key = a.key_width, value = a.value_width;
  if (!has_warpgroups() || a.scale <= 0 || !whole_packs(a)) return false;
  if (key <= 64 && value <= 64) return run.template operator()<Widths<64, 64>>(), true;
  if (key <= 128 && value <= 192) return run.template operator()<Widths<128, 192>>(), true;
  return false;
}

}  // namespace weft
