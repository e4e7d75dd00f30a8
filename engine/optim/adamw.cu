// m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; w = w (1 - lr wd) - lr (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps).
#include "engine/optim/adamw.h"

#include <algorithm>
#include <cmath>

#include "engine/allocator.h"
#include "engine/autograd.h"
#include "engine/cpu/parallel.h"
#if WEFT_CUDA
#include "engine/cuda/stream.h"
#endif

namespace weft {
namespace {

struct Coefficients {
  float grad_scale, beta1, beta2, eps, keep, rate, root;  // keep = 1 - lr wd; rate = lr / (1-b1^t); root = sqrt(1-b2^t)
};
struct Slot {
  float* w;
  const float* g;
  float* m;
  float* v;
  int64_t n;
};

WEFT_HD inline void update(const Slot& s, int64_t i, const Coefficients& c) {
  const float g = s.g[i] * c.grad_scale;
  const float m = s.m[i] + (1 - c.beta1) * (g - s.m[i]);
  const float v = c.beta2 * s.v[i] + (1 - c.beta2) * g * g;
  s.m[i] = m;
  s.v[i] = v;
  s.w[i] = s.w[i] * c.keep - c.rate * m / (sqrtf(v) / c.root + c.eps);
}

void update_all(Cpu, const std::vector<Slot>& slots, const Coefficients& c) {
  for (const Slot& s : slots)
    parallel_for(s.n, 4096, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) update(s, i, c);
    });
}

#if WEFT_CUDA
constexpr int kSlots = 64;              // of one launch, within the 4 KiB of kernel parameters
constexpr int64_t kBlockElements = 4096;

struct Batch {
  Slot slots[kSlots];
  int first_block[kSlots + 1];  // of each tensor
};

__global__ void adamw_update(const Batch batch, Coefficients c) {
  int t = 0;
  while (static_cast<int>(blockIdx.x) >= batch.first_block[t + 1]) ++t;
  const Slot& s = batch.slots[t];
  const int64_t from = (blockIdx.x - batch.first_block[t]) * kBlockElements;
  const int64_t to = from + kBlockElements < s.n ? from + kBlockElements : s.n;
  for (int64_t i = from + threadIdx.x; i < to; i += blockDim.x) update(s, i, c);
}

void update_all(Cuda, const std::vector<Slot>& slots, const Coefficients& c) {
  for (size_t from = 0; from < slots.size(); from += kSlots) {
    Batch batch{};
    const int count = static_cast<int>(std::min<size_t>(kSlots, slots.size() - from));
    for (int t = 0; t < count; ++t) {
      batch.slots[t] = slots[from + t];
      batch.first_block[t + 1] =
          batch.first_block[t] + static_cast<int>((batch.slots[t].n + kBlockElements - 1) / kBlockElements);
    }
    launch_blocks(adamw_update, dim3(batch.first_block[count]), 256, 0, batch, c);
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
}

void AdamW::step(double learning_rate, double grad_scale) {
  if (parameters_.empty()) return;
  ++steps_;
  std::vector<Slot> slots;
  std::vector<Tensor> grads;  // alive until the work is queued
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const Tensor& p = parameters_[i];
    grads.push_back(p.grad());
    check(static_cast<bool>(grads.back()), "AdamW: parameter {} of shape {} has no gradient", i, p.shape().str());
    slots.push_back({p.data<float>(), grads.back().data<float>(), m_[i].data<float>(), v_[i].data<float>(), p.numel()});
  }
  const double t = static_cast<double>(steps_);
  const Coefficients c{static_cast<float>(grad_scale),
                       static_cast<float>(options_.beta1),
                       static_cast<float>(options_.beta2),
                       static_cast<float>(options_.eps),
                       static_cast<float>(1 - learning_rate * options_.weight_decay),
                       static_cast<float>(learning_rate / (1 - std::pow(options_.beta1, t))),
                       static_cast<float>(std::sqrt(1 - std::pow(options_.beta2, t)))};
  on_device(parameters_[0].device(), [&](auto device) { update_all(device, slots, c); });
  queued("adamw");
}

}  // namespace weft
