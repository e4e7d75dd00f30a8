// For each token the k experts of largest logit, and w = softmax over those k logits; then a stable counting sort of
// all choices c = n*K+k by expert: counts of each expert in blocks of tokens, their running sum (expert by expert), and
// the scatter, where a choice stands after those of its expert in earlier blocks, earlier warps and earlier lanes.
// balance = b E / N * sum_n sum_e share_e p[n, e], p = softmax(logits) of a row, share_e the part of all choices that
// went to e, a constant. Shares are near 1 / E, and only what they differ by has a gradient: with excess_e = share_e -
// 1 / E and s_n = sum_e excess_e p[n, e], balance = b (1 + E / N * sum_e excess_e sum_n p[n, e]), and dlogits[n, e] =
// dbalance b E / N * p[n, e] (excess_e - s_n), plus w_k sum_j w_j (dw_k - dw_j) for the chosen e_k, lose no digits to
// the part that cancels.
#include <algorithm>
#include <cmath>
#include <vector>

#include "engine/allocator.h"
#include "engine/cpu/parallel.h"
#include "engine/ops/routing.h"
#if WEFT_CUDA
#include "engine/cuda/vector.h"
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
// The softmax of the chosen logits, the largest first.
template <class T>
WEFT_HD void weigh(const T* logits, const int32_t* experts, T* weights, int k) {
  const T largest = logits[experts[0]];
  T total = 0;
  for (int i = 0; i < k; ++i) total += weights[i] = exp(logits[experts[i]] - largest);
  for (int i = 0; i < k; ++i) weights[i] /= total;
}
// One token's softmax over all experts, kept as what each element is computed from. `best` has its largest logit.
template <class T>
struct Softmax {
  const T* logits;
  T largest, total = 0;
  WEFT_HD Softmax(const T* row, int best, int num_experts) : logits(row), largest(row[best]) {
    for (int e = 0; e < num_experts; ++e) total += exp(logits[e] - largest);
  }
  WEFT_HD T operator()(int e) const { return exp(logits[e] - largest) / total; }
};
template <class T>
WEFT_HD T excess(const int32_t* offsets, int e, const RoutingSize& s) {
  const int64_t choices = s.tokens * s.chosen;
  return T((offsets[e + 1] - offsets[e]) * s.experts - choices) / T(choices * s.experts);
}

// dweights or dbalance may be null. `factor` is b E / N.
template <class T>
struct Gradient {
  const T *logits, *weights, *dweights, *dbalance;
  const int32_t *experts, *offsets;
  T factor;
  T* dlogits;
  RoutingSize size;

  WEFT_HD void token(int64_t n) const {
    const int num_experts = static_cast<int>(size.experts), k = static_cast<int>(size.chosen);
    const int32_t* chosen = experts + n * k;
    T* out = dlogits + n * num_experts;
    if (dbalance) {
      const Softmax<T> p(logits + n * num_experts, chosen[0], num_experts);
      T s = 0;
      for (int e = 0; e < num_experts; ++e) s += p(e) * excess<T>(offsets, e, size);
      for (int e = 0; e < num_experts; ++e) out[e] = *dbalance * factor * p(e) * (excess<T>(offsets, e, size) - s);
    } else {
      for (int e = 0; e < num_experts; ++e) out[e] = 0;
    }
    if (!dweights) return;
    const T *w = weights + n * k, *dw = dweights + n * k;
    for (int i = 0; i < k; ++i) {
      T beyond = 0;
      for (int j = 0; j < k; ++j) beyond += w[j] * (dw[i] - dw[j]);
      out[chosen[i]] += w[i] * beyond;
    }
  }
};

// `balance` may be null. b: the balance loss's weight.
template <class T>
void forward(Cpu, const T* logits, const Outputs& out, T* weights, T* balance, double b, const RoutingSize& s) {
  const int num_experts = static_cast<int>(s.experts), k = static_cast<int>(s.chosen);
  parallel_for(s.tokens, 256, [=](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      choose(logits + i * num_experts, out.experts + i * k, num_experts, k);
      weigh(logits + i * num_experts, out.experts + i * k, weights + i * k, k);
    }
  });
  std::fill(out.offsets, out.offsets + num_experts + 1, 0);
  for (int64_t c = 0; c < s.tokens * k; ++c) ++out.offsets[out.experts[c] + 1];
  for (int e = 0; e < num_experts; ++e) out.offsets[e + 1] += out.offsets[e];
  std::vector<int32_t> next(out.offsets, out.offsets + num_experts);
  for (int64_t c = 0; c < s.tokens * k; ++c) {
    const int32_t row = next[static_cast<size_t>(out.experts[c])]++;
    out.slots[c] = row;
    out.sources[row] = static_cast<int32_t>(c);
  }
  if (!balance) return;
  T sum = 0;
  for (int64_t n = 0; n < s.tokens; ++n) {
    const Softmax<T> p(logits + n * num_experts, out.experts[n * k], num_experts);
    for (int e = 0; e < num_experts; ++e) sum += p(e) * excess<T>(out.offsets, e, s);
  }
  *balance = T(b) * (1 + sum * T(s.experts) / T(s.tokens));
}
template <class T>
void backward(Cpu, const Gradient<T>& gradient) {
  parallel_for(gradient.size.tokens, 256, [=](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n) gradient.token(n);
  });
}

#if WEFT_CUDA
constexpr int kTokens = 128, kThreads = 256, kWarps = kThreads / 32, kScanThreads = 1024;

// counts [E, blocks] and sums [E, blocks]: of a block's tokens, the choices of each expert and the sum of p[n, e]; sums
// may be null.
__global__ void __launch_bounds__(kTokens) route_choose(const float* logits, int32_t* experts, float* weights,
                                                        int32_t* counts, float* sums, RoutingSize s) {
  constexpr int kTokenWarps = kTokens / 32;
  __shared__ int32_t count[kMaxExperts];
  __shared__ float warp_sums[kTokenWarps][kMaxExperts];
  const int num_experts = static_cast<int>(s.experts), k = static_cast<int>(s.chosen);
  for (int e = threadIdx.x; e < num_experts; e += kTokens) count[e] = 0;
  __syncthreads();
  const int64_t n = blockIdx.x * int64_t{kTokens} + threadIdx.x;
  const bool there = n < s.tokens;
  const float* row = logits + (there ? n : 0) * num_experts;
  if (there) {
    int32_t* const chosen = experts + n * k;
    choose(row, chosen, num_experts, k);
    weigh(row, chosen, weights + n * k, k);
    for (int i = 0; i < k; ++i) atomicAdd(&count[chosen[i]], 1);  // whole numbers: their order does not matter
  }
  if (sums) {
    const Softmax<float> p(row, there ? experts[n * k] : 0, num_experts);
    for (int e = 0; e < num_experts; ++e) {
      const float sum = warp_sum(there ? p(e) : 0.0f);
      if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32][e] = sum;
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < num_experts; e += kTokens) {
    counts[e * gridDim.x + blockIdx.x] = count[e];
    if (!sums) continue;
    float sum = 0;
    for (int warp = 0; warp < kTokenWarps; ++warp) sum += warp_sums[warp][e];
    sums[e * gridDim.x + blockIdx.x] = sum;
  }
}

// One block turns counts into running sums before each entry; an expert's first is its offset. Then the balance loss.
__global__ void __launch_bounds__(kScanThreads) route_scan(int32_t* counts, const float* sums, int32_t* offsets,
                                                           float* balance, float b, int blocks, RoutingSize s) {
  __shared__ int32_t warp_totals[32];
  __shared__ float parts[kMaxExperts];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_experts = static_cast<int>(s.experts);
  const int entries = blocks * num_experts;
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
  if (threadIdx.x == 0) offsets[num_experts] = before;
  if (!balance) return;
  __syncthreads();
  for (int e = warp; e < num_experts; e += kScanThreads / 32) {
    float sum = 0;
    for (int i = lane; i < blocks; i += 32) sum += sums[e * blocks + i];
    sum = warp_sum(sum);
    if (lane == 0) parts[e] = sum * excess<float>(offsets, e, s);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  float sum = 0;
  for (int e = 0; e < num_experts; ++e) sum += parts[e];
  *balance = b * (1 + sum * s.experts / s.tokens);
}

__global__ void __launch_bounds__(kThreads) route_scatter(const int32_t* experts, const int32_t* firsts, int32_t* slots,
                                                          int32_t* sources, RoutingSize s) {
  __shared__ int32_t count[kWarps][kMaxExperts];
  __shared__ int32_t next[kMaxExperts];
  const int num_experts = static_cast<int>(s.experts), k = static_cast<int>(s.chosen);
  for (int e = threadIdx.x; e < num_experts; e += kThreads) next[e] = firsts[e * gridDim.x + blockIdx.x];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t end = min(s.tokens, (blockIdx.x + 1) * int64_t{kTokens}) * k;
  for (int64_t start = blockIdx.x * int64_t{kTokens} * k; start < end; start += kThreads) {
    for (int i = threadIdx.x; i < kWarps * num_experts; i += kThreads) count[i / num_experts][i % num_experts] = 0;
    __syncthreads();
    const int64_t c = start + threadIdx.x;
    const int expert = c < end ? experts[c] : -1;
    const unsigned same = __match_any_sync(~0u, expert), earlier = same & ((1u << lane) - 1);
    if (expert >= 0 && earlier == 0) count[warp][expert] = __popc(same);
    __syncthreads();
    if (expert >= 0) {
      int32_t row = next[expert] + __popc(earlier);
      for (int w = 0; w < warp; ++w) row += count[w][expert];
      slots[c] = row;
      sources[row] = static_cast<int32_t>(c);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < num_experts; e += kThreads)
      for (int w = 0; w < kWarps; ++w) next[e] += count[w][e];
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kTokens) route_backward(const Gradient<float> gradient) {
  if (const int64_t n = blockIdx.x * int64_t{kTokens} + threadIdx.x; n < gradient.size.tokens) gradient.token(n);
}

unsigned token_blocks(int64_t tokens) { return static_cast<unsigned>((tokens + kTokens - 1) / kTokens); }

void forward(Cuda, const float* logits, const Outputs& out, float* weights, float* balance, double b,
             const RoutingSize& s) {
  const unsigned blocks = std::max(1u, token_blocks(s.tokens));
  const MemoryScope scope(Category::workspace);
  const Tensor counts = Tensor::empty({s.experts, blocks}, DType::i32, Device::cuda);
  Tensor sums;
  if (balance) sums = Tensor::empty({s.experts, blocks}, DType::f32, Device::cuda);
  int32_t* const firsts = counts.data<int32_t>();
  launch_blocks(route_choose, blocks, kTokens, 0, logits, out.experts, weights, firsts, sums.data<float>(), s);
  launch_blocks(route_scan, 1, kScanThreads, 0, firsts, sums.data<float>(), out.offsets, balance,
                static_cast<float>(b), static_cast<int>(blocks), s);
  launch_blocks(route_scatter, blocks, kThreads, 0, out.experts, firsts, out.slots, out.sources, s);
}
void backward(Cuda, const Gradient<float>& gradient) {
  launch_blocks(route_backward, token_blocks(gradient.size.tokens), kTokens, 0, gradient);
}
#endif

}  // namespace

Routed route(const Tensor& logits, const RouteOptions& o) {
  const int64_t k = o.chosen;
  check(logits.rank() == 2 && k >= 1 && k <= kMaxChosen && k <= logits.size(1) && logits.size(1) <= kMaxExperts,
        "route needs logits [N, E], E at most {}, and 1 <= k <= {} and E, found {} and k = {}", kMaxExperts, kMaxChosen,
        logits.shape().str(), k);
  const RoutingSize s{logits.size(0), k, logits.size(1)};
  check(s.tokens * k < (int64_t{1} << 31) - kMaxExperts, "route of {} tokens to {} experts: choices exceed 2^31",
        s.tokens, k);
  check(!o.balance || s.tokens > 0, "a balance loss needs tokens, found logits {}", logits.shape().str());
  const auto ids = [&](const Shape& shape) { return Tensor::empty(shape, DType::i32, logits.device()); };
  const Routing r{ids({s.tokens, k}), ids({s.tokens, k}), ids({s.tokens * k}), ids({s.experts + 1})};
  const Tensor weights = Tensor::like(logits, {s.tokens, k});
  Tensor balance;
  if (o.balance) balance = Tensor::like(logits, {});
  dispatch_logits("route", logits, [&]<class T>(auto device) {
    forward(device, logits.data<T>(),
            Outputs{r.experts.data<int32_t>(), r.slots.data<int32_t>(), r.sources.data<int32_t>(),
                    r.offsets.data<int32_t>()},
            weights.data<T>(), balance.data<T>(), o.balance.value_or(0), s);
  });
  std::vector<Tensor> outputs{weights};
  if (balance) outputs.push_back(balance);
  outputs = record_joint(
      "route", outputs, {logits},
      [logits = logits.detached(), weights, experts = r.experts, offsets = r.offsets, b = o.balance.value_or(0),
       s](std::vector<Tensor> dys) -> Gradients {
        dys.resize(2);
        const Tensor dlogits = Tensor::like(logits);
        dispatch_logits("route", logits, [&]<class T>(auto device) {
          backward(device, Gradient<T>{logits.data<T>(), weights.data<T>(), dys[0].data<T>(), dys[1].data<T>(),
                                       experts.data<int32_t>(), offsets.data<int32_t>(),
                                       T(b * static_cast<double>(s.experts) / static_cast<double>(s.tokens)),
                                       dlogits.data<T>(), s});
        });
        return {dlogits};
      });
  outputs.resize(2);
  return {r, outputs[0], outputs[1]};
}

}  // namespace weft
