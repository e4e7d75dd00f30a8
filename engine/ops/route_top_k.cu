// For each token the k experts of largest logit, then a stable counting sort of all choices c = n*K+k by expert:
// counts of each expert in blocks of 256 choices, their running sum (expert by expert), and the scatter, where a choice
// stands after those of its expert in earlier blocks, in earlier warps and in earlier lanes.
#include <algorithm>
#include <vector>

#include "engine/allocator.h"
#include "engine/cpu/parallel.h"
#include "engine/ops/routing.h"
#if WEFT_CUDA
#include "engine/cuda/stream.h"
#endif

namespace weft {
namespace {

constexpr int64_t kMaxExperts = 256, kMaxChosen = 8;

struct Outputs {
  int32_t *experts, *slots, *sources, *offsets;
};

// Writes the k experts of one token. A nan is never larger, so k different experts come out whatever the logits are.
template <class T>
WEFT_HD void choose(const T* logits, int32_t* experts, int num_experts, int k) {
  for (int i = 0; i < k; ++i) {
    int best = -1;
    for (int e = 0; e < num_experts; ++e) {
      bool taken = false;
      for (int j = 0; j < i; ++j) taken |= experts[j] == e;
      if (!taken && (best < 0 || logits[e] > logits[best])) best = e;
    }
    experts[i] = best;
  }
}

template <class T>
void route(Cpu, const T* logits, const Outputs& out, int64_t n, int num_experts, int k) {
  parallel_for(n, 256, [=](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) choose(logits + i * num_experts, out.experts + i * k, num_experts, k);
  });
  std::fill(out.offsets, out.offsets + num_experts + 1, 0);
  for (int64_t c = 0; c < n * k; ++c) ++out.offsets[out.experts[c] + 1];
  for (int e = 0; e < num_experts; ++e) out.offsets[e + 1] += out.offsets[e];
  std::vector<int32_t> next(out.offsets, out.offsets + num_experts);
  for (int64_t c = 0; c < n * k; ++c) {
    const int32_t row = next[static_cast<size_t>(out.experts[c])]++;
    out.slots[c] = row;
    out.sources[row] = static_cast<int32_t>(c);
  }
}

#if WEFT_CUDA
constexpr int kThreads = 256, kWarps = kThreads / 32, kScanThreads = 1024;

__global__ void route_choose(const float* logits, int32_t* experts, int64_t n, int num_experts, int k) {
  if (const int64_t i = element_index(); i < n) choose(logits + i * num_experts, experts + i * k, num_experts, k);
}

// counts [E, blocks]: the choices of each expert in each block of 256.
__global__ void __launch_bounds__(kThreads) route_count(const int32_t* experts, int32_t* counts, int choices,
                                                        int num_experts) {
  __shared__ int32_t count[kMaxExperts];
  for (int e = threadIdx.x; e < num_experts; e += kThreads) count[e] = 0;
  __syncthreads();
  const int c = blockIdx.x * kThreads + threadIdx.x;
  if (c < choices) atomicAdd(&count[experts[c]], 1);  // whole numbers: their order does not matter
  __syncthreads();
  for (int e = threadIdx.x; e < num_experts; e += kThreads) counts[e * gridDim.x + blockIdx.x] = count[e];
}

// One block turns counts into running sums before each entry; an expert's first is its offset.
__global__ void __launch_bounds__(kScanThreads) route_scan(int32_t* counts, int32_t* offsets, int blocks,
                                                           int num_experts, int choices) {
  __shared__ int32_t warp_totals[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, entries = blocks * num_experts;
  int32_t before = 0;
  for (int start = 0; start < entries; start += kScanThreads) {
    const int i = start + threadIdx.x;
    const int32_t own = i < entries ? counts[i] : 0;
    int32_t running = own;
    for (int step = 1; step < 32; step *= 2) {
      const int32_t other = __shfl_up_sync(~0u, running, step);
      if (lane >= step) running += other;
    }
    if (lane == 31) warp_totals[warp] = running;
    __syncthreads();
    int32_t total = 0, earlier = 0;
    for (int w = 0; w < 32; ++w) {
      if (w == warp) earlier = total;
      total += warp_totals[w];
    }
    __syncthreads();
    const int32_t first = before + earlier + running - own;
    if (i < entries) {
      counts[i] = first;
      if (i % blocks == 0) offsets[i / blocks] = first;
    }
    before += total;
  }
  if (threadIdx.x == 0) offsets[num_experts] = choices;
}

__global__ void __launch_bounds__(kThreads) route_scatter(const int32_t* experts, const int32_t* firsts, int32_t* slots,
                                                          int32_t* sources, int choices, int num_experts) {
  __shared__ int32_t count[kWarps][kMaxExperts];
  for (int i = threadIdx.x; i < kWarps * num_experts; i += kThreads) count[i / num_experts][i % num_experts] = 0;
  __syncthreads();
  const int c = blockIdx.x * kThreads + threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int expert = c < choices ? experts[c] : -1;
  const unsigned same = __match_any_sync(~0u, expert), earlier = same & ((1u << lane) - 1);
  if (expert >= 0 && earlier == 0) count[warp][expert] = __popc(same);
  __syncthreads();
  if (expert < 0) return;
  int32_t row = firsts[expert * gridDim.x + blockIdx.x] + __popc(earlier);
  for (int w = 0; w < warp; ++w) row += count[w][expert];
  slots[c] = row;
  sources[row] = c;
}

template <class T>
void route(Cuda, const T* logits, const Outputs& out, int64_t n, int num_experts, int k) {
  const int choices = static_cast<int>(n * k), blocks = std::max(1, (choices + kThreads - 1) / kThreads);
  const MemoryScope scope(Category::workspace);
  const Tensor counts = Tensor::empty({num_experts, blocks}, DType::i32, Device::cuda);
  int32_t* const sums = counts.data<int32_t>();
  const unsigned grid = static_cast<unsigned>(blocks);
  launch_elements(route_choose, n, logits, out.experts, n, num_experts, k);
  launch_blocks(route_count, grid, kThreads, 0, out.experts, sums, choices, num_experts);
  launch_blocks(route_scan, 1, kScanThreads, 0, sums, out.offsets, blocks, num_experts, choices);
  launch_blocks(route_scatter, grid, kThreads, 0, out.experts, sums, out.slots, out.sources, choices, num_experts);
}
#endif

}  // namespace

Routing route_top_k(const Tensor& logits, int64_t k) {
  check(logits.rank() == 2 && k >= 1 && k <= kMaxChosen && k <= logits.size(1) && logits.size(1) <= kMaxExperts,
        "route_top_k needs logits [N, E], E at most {}, and 1 <= k <= {} and E, found {} and k = {}", kMaxExperts,
        kMaxChosen, logits.shape().str(), k);
  const int64_t n = logits.size(0), experts = logits.size(1);
  check(n * k < (int64_t{1} << 31) - kMaxExperts, "route_top_k of {} tokens to {} experts: choices exceed 2^31", n, k);
  const auto ids = [&](const Shape& shape) { return Tensor::empty(shape, DType::i32, logits.device()); };
  Routing r{ids({n, k}), ids({n, k}), ids({n * k}), ids({experts + 1})};
  const Outputs out{r.experts.data<int32_t>(), r.slots.data<int32_t>(), r.sources.data<int32_t>(),
                    r.offsets.data<int32_t>()};
  dispatch_logits("route_top_k", logits, [&]<class T>(auto device) {
    route(device, logits.data<T>(), out, n, static_cast<int>(experts), static_cast<int>(k));
  });
  queued("route_top_k", r.experts.shape());
  return r;
}

}  // namespace weft
