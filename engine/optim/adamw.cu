// m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; w = w (1 - lr wd) - lr (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps).
#include "engine/optim/adamw.h"

#include <algorithm>
#include <cmath>

#include "engine/allocator.h"
#include "engine/cpu/parallel.h"
#include "engine/cpu/widest.h"
#include "engine/optim/master.h"
#if WEFT_CUDA
#include "engine/cuda/stream.h"
#endif

namespace weft {
namespace {

struct Coefficients {
  float grad_scale, beta1, beta2, eps;
  float keep, rate, root;  // 1 - lr wd; lr / (1-b1^t); 1 / sqrt(1-b2^t)
};
struct Progress {
  int64_t steps;
  int32_t applies;  // whether the step at hand is to be
  Coefficients c;
};

struct Slot {
  Master w;
  float *m, *v;
  const void* g;
  int64_t n;
  bool narrow;  // g is bf16, else f32
};

WEFT_HD inline void begin(Progress* p, const UpdateState& state, const AdamWOptions& o, double learning_rate) {
  p->applies = state.finite;
  if (!state.finite) return;
  const double t = static_cast<double>(++p->steps), rate = learning_rate * static_cast<double>(state.rate_factor);
  p->c = {state.grad_scale,
          static_cast<float>(o.beta1),
          static_cast<float>(o.beta2),
          static_cast<float>(o.eps),
          static_cast<float>(1 - rate * o.weight_decay),
          static_cast<float>(rate / (1 - pow(o.beta1, t))),
          static_cast<float>(1 / sqrt(1 - pow(o.beta2, t)))};
}

WEFT_HD inline void update(float& w, float& m, float& v, float gradient, const Coefficients& c) {
  const float g = gradient * c.grad_scale;
  m += (1 - c.beta1) * (g - m);
  v = c.beta2 * v + (1 - c.beta2) * g * g;
  w = w * c.keep - c.rate * m / (sqrtf(v) * c.root + c.eps);
}
template <bool kSplit, class G>
WEFT_HD inline void update(const Slot& s, int64_t i, const Coefficients& c) {
  Elements<float, 1> w = s.w.read<kSplit, 1>(i);
  update(w.v[0], s.m[i], s.v[i], static_cast<float>(static_cast<const G*>(s.g)[i]), c);
  s.w.write<kSplit>(i, w);
}

template <bool kSplit, class G>
WEFT_WIDEST void update_range(const Slot& s, int64_t from, int64_t to, const Coefficients& c) {
#pragma GCC ivdep
  for (int64_t i = from; i < to; ++i) update<kSplit, G>(s, i, c);
}

void begin(Cpu, Progress* p, const UpdateState* state, const AdamWOptions& o, double learning_rate) {
  begin(p, *state, o, learning_rate);
}
void update_all(Cpu, const std::vector<Slot>& slots, const Progress* p) {
  if (!p->applies) return;
  for (const Slot& s : slots)
    parallel_for(s.n, 4096, [&](int64_t from, int64_t to) {
      if (s.w.rest)
        s.narrow ? update_range<true, bf16>(s, from, to, p->c) : update_range<true, float>(s, from, to, p->c);
      else
        s.narrow ? update_range<false, bf16>(s, from, to, p->c) : update_range<false, float>(s, from, to, p->c);
    });
}

#if WEFT_CUDA
constexpr int kSlots = 448;  // of one launch, within the 32 KB of a kernel's arguments
constexpr int kThreads = 256;
constexpr int kWidth = 4;   // elements that a thread takes at once: 16 bytes of w, m and v
constexpr int kRounds = 2;  // what it has in flight; of split weights, 4 took as long
constexpr int64_t kBlockElements = kThreads * kWidth * kRounds;

struct Batch {
  Slot slots[kSlots];
  int first_block[kSlots + 1];  // of each tensor
  int count = 0;
};

template <bool kSplit, class G>
__device__ void update_block(const Slot& s, int64_t from, const Coefficients& c) {
  const G* g = static_cast<const G*>(s.g);
  const uintptr_t odd = reinterpret_cast<uintptr_t>(s.m) | reinterpret_cast<uintptr_t>(s.v) |
                        reinterpret_cast<uintptr_t>(g) * (4 / sizeof(G));
  if (from + kBlockElements > s.n || odd % 16 != 0 || !s.w.aligned<kWidth>()) {
    const int64_t to = min(from + kBlockElements, s.n);
    for (int64_t i = from + threadIdx.x; i < to; i += kThreads) update<kSplit, G>(s, i, c);
    return;
  }
  const int64_t first = from / kWidth + threadIdx.x;
  Elements<float, kWidth> w[kRounds], m[kRounds], v[kRounds];
  Elements<G, kWidth> gradient[kRounds];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int64_t i = first + r * kThreads;
    gradient[r] = elements<kWidth>(g, i);
    m[r] = elements<kWidth>(s.m, i);
    v[r] = elements<kWidth>(s.v, i);
    w[r] = s.w.read<kSplit, kWidth>(i);
  }
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int64_t i = first + r * kThreads;
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      update(w[r].v[j], m[r].v[j], v[r].v[j], static_cast<float>(gradient[r].v[j]), c);
    elements<kWidth>(s.m, i) = m[r];
    elements<kWidth>(s.v, i) = v[r];
    s.w.write<kSplit>(i, w[r]);
  }
}

__global__ void adamw_begin(Progress* p, const UpdateState* state, AdamWOptions o, double learning_rate) {
  begin(p, *state, o, learning_rate);
}
__global__ void __launch_bounds__(kThreads) adamw_update(const __grid_constant__ Batch batch, const Progress* p) {
  if (!p->applies) return;
  const int block = static_cast<int>(blockIdx.x);
  int low = 0, high = batch.count - 1;  // the last tensor whose first block is not after this one
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (batch.first_block[middle] <= block) low = middle;
    else high = middle - 1;
  }
  const Slot& s = batch.slots[low];
  const int64_t from = (block - batch.first_block[low]) * kBlockElements;
  if (s.w.rest)
    s.narrow ? update_block<true, bf16>(s, from, p->c) : update_block<true, float>(s, from, p->c);
  else
    s.narrow ? update_block<false, bf16>(s, from, p->c) : update_block<false, float>(s, from, p->c);
}

void begin(Cuda, Progress* p, const UpdateState* state, const AdamWOptions& o, double learning_rate) {
  launch_blocks(adamw_begin, dim3(1), 1, 0, p, state, o, learning_rate);
}
void update_all(Cuda, const std::vector<Slot>& slots, const Progress* p) {
  for (size_t from = 0; from < slots.size(); from += kSlots) {
    Batch batch;
    batch.first_block[0] = 0;
    batch.count = static_cast<int>(std::min<size_t>(kSlots, slots.size() - from));
    for (int t = 0; t < batch.count; ++t) {
      batch.slots[t] = slots[from + t];
      batch.first_block[t + 1] =
          batch.first_block[t] + static_cast<int>((batch.slots[t].n + kBlockElements - 1) / kBlockElements);
    }
    launch_blocks(adamw_update, dim3(batch.first_block[batch.count]), kThreads, 0, batch, p);
  }
}
#endif

}  // namespace

AdamW::AdamW(std::vector<Tensor> parameters, AdamWOptions options)
    : parameters_(std::move(parameters)), options_(options) {
  MemoryScope memory(Category::optimizer, "adamw");
  for (const Tensor& p : parameters_) {
    m_.push_back(Tensor::zeros(p.shape(), DType::f32, p.device()));
    v_.push_back(Tensor::zeros(p.shape(), DType::f32, p.device()));
  }
  static_assert(sizeof(Progress) % 4 == 0);
  if (!parameters_.empty())
    progress_ = Tensor::zeros({static_cast<int64_t>(sizeof(Progress) / 4)}, DType::i32, parameters_[0].device());
}

void AdamW::step(double learning_rate, const UpdateState* state) {
  if (parameters_.empty()) return;
  std::vector<Slot> slots;
  std::vector<Tensor> grads;  // alive until the work is queued
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const Tensor& p = parameters_[i];
    const Tensor& grad = grads.emplace_back(p.grad());
    check(static_cast<bool>(grad), "AdamW: parameter {} of shape {} has no gradient", i, p.shape().str());
    const bool narrow = grad.dtype() == DType::bf16;
    check(narrow || grad.dtype() == DType::f32, "AdamW takes gradients in f32 or bf16, found {}", name_of(grad.dtype()));
    slots.push_back({master_of(p), m_[i].data<float>(), v_[i].data<float>(), grad.raw(), p.numel(), narrow});
  }
  on_device(parameters_[0].device(), [&](auto device) {
    auto* progress = static_cast<Progress*>(progress_.raw());
    begin(device, progress, state, options_, learning_rate);
    update_all(device, slots, progress);
  });
  queued("adamw");
}

void AdamW::step(double learning_rate, double grad_scale) {
  if (!parameters_.empty()) step(learning_rate, state_in(known_state(parameters_[0].device(), grad_scale)));
}

int64_t AdamW::steps() const {
  int64_t steps = 0;
  if (progress_) copy_bytes(&steps, Device::cpu, progress_.raw(), progress_.device(), sizeof steps);
  return steps;
}

}  // namespace weft
