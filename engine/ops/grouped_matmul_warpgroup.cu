// grouped_matmul of bf16 on sm_90a. A block stays on its multiprocessor and walks tiles of 128 x 192: one thread copies
// what they need into a ring of stages, and two warpgroups take turns, so that one multiplies a tile while the other
// writes the one before. Rows of an expert start anywhere: a tile's copies go past its last row, and only its own rows
// are written. At 16384 rows, 8 experts, 768 and 3072 columns, on an H200 at its power limit, the six products of a
// layer take 764 us in one run, where two warpgroups that multiplied tiles of 128 x 256 together took 812: of such a
// tile's 16000 cycles 2600 went into finding the next one, draining the products and handing over the sums. What else
// was tried and lost is in tools/bench_step/h200.md.
#if WEFT_CUDA
#include "engine/cuda/tensor_copy.h"
#include "engine/cuda/vector.h"
#include "engine/cuda/warpgroup.h"
#include "engine/ops/grouped_matmul_kernels.h"

namespace weft {
namespace {

struct Sizes {
  const int32_t* offsets;  // [E + 1], on the device
  int inputs, outputs, experts;
  float* squares;  // as in Grouped
};

constexpr int kTileM = 128, kTileN = 192, kDepth = kBoxSide, kStages = 4, kThreads = 384;
constexpr int kStageElements = (kTileM + kTileN) * kDepth;
// Finished sums of one warpgroup on their way out, whose rows begin in different banks.
constexpr int kOutStride = kTileN + 8, kOutElements = kTileM * kOutStride;
constexpr size_t kSharedBytes = (kStages * kStageElements + kOutElements) * sizeof(bf16) + 1024;
constexpr int kTiles = 4;  // places for tiles that are found and not finished

struct Tile {
  int expert, first;  // row of the expert's segment
  int row, rows;      // of the tile within the expert's C; rows that are left from there
  int column, width;  // 192, or 64 in the last round; 0 after it
  int depth;          // terms of the sums
  int step;           // stages that the tiles of the block before it have taken
};

// The tiles of one block in their order. Where the last round has few tiles they are cut into 3 narrower ones.
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
    parts_ = rest * 3 <= step_ ? 3 : 1;
    count_ = whole_ + rest * parts_;
  }
  __device__ Tile next() {
    Tile t{};
    if (at_ >= count_) return t;
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
    t.step = steps_;
    steps_ += (t.depth + kDepth - 1) / kDepth;
    return t;
  }

 private:
  __device__ int units(int expert) const {
    return ((kWeight ? g_.outputs : g_.offsets[expert + 1] - g_.offsets[expert]) + kTileM - 1) / kTileM;
  }
  Sizes g_;
  int columns_, step_, at_, whole_, parts_, count_, expert_ = 0, passed_ = 0, steps_ = 0;
};

struct Shared {
  Tile tiles[kTiles];
  uint64_t found[kTiles], done[kTiles];  // barriers, from here on
  uint64_t full[kStages], empty[kStages];
  // Of each warpgroup: the other has seen all stages of its tile; it has written it.
  uint64_t multiply[2], write[2];
};

// A place in the ring of stages.
struct Place {
  int stage;
  uint32_t parity;
  __device__ explicit Place(int step) : stage(step % kStages), parity(step / kStages % 2) {}
  __device__ void advance() {
    stage = (stage + 1) % kStages;
    parity ^= stage == 0;
  }
};

// The warpgroups take turns: in multiplying, since one that waited for a stage of its tile before the other has seen
// the stage before it in the same place would take that one's; and in writing, since there is place for one.
class Turn {
 public:
  __device__ Turn(uint64_t (&barriers)[2], int group)
      : mine_(&barriers[group]), other_(&barriers[group ^ 1]), parity_(group ^ 1) {}
  __device__ void wait() {
    wait_barrier(mine_, parity_);
    parity_ ^= 1;
  }
  __device__ void pass() const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(other_);
  }

 private:
  uint64_t *mine_, *other_;
  uint32_t parity_;
};

// The copying thread's work. It also tells the warpgroups their tiles: where each of them looked for its own, a layer's
// six products took 790 us in loops of one kernel, and take 766 now.
template <GroupedProduct kProduct>
__device__ void copy_tiles(const CUtensorMap* a_map, const CUtensorMap* b_map, const Sizes& g, bf16* stages,
                           Shared& shared) {
  using Layout = GroupedLayout<kProduct>;
  Walk<kProduct> walk(g);
  Place place(0);
  int ended = 0;  // warpgroups that know
  for (int n = 0; ended < 2; ++n) {
    const Tile t = walk.next();
    wait_barrier(&shared.done[n % kTiles], n / kTiles % 2 ^ 1);
    shared.tiles[n % kTiles] = t;
    arrive(&shared.found[n % kTiles]);
    if (t.width == 0) ++ended;
    for (int k = 0; k < t.depth; k += kDepth, place.advance()) {
      uint64_t* const full = &shared.full[place.stage];
      bf16 *const a = stages + place.stage * kStageElements, *const b = a + kTileM * kDepth;
      wait_barrier(&shared.empty[place.stage], place.parity ^ 1);
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
}

// Adds the products of 8 kCount columns of the tile to sums: rows 0 to 63 and, where kHalves is 2, 64 to 127.
template <GroupedProduct kProduct, int kHalves, int kCount>
__device__ void multiply_tile(float (&sums)[kHalves][kCount][4], const Tile& t, bf16* stages, Shared& shared,
                              const Turn& turn) {
  using Layout = GroupedLayout<kProduct>;
  constexpr int kNextColumns = kDepth * kBoxSide * sizeof(bf16);
  // 16 terms further along the sums: 16 rows of 128 bytes, or 32 bytes; an address counts 16 bytes.
  constexpr uint64_t kNextA = Layout::a_rows_are_k ? 128 : 2, kNextB = Layout::b_rows_are_k ? 128 : 2;
  constexpr uint64_t kHalf = kNextColumns / 16;
  const uint64_t a_first = warpgroup_tile(stages, Layout::a_rows_are_k ? kNextColumns : 16);
  const uint64_t b_first = warpgroup_tile(stages + kTileM * kDepth, Layout::b_rows_are_k ? kNextColumns : 16);
  const auto leave = [&](int stage) {
    if (threadIdx.x % 32 == 0) arrive(&shared.empty[stage]);
  };
  Place place(t.step);
  int last = 0;
  for (int k = 0; k < t.depth; k += kDepth, place.advance()) {
    wait_barrier(&shared.full[place.stage], place.parity);
    if constexpr (kProduct == GroupedProduct::weight_gradient)
      if (t.depth - k < kDepth) {  // rows of the next expert
        uint4* const rows = reinterpret_cast<uint4*>(stages + place.stage * kStageElements);
        for (int i = (t.depth - k) * 8 + static_cast<int>(threadIdx.x) % 128; i < kDepth * 8; i += 128)
          rows[i] = rows[i + kDepth * 8] = uint4{0, 0, 0, 0};
        publish_to_warpgroups();
        sync_warpgroup(static_cast<int>(threadIdx.x) / 128);
      }
    constexpr uint64_t kStage = kStageElements * sizeof(bf16) / 16;
    const uint64_t a = a_first + place.stage * kStage, b = b_first + place.stage * kStage;
    open_products();
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step)
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
        multiply_warpgroup<Layout::a_rows_are_k, Layout::b_rows_are_k>(sums[half], a + half * kHalf + step * kNextA,
                                                                       b + step * kNextB);
    close_products();
    if (k > 0) {
      wait_products<1>();
      leave(last);
    }
    last = place.stage;
  }
  turn.pass();
  wait_products<0>();
#pragma unroll
  for (auto& half : sums) settle(half);
  if (t.depth > 0) leave(last);
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

// Leaves a warp's rows of the tile, 16 of each half, in shared memory.
template <int kHalves, int kCount>
__device__ void lay_out(const float (&sums)[kHalves][kCount][4], bf16* out) {
  const int lane = threadIdx.x % 32, warp = static_cast<int>(threadIdx.x) / 32 % 4;
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    bf16* const to = out + (half * 64 + warp * 16 + lane % 16) * kOutStride + lane / 16 * 8;
#pragma unroll
    for (int j = 0; j < kCount; j += 2) {
      const float(&l)[4] = sums[half][j], (&r)[4] = sums[half][j + 1];
      store_quad(to + j * 8, pack(l[0], l[1]), pack(l[2], l[3]), pack(r[0], r[1]), pack(r[2], r[3]));
    }
  }
  __syncwarp();
}

template <GroupedProduct kProduct, int kHalves, int kCount>
__device__ void compute_tile(const Tile& t, bf16* stages, bf16* out, Shared& shared, Turn& multiply, Turn& write) {
  float sums[kHalves][kCount][4] = {};
  multiply.wait();
  multiply_tile<kProduct>(sums, t, stages, shared, multiply);
  write.wait();
  lay_out(sums, out);
}

// Writes a warp's rows of a tile that is laid out, 4 rows of 64 columns at once. A weight gradient is squared on the
// way, for the norm that clips gradients; every 16 x 64 of it has a sum of its own, whose order no cut of the last round
// changes.
template <GroupedProduct kProduct>
__device__ void write_tile(const Tile& t, const Sizes& g, const bf16* out, bf16* c) {
  constexpr bool kWeight = kProduct == GroupedProduct::weight_gradient;
  const int lane = threadIdx.x % 32, warp = static_cast<int>(threadIdx.x) / 32 % 4;
  const int width = kProduct == GroupedProduct::forward ? g.outputs : g.inputs;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const int row = half * 64 + warp * 16 + lane / 8, left = t.rows - row;
    const int64_t first = (kWeight ? int64_t{t.expert} * g.outputs : t.first) + t.row + row;
#pragma unroll 1
    for (int done = 0; done < t.width; done += kSquaredColumns) {
      const int column = t.column + done + lane % 8 * 8;
      const bf16* const from = out + row * kOutStride + done + lane % 8 * 8;
      bf16* const to = c + first * width + column;
      float squares = 0;
#pragma unroll
      for (int i = 0; i < kSquaredRows; i += 4)
        if (i < left && column < width) {
          const uint4 eight = *reinterpret_cast<const uint4*>(from + i * kOutStride);
          *reinterpret_cast<uint4*>(to + int64_t{i} * width) = eight;
          if (kWeight) squares += sum_squares(eight);
        }
      if (kWeight && g.squares) {
        squares = warp_sum(squares);
        const int64_t rows = (g.outputs + kSquaredRows - 1) / kSquaredRows;
        const int64_t range = t.expert * rows + (t.row + row) / kSquaredRows;
        const int columns = (width + kSquaredColumns - 1) / kSquaredColumns;
        if (lane == 0 && left > 0 && column < width) g.squares[range * columns + column / kSquaredColumns] = squares;
      }
    }
  }
}

// The work of a warpgroup: every second tile of the block.
template <GroupedProduct kProduct>
__device__ void compute_every_second(int group, const Sizes& g, bf16* stages, Shared& shared, bf16* c) {
  bf16* const out = stages + kStages * kStageElements;
  Turn multiply(shared.multiply, group), write(shared.write, group);
  for (int n = group;; n += 2) {
    wait_barrier(&shared.found[n % kTiles], n / kTiles % 2);
    const Tile t = shared.tiles[n % kTiles];
    if (t.width == 0) return;
    if (t.width < kTileN) compute_tile<kProduct, 2, kBoxSide / 8>(t, stages, out, shared, multiply, write);
    else if (t.rows > 64) compute_tile<kProduct, 2, kTileN / 8>(t, stages, out, shared, multiply, write);
    else compute_tile<kProduct, 1, kTileN / 8>(t, stages, out, shared, multiply, write);
    write_tile<kProduct>(t, g, out, c);
    write.pass();
    arrive(&shared.done[n % kTiles]);  // each thread for itself, as each has read the tile
  }
}

template <GroupedProduct kProduct>
__device__ void compute_tiles(const CUtensorMap* a_map, const CUtensorMap* b_map, const Sizes& g, bf16* c) {
  extern __shared__ __align__(1024) uint4 shared_stages[];
  __shared__ Shared shared;
  // By an offset, so that the compiler still knows that it is shared memory.
  const uint32_t past = shared_address(shared_stages) % 1024;
  bf16* const stages = reinterpret_cast<bf16*>(shared_stages + (1024 - past) % 1024 / sizeof(uint4));
  if (threadIdx.x == 0) {
    prefetch_map(a_map);
    prefetch_map(b_map);
    for (int i = 0; i < kStages; ++i) {
      init_barrier(&shared.full[i], 1);
      init_barrier(&shared.empty[i], 4);
    }
    for (int i = 0; i < kTiles; ++i) {
      init_barrier(&shared.found[i], 1);
      init_barrier(&shared.done[i], 128);
    }
    for (int i = 0; i < 2; ++i) {
      init_barrier(&shared.multiply[i], 4);
      init_barrier(&shared.write[i], 4);
    }
    publish_barriers();
  }
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp < 4) {
    give_registers<40>();
    if (threadIdx.x == 0) copy_tiles<kProduct>(a_map, b_map, g, stages, shared);
  } else {
    take_registers<232>();
    compute_every_second<kProduct>(warp / 4 - 1, g, stages, shared, c);
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
