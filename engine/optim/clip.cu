// norm = sqrt(sum of all gradients' squares); grad_scale = min(1, clip_norm / (norm + 1e-6)).
#include "engine/optim/clip.h"

#include <algorithm>
#include <cmath>

#include "engine/allocator.h"
#include "engine/autograd.h"
#include "engine/ops/squared_norm.h"
#if WEFT_CUDA
#include "engine/cuda/block_sum.h"
#include "engine/cuda/stream.h"
#endif

namespace weft {
namespace {

constexpr int64_t kNone = INT64_MAX;

// Takes in the sum of squares, and the first range whose own sum is not finite, of all ranges.
WEFT_HD inline void conclude(UpdateState* s, double squares, int64_t bad_range, const int32_t* first_range,
                             int parameters, double clip_norm) {
  if (!s->finite) return;
  const double norm = sqrt(squares);
  s->norm = static_cast<float>(norm);
  s->grad_scale = static_cast<float>(norm + 1e-6 > clip_norm ? clip_norm / (norm + 1e-6) : 1.0);
  if (bad_range == kNone) {
    ++s->step;
    return;
  }
  s->finite = 0;
  for (int p = 0; p < parameters; ++p)
    if (bad_range < first_range[p + 1]) {
      s->parameter = p;
      return;
    }
}

void add_up(Cpu, const float* ranges, int64_t n, UpdateState* s, const int32_t* first_range, int parameters,
            double clip_norm) {
  double squares = 0;
  int64_t bad = kNone;
  for (int64_t i = 0; i < n; ++i) {
    squares += ranges[i];
    if (bad == kNone && !std::isfinite(ranges[i])) bad = i;
  }
  conclude(s, squares, bad, first_range, parameters, clip_norm);
}
void write(Cpu, UpdateState* s, UpdateState value) { *s = value; }
void write_factor(Cpu, UpdateState* s, float factor) { s->rate_factor = factor; }

#if WEFT_CUDA
constexpr int kThreads = 1024;

__global__ void add_up_ranges(const float* ranges, int64_t n, UpdateState* s, const int32_t* first_range,
                              int parameters, double clip_norm) {
  __shared__ unsigned long long bad;
  if (threadIdx.x == 0) bad = kNone;
  __syncthreads();
  double squares = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    squares += ranges[i];
    if (!isfinite(ranges[i])) atomicMin(&bad, static_cast<unsigned long long>(i));
  }
  squares = block_sum<kThreads>(squares);
  if (threadIdx.x == 0) conclude(s, squares, static_cast<int64_t>(bad), first_range, parameters, clip_norm);
}
__global__ void write_state(UpdateState* s, UpdateState value) { *s = value; }
__global__ void write_rate_factor(UpdateState* s, float factor) { s->rate_factor = factor; }

void add_up(Cuda, const float* ranges, int64_t n, UpdateState* s, const int32_t* first_range, int parameters,
            double clip_norm) {
  launch_blocks(add_up_ranges, dim3(1), kThreads, 0, ranges, n, s, first_range, parameters, clip_norm);
}
void write(Cuda, UpdateState* s, UpdateState value) { launch_blocks(write_state, dim3(1), 1, 0, s, value); }
void write_factor(Cuda, UpdateState* s, float factor) { launch_blocks(write_rate_factor, dim3(1), 1, 0, s, factor); }
#endif

Tensor new_state(Device device, const UpdateState& value) {
  static_assert(sizeof(UpdateState) % 4 == 0);
  const MemoryScope memory(Category::optimizer, "clip");
  const Tensor bytes = Tensor::empty({static_cast<int64_t>(sizeof(UpdateState) / 4)}, DType::i32, device);
  on_device(device, [&](auto d) { write(d, state_in(bytes), value); });
  return bytes;
}

}  // namespace

GradientClip::GradientClip(std::vector<Tensor> parameters, double clip_norm)
    : parameters_(std::move(parameters)), clip_norm_(clip_norm) {
  check(!parameters_.empty(), "clipping needs a parameter");
  std::vector<int32_t> first{0};
  for (const Tensor& p : parameters_) first.push_back(first.back() + static_cast<int32_t>(square_range_count(p.numel())));
  state_ = new_state(parameters_[0].device(), {});
  const MemoryScope memory(Category::optimizer, "clip");
  first_range_ = Tensor::from(first, {static_cast<int64_t>(first.size())}, state_.device());
}

void GradientClip::measure() {
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    gradients.push_back(parameters_[i].grad());
    check(static_cast<bool>(gradients.back()), "clipping: parameter {} of shape {} has no gradient", i,
          parameters_[i].shape().str());
  }
  const MemoryScope memory(Category::workspace, "clip");
  const Tensor ranges = square_ranges(gradients);
  on_device(device(), [&](auto d) {
    add_up(d, ranges.data<float>(), ranges.numel(), state(), first_range_.data<int32_t>(),
           static_cast<int>(parameters_.size()), clip_norm_);
  });
  queued("squared_norm");
}

void GradientClip::set_rate_factor(double factor) {
  on_device(device(), [&](auto d) { write_factor(d, state(), static_cast<float>(factor)); });
}

UpdateState* GradientClip::state() const { return state_in(state_); }

UpdateState GradientClip::read() const {
  UpdateState s;
  copy_bytes(&s, Device::cpu, state_.raw(), device(), sizeof s);
  return s;
}

Tensor known_state(Device device, double grad_scale) {
  UpdateState s;
  s.grad_scale = static_cast<float>(grad_scale);
  return new_state(device, s);
}

}  // namespace weft
