// grouped_matmul of bf16 on sm_90a. A block stays on its multiprocessor and walks tiles of 128 x 256: one thread
// copies what they need into a ring of stages, two warpgroups multiply 64 rows each from there, and a warp for each
// writes its finished sums while the next tile is multiplied. Rows of an expert start anywhere: a tile's copies go
// past its last row, and only its own rows are written. At 16384 rows, 8 experts, 768 and 3072 columns, on an H200
// at its power limit, the six products of a layer take 710 us in the steps of exp1; where each warpgroup wrote its
// own sums, 735. Alone, in one run, the latter took 810, cuBLAS's products of equal experts 755, and with nothing
// written 735. Lost: pairs of blocks that share their copies (15% fewer bytes from L2, and no fewer cycles), and
// experts' activation before the write (183 us forward where the two passes took 194, and 250 us back where they
// took 234).
#if WEFT_CUDA
#include "engine/cuda/tensor_copy.h"
#include "engine/cuda/warpgroup.h"
#include "engine/ops/grouped_matmul_kernels.h"

namespace weft {
namespace {

struct Sizes {
  const int32_t* offsets;  // [E + 1], on the device
  int inputs, outputs, experts;
  float* squares;  // as in Grouped
};

constexpr int kTileM = 128, kTileN = 256, kDepth = kBoxSide, kStages = 3, kThreads = 384;
constexpr int kStageElements = (kTileM + kTileN) * kDepth;
// Finished sums on their way out: pieces of 64 rows and 128 columns, whose rows begin in different banks.
constexpr int kPieces = 2, kPieceColumns = 128, kPieceStride = kPieceColumns + 8, kPieceElements = 64 * kPieceStride;
constexpr size_t kSharedBytes = (kStages * kStageElements + 2 * kPieces * kPieceElements) * sizeof(bf16) + 1024;

struct Tile {
  int expert, first;  // row of the expert's segment
  int row, rows;      // of the tile within the expert's C; rows that are left from there
  int column, width;  // 256, or 128 or 64 in the last round
  int depth;          // terms of the sums
};

// The tiles of one block in their order. Where the last round has few tiles they are cut into 2 or 4 narrower ones.
template <GroupedProduct kProduct>
class Walk {
  static constexpr bool kWeight = kProduct == GroupedProduct::weight_gradient;

 public:
  __device__ explicit Walk(const Sizes& g) : g_(g) {
    const int width = kProduct == GroupedProduct::forward ? g.outputs : g.inputs;
    columns_ = (width + kTileN - 1) / kTileN;
    int rows = 0;
    for (int e = 0; e < g.experts; ++e) rows += units(e);
    step_ = static_cast<int>(gridDim.x);
    at_ = static_cast<int>(blockIdx.x);
    const int total = rows * columns_;
    whole_ = total / step_ * step_;
    const int rest = total - whole_;
    parts_ = rest * 4 <= step_ ? 4 : rest * 2 <= step_ ? 2 : 1;
    count_ = whole_ + rest * parts_;
  }
  __device__ bool next(Tile& t) {
    if (at_ >= count_) return false;
    int tile = at_, part = 0;
    t.width = kTileN;
    if (at_ >= whole_) {
      tile = whole_ + (at_ - whole_) / parts_;
      part = (at_ - whole_) % parts_;
      t.width = kTileN / parts_;
    }
    at_ += step_;
    const int unit = tile / columns_;
    t.column = tile % columns_ * kTileN + part * t.width;
    while (unit - passed_ >= units(expert_)) passed_ += units(expert_++);
    t.expert = expert_;
    t.first = g_.offsets[expert_];
    const int segment = g_.offsets[expert_ + 1] - t.first;
    t.row = (unit - passed_) * kTileM;
    t.rows = (kWeight ? g_.outputs : segment) - t.row;
    t.depth = kWeight ? segment : kProduct == GroupedProduct::forward ? g_.inputs : g_.outputs;
    return true;
  }

 private:
  __device__ int units(int expert) const {
    return ((kWeight ? g_.outputs : g_.offsets[expert + 1] - g_.offsets[expert]) + kTileM - 1) / kTileM;
  }
  Sizes g_;
  int columns_, step_, at_, whole_, parts_, count_, expert_ = 0, passed_ = 0;
};

struct Barriers {
  uint64_t full[kStages], empty[kStages];
  uint64_t finished[2][kPieces], written[2][kPieces];  // pieces of each warpgroup
};

// A place in the ring of stages.
struct Place {
  int stage = 0;
  uint32_t parity = 0;
  template <int kCount>
  __device__ void advance() {
    if (++stage == kCount) stage = 0, parity ^= 1;
  }
};

// The copying thread's work.
template <GroupedProduct kProduct>
__device__ void copy_tiles(const CUtensorMap* a_map, const CUtensorMap* b_map, const Sizes& g, bf16* stages,
                           Barriers& barriers) {
  using Layout = GroupedLayout<kProduct>;
  Walk<kProduct> walk(g);
  Place place;
  for (Tile t; walk.next(t);)
    for (int k = 0; k < t.depth; k += kDepth, place.advance<kStages>()) {
      uint64_t* const full = &barriers.full[place.stage];
      bf16 *const a = stages + place.stage * kStageElements, *const b = a + kTileM * kDepth;
      wait_barrier(&barriers.empty[place.stage], place.parity ^ 1);
      expect_bytes(full, (kTileM + t.width) / kBoxSide * kBoxBytes);
#pragma unroll
      for (int i = 0; i < kTileM / kBoxSide; ++i) {
        bf16* const to = a + i * kBoxSide * kDepth;
        if constexpr (Layout::a_rows_are_k)
          copy_box(to, a_map, full, t.row + i * kBoxSide, t.first + k, 0);
        else
          copy_box(to, a_map, full, k, t.first + t.row + i * kBoxSide, 0);
      }
      for (int i = 0; i < t.width / kBoxSide; ++i) {
        bf16* const to = b + i * kBoxSide * kDepth;
        const int along = t.column + i * kBoxSide;
        const bool of_rows = kProduct == GroupedProduct::weight_gradient;
        const int column = Layout::b_rows_are_k ? along : k, matrix = of_rows ? 0 : t.expert;
        const int row = Layout::b_rows_are_k ? (of_rows ? t.first : 0) + k : along;
        copy_box(to, b_map, full, column, row, matrix);
      }
    }
}

// The first kCount of sums become those of this warpgroup's 64 rows of the tile.
template <GroupedProduct kProduct, int kCount>
__device__ void multiply_tile(float (&sums)[32][4], const Tile& t, bf16* stages, Barriers& barriers, Place& place) {
  using Layout = GroupedLayout<kProduct>;
  constexpr int kNextColumns = kDepth * kBoxSide * sizeof(bf16);
  // 16 terms further along the sums: 16 rows of 128 bytes, or 32 bytes; an address counts 16 bytes.
  constexpr uint64_t kNextA = Layout::a_rows_are_k ? 128 : 2, kNextB = Layout::b_rows_are_k ? 128 : 2;
  const int group = static_cast<int>(threadIdx.x) / 128 - 1;
  bf16* const mine = stages + group * kBoxSide * kDepth;
  const uint64_t a_first = warpgroup_tile(mine, Layout::a_rows_are_k ? kNextColumns : 16);
  const uint64_t b_first = warpgroup_tile(stages + kTileM * kDepth, Layout::b_rows_are_k ? kNextColumns : 16);
  const auto leave = [&](int stage) {
    if (threadIdx.x % 32 == 0) arrive(&barriers.empty[stage]);
  };
  int last = 0;
  for (int k = 0; k < t.depth; k += kDepth, place.advance<kStages>()) {
    wait_barrier(&barriers.full[place.stage], place.parity);
    if constexpr (kProduct == GroupedProduct::weight_gradient)
      if (t.depth - k < kDepth) {  // rows of the next expert
        uint4* const rows = reinterpret_cast<uint4*>(mine + place.stage * kStageElements);
        for (int i = (t.depth - k) * 8 + static_cast<int>(threadIdx.x) % 128; i < kDepth * 8; i += 128)
          rows[i] = uint4{0, 0, 0, 0};
        publish_to_warpgroups();
        sync_warpgroup(1 + group);
      }
    constexpr uint64_t kStage = kStageElements * sizeof(bf16) / 16;
    const uint64_t a = a_first + place.stage * kStage, b = b_first + place.stage * kStage;
    open_products();
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step)
      multiply_warpgroup<kCount, Layout::a_rows_are_k, Layout::b_rows_are_k>(sums, a + step * kNextA, b + step * kNextB,
                                                                             k > 0 || step > 0);
    close_products();
    if (k > 0) {
      wait_products<1>();
      leave(last);
    }
    last = place.stage;
  }
  wait_products<0>();
  settle(sums);
  if (t.depth > 0) leave(last);
  if (t.depth == 0)
#pragma unroll
    for (int j = 0; j < kCount; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[j][e] = 0;
}

// Leaves 64 rows of finished sums, kCount of them from kFirst, to the warp that writes them.
template <int kFirst, int kCount>
__device__ void hand_over(const float (&sums)[32][4], bf16* pieces, Barriers& barriers, Place& place) {
  const int group = static_cast<int>(threadIdx.x) / 128 - 1;
  const int warp = static_cast<int>(threadIdx.x) / 32 % 4, lane = threadIdx.x % 32;
  bf16* const to = pieces + place.stage * kPieceElements + (warp * 16 + lane % 16) * kPieceStride + lane / 16 * 8;
  wait_barrier(&barriers.written[group][place.stage], place.parity ^ 1);
#pragma unroll
  for (int j = 0; j < kCount; j += 2) {
    const float(&left)[4] = sums[kFirst + j], (&right)[4] = sums[kFirst + j + 1];
    store_quad(to + j * 8, pack(left[0], left[1]), pack(left[2], left[3]), pack(right[0], right[1]),
               pack(right[2], right[3]));
  }
  __syncwarp();
  if (lane == 0) arrive(&barriers.finished[group][place.stage]);
  place.advance<kPieces>();
}

__device__ float sum_squares(const uint4& eight) {
  float total = 0;
#pragma unroll
  for (const uint32_t two : {eight.x, eight.y, eight.z, eight.w}) {
    const float low = __uint_as_float(two << 16), high = __uint_as_float(two & 0xffff0000u);
    total += low * low + high * high;
  }
  return total;
}

// The work of the warp that writes the tiles of one warpgroup. A weight gradient is squared on the way, for the norm
// that clips gradients; each 64 x 64 of it has a sum of its own, whose order no cut of the last round changes.
template <GroupedProduct kProduct>
__device__ void write_tiles(int group, const Sizes& g, const bf16* pieces, Barriers& barriers, bf16* c) {
  const int lane = threadIdx.x % 32, width = kProduct == GroupedProduct::forward ? g.outputs : g.inputs;
  constexpr bool kWeight = kProduct == GroupedProduct::weight_gradient;
  const bool squared = kWeight && g.squares;
  constexpr int kUnroll = kWeight ? 2 : 4;  // 4 and squares spill
  Walk<kProduct> walk(g);
  Place place;
  for (Tile t; walk.next(t);) {
    const int rows = min(t.rows - group * 64, 64);
    if (rows <= 0) continue;
    const int64_t first = kWeight ? int64_t{t.expert} * g.outputs : t.first;
    for (int done = 0; done < t.width; done += kPieceColumns, place.advance<kPieces>()) {
      const int part = lane % 16 * 8, column = t.column + done + part;
      const bf16* const from = pieces + place.stage * kPieceElements + part;
      bf16* const to = c + (first + t.row + group * 64) * width + column;
      const bool mine = part < t.width && column < width;
      float squares = 0;
      wait_barrier(&barriers.finished[group][place.stage], place.parity);
      if (mine)
#pragma unroll kUnroll
        for (int row = lane / 16; row < rows; row += 2) {
          const uint4 eight = *reinterpret_cast<const uint4*>(from + row * kPieceStride);
          *reinterpret_cast<uint4*>(to + int64_t{row} * width) = eight;
          if (squared) squares += sum_squares(eight);
        }
      __syncwarp();
      if (lane == 0) arrive(&barriers.written[group][place.stage]);
      if constexpr (kWeight) {
#pragma unroll
        for (const int other : {1, 2, 4, 16}) squares += __shfl_xor_sync(~0u, squares, other);
        const int64_t row = int64_t{t.expert} * ((g.outputs + 63) / 64) + t.row / 64 + group;
        if (squared && mine && lane % 8 == 0 && lane < 16) g.squares[row * ((width + 63) / 64) + column / 64] = squares;
      }
    }
  }
}

template <GroupedProduct kProduct, int kCount>
__device__ void compute_tile(float (&sums)[32][4], const Tile& t, bf16* stages, bf16* pieces, Barriers& barriers,
                             Place& place, Place& piece) {
  multiply_tile<kProduct, kCount>(sums, t, stages, barriers, place);
  hand_over<0, kCount < 16 ? kCount : 16>(sums, pieces, barriers, piece);
  if constexpr (kCount > 16) hand_over<16, 16>(sums, pieces, barriers, piece);
}

// The work of a warpgroup that multiplies.
template <GroupedProduct kProduct>
__device__ void multiply_tiles(int group, const Sizes& g, bf16* stages, bf16* pieces, Barriers& barriers) {
  Walk<kProduct> walk(g);
  Place place, piece;
  float sums[32][4] = {};
  Tile t;
  for (bool more = walk.next(t); more;) {
    Tile following = t;  // found before its turn, so that nothing waits for its rows
    const bool again = walk.next(following);
    if (t.rows <= group * 64) {  // none for this warpgroup
      for (int k = 0; k < t.depth; k += kDepth, place.advance<kStages>()) {
        wait_barrier(&barriers.full[place.stage], place.parity);
        if (threadIdx.x % 32 == 0) arrive(&barriers.empty[place.stage]);
      }
    } else if (t.width == 256) {
      compute_tile<kProduct, 32>(sums, t, stages, pieces, barriers, place, piece);
    } else if (t.width == 128) {
      compute_tile<kProduct, 16>(sums, t, stages, pieces, barriers, place, piece);
    } else {
      compute_tile<kProduct, 8>(sums, t, stages, pieces, barriers, place, piece);
    }
    t = following, more = again;
  }
}

template <GroupedProduct kProduct>
__device__ void compute_tiles(const CUtensorMap* a_map, const CUtensorMap* b_map, const Sizes& g, bf16* c) {
  extern __shared__ __align__(1024) uint4 shared_stages[];
  __shared__ Barriers barriers;
  bf16* const stages = reinterpret_cast<bf16*>((reinterpret_cast<uintptr_t>(shared_stages) + 1023) / 1024 * 1024);
  bf16* const pieces = stages + kStages * kStageElements;
  if (threadIdx.x == 0) {
    prefetch_map(a_map);
    prefetch_map(b_map);
    for (int i = 0; i < kStages; ++i) {
      init_barrier(&barriers.full[i], 1);
      init_barrier(&barriers.empty[i], 8);
    }
    for (int i = 0; i < 2 * kPieces; ++i) {
      init_barrier(&barriers.finished[i / kPieces][i % kPieces], 4);
      init_barrier(&barriers.written[i / kPieces][i % kPieces], 1);
    }
    publish_barriers();
  }
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / 32, group = warp < 4 ? warp - 1 : warp / 4 - 1;
  bf16* const mine = pieces + group * kPieces * kPieceElements;
  if (warp < 4) {
    give_registers<88>();
    if (threadIdx.x == 0) copy_tiles<kProduct>(a_map, b_map, g, stages, barriers);
    if (warp == 1 || warp == 2) write_tiles<kProduct>(group, g, mine, barriers, c);
  } else {
    take_registers<208>();
    multiply_tiles<kProduct>(group, g, stages, mine, barriers);
  }
}

template <GroupedProduct kProduct>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_matmul_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, Sizes g,
                          bf16* c) {
  if constexpr (kHasWarpgroups) compute_tiles<kProduct>(&a, &b, g, c);
}

template <GroupedProduct kProduct>
void launch(const Grouped<bf16>& g) {
  const bool forward = kProduct == GroupedProduct::forward, of_rows = kProduct == GroupedProduct::weight_gradient;
  launch_blocks(grouped_matmul_kernel<kProduct>, static_cast<unsigned>(multiprocessors()), kThreads, kSharedBytes,
                box_map(g.a, 1, g.rows, forward ? g.inputs : g.outputs),
                of_rows ? box_map(g.b, 1, g.rows, g.inputs) : box_map(g.b, g.experts, g.outputs, g.inputs),
                Sizes{.offsets = g.offsets, .inputs = static_cast<int>(g.inputs),
                      .outputs = static_cast<int>(g.outputs), .experts = static_cast<int>(g.experts),
                      .squares = g.squares},
                g.c);
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Where the compiler had no such instructions the kernel is empty and has no barriers in shared memory.
bool built() {
  static const bool yes = [] {
    cudaFuncAttributes attributes;
    cuda_check(cudaFuncGetAttributes(&attributes, grouped_matmul_kernel<GroupedProduct::forward>),
               "cudaFuncGetAttributes");
    return attributes.sharedSizeBytes > 0;
  }();
  return yes;
}

}  // namespace

bool grouped_matmul_warpgroup(GroupedProduct product, const Grouped<bf16>& g) {
  if (g.rows == 0 || g.inputs % 8 || g.outputs % 8 || !aligned(g.a) || !aligned(g.b) || !aligned(g.c) || !built())
    return false;
  switch (product) {
    case GroupedProduct::forward: launch<GroupedProduct::forward>(g); break;
    case GroupedProduct::input_gradient: launch<GroupedProduct::input_gradient>(g); break;
    case GroupedProduct::weight_gradient: launch<GroupedProduct::weight_gradient>(g); break;
  }
  return true;
}

}  // namespace weft
#endif
