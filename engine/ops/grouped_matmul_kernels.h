// What the kernels of grouped_matmul share: the three products, and which tile of which expert's product a block owns.
// Used by grouped_matmul's files and expert_mlp.cu.
#pragma once
#include "engine/tensor.h"

namespace weft {

// Of each expert e with rows x, dy and matrix w: y = x w^T; dx = dy w; dw = dy^T x.
enum class GroupedProduct : uint8_t { forward, input_gradient, weight_gradient };

// The part of a weight gradient whose squares the warpgroup kernel sums.
constexpr int kSquaredRows = 16, kSquaredColumns = 64;

template <class T>
struct Grouped {
  const T* a;              // x; dy; dy
  const T* b;              // w; w; x
  T* c;                    // y; dx; dw
  const int32_t* offsets;  // [E + 1], where the kernel runs
  int64_t rows, inputs, outputs, experts;
  float* squares = nullptr;  // [E, ceil(outputs / kSquaredRows), ceil(inputs / kSquaredColumns)] or null
};

// Throws where the kernels cannot count the sizes of `rows` rows and w [E, O, I].
void check_grouped_sizes(const char* op, int64_t rows, const Tensor& w);

// c = the product of a and b, which are as in Grouped; sizes are checked by the caller. A weight gradient gets
// Tensor::squares where the warpgroup kernel writes it.
void multiply_grouped(GroupedProduct product, const Tensor& a, const Tensor& b, Tensor& c, const Tensor& offsets);

// The kernels of sm_90a and of sm_80; false where the GPU, the sizes or the addresses do not suit them.
bool grouped_matmul_warpgroup(GroupedProduct product, const Grouped<bf16>& g);
bool grouped_matmul_mma(GroupedProduct product, const Grouped<bf16>& g);

#ifdef __CUDACC__
// One block's tile of C = A B, all pointers at its corner.
template <class T>
struct GroupedTile {
  const T *a, *b;
  T* c;
  int64_t lda, ldb, ldc;
  int m, n, k;  // rows and columns of C that are left from the corner; terms of its sums
};

// How the product stores its operands: A as [m, k] or [k, m], B as [n, k] or [k, n].
template <GroupedProduct kProduct>
struct GroupedLayout {
  static constexpr bool a_rows_are_k = kProduct == GroupedProduct::weight_gradient;
  static constexpr bool b_rows_are_k = kProduct != GroupedProduct::forward;
};

inline int64_t grouped_column_tiles(GroupedProduct product, int64_t inputs, int64_t outputs, int tile) {
  return ((product == GroupedProduct::forward ? outputs : inputs) + tile - 1) / tile;
}

// Blocks for tiles of tile_m x tile_n. The lengths of the experts are only known on the device: for the products whose
// rows are tokens this is the most it can take, and the blocks past the last tile leave.
inline int64_t grouped_blocks(GroupedProduct product, int64_t rows, int64_t inputs, int64_t outputs, int64_t experts,
                              int tile_m, int tile_n) {
  const int64_t columns = grouped_column_tiles(product, inputs, outputs, tile_n);
  if (product == GroupedProduct::weight_gradient) return experts * ((outputs + tile_m - 1) / tile_m) * columns;
  return rows == 0 ? 0 : (rows / tile_m + experts) * columns;
}

// Finds the tile of this block; column tiles of one row tile are neighbours, so that they share rows in the L2 cache.
template <GroupedProduct kProduct, int kTileM, int kTileN, class T>
__device__ bool find_tile(const Grouped<T>& g, GroupedTile<T>& t) {
  const int inputs = static_cast<int>(g.inputs), outputs = static_cast<int>(g.outputs);
  const int width = kProduct == GroupedProduct::forward ? outputs : inputs, columns = (width + kTileN - 1) / kTileN;
  const int column = static_cast<int>(blockIdx.x) % columns * kTileN;
  int tile = static_cast<int>(blockIdx.x) / columns;
  t.n = width - column;
  if constexpr (kProduct == GroupedProduct::weight_gradient) {
    const int tiles = (outputs + kTileM - 1) / kTileM, row = tile % tiles * kTileM;
    const int64_t expert = tile / tiles, first = g.offsets[expert];
    t.m = outputs - row;
    t.k = g.offsets[expert + 1] - static_cast<int>(first);
    t.lda = outputs, t.ldb = inputs, t.ldc = inputs;
    t.a = g.a + first * outputs + row;
    t.b = g.b + first * inputs + column;
    t.c = g.c + (expert * outputs + row) * inputs + column;
    return true;
  } else {
    int first = g.offsets[0];
    for (int64_t expert = 0; expert < g.experts; ++expert) {
      const int end = g.offsets[expert + 1], tiles = (end - first + kTileM - 1) / kTileM;
      if (tile < tiles) {
        const int64_t row = first + tile * kTileM;
        t.m = end - static_cast<int>(row);
        t.k = kProduct == GroupedProduct::forward ? inputs : outputs;
        t.lda = t.k, t.ldb = inputs, t.ldc = width;
        t.a = g.a + row * t.k;
        t.b = g.b + expert * outputs * inputs + column * (kProduct == GroupedProduct::forward ? t.ldb : 1);
        t.c = g.c + row * width + column;
        return true;
      }
      tile -= tiles;
      first = end;
    }
    return false;
  }
}
#endif

}  // namespace weft
