// loss = E / N * sum_n sum_e share_e p[n, e], p = softmax(logits) of a row, share_e the part of all choices that went to
// e, a constant. Shares are near 1 / E, and only what they differ by has a gradient: with excess_e = share_e - 1 / E and
// s_n = sum_e excess_e p[n, e], loss = 1 + E / N * sum_n s_n and dlogits[n, e] = dloss * E / N * p[n, e] (excess_e - s_n)
// lose no digits to the part that cancels.
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

// One token's softmax, kept as what each element is computed from.
template <class T>
struct Row {
  const T* logits;
  const int32_t* offsets;
  T largest, total, sum;  // sum: s_n
  WEFT_HD Row(const T* row, const int32_t* ends, const RoutingSize& s) : logits(row), offsets(ends) {
    largest = logits[0];
    for (int64_t e = 1; e < s.experts; ++e) largest = logits[e] > largest ? logits[e] : largest;
    total = sum = 0;
    for (int64_t e = 0; e < s.experts; ++e) {
      const T p = exp(logits[e] - largest);
      total += p;
      sum += p * excess(e, s);
    }
    sum /= total;
  }
  WEFT_HD T excess(int64_t e, const RoutingSize& s) const {
    const int64_t choices = s.tokens * s.chosen;
    return T((offsets[e + 1] - offsets[e]) * s.experts - choices) / T(choices * s.experts);
  }
  WEFT_HD void gradient(T factor, T* dlogits, const RoutingSize& s) const {
    for (int64_t e = 0; e < s.experts; ++e)
      dlogits[e] = factor * (exp(logits[e] - largest) / total) * (excess(e, s) - sum);
  }
};

template <class T>
void forward(Cpu, const T* logits, const int32_t* offsets, T* loss, const RoutingSize& s) {
  T sum = 0;
  for (int64_t n = 0; n < s.tokens; ++n) sum += Row<T>(logits + n * s.experts, offsets, s).sum;
  *loss = 1 + sum * T(s.experts) / T(s.tokens);
}
template <class T>
void backward(Cpu, const T* logits, const int32_t* offsets, const T* dloss, T* dlogits, const RoutingSize& s) {
  const T factor = *dloss * T(s.experts) / T(s.tokens);
  parallel_for(s.tokens, 256, [=](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n)
      Row<T>(logits + n * s.experts, offsets, s).gradient(factor, dlogits + n * s.experts, s);
  });
}

#if WEFT_CUDA
__global__ void __launch_bounds__(256) balance_loss_forward(const float* logits, const int32_t* offsets,
                                                            float* partial, RoutingSize s) {
  const int64_t n = element_index();
  const float sum = block_sum(n < s.tokens ? Row<float>(logits + n * s.experts, offsets, s).sum : 0.0f);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
__global__ void __launch_bounds__(256) balance_loss_sum(const float* partial, float* loss, int64_t blocks,
                                                        RoutingSize s) {
  float sum = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *loss = 1 + sum * s.experts / s.tokens;
}
__global__ void __launch_bounds__(256) balance_loss_backward(const float* logits, const int32_t* offsets,
                                                             const float* dloss, float* dlogits, RoutingSize s) {
  if (const int64_t n = element_index(); n < s.tokens)
    Row<float>(logits + n * s.experts, offsets, s)
        .gradient(*dloss * s.experts / s.tokens, dlogits + n * s.experts, s);
}
void forward(Cuda, const float* logits, const int32_t* offsets, float* loss, const RoutingSize& s) {
  const MemoryScope scope(Category::workspace);
  const int64_t blocks = (s.tokens + 255) / 256;
  const Tensor partial = Tensor::empty({blocks}, DType::f32, Device::cuda);
  launch_elements(balance_loss_forward, s.tokens, logits, offsets, partial.data<float>(), s);
  launch_blocks(balance_loss_sum, 1, 256, 0, partial.data<float>(), loss, blocks, s);
}
void backward(Cuda, const float* logits, const int32_t* offsets, const float* dloss, float* dlogits,
              const RoutingSize& s) {
  launch_elements(balance_loss_backward, s.tokens, logits, offsets, dloss, dlogits, s);
}
#endif

}  // namespace

Tensor balance_loss(const Tensor& logits, const Routing& r) {
  const RoutingSize s = size_of_routing("balance_loss", logits, r);
  check(s.tokens > 0 && logits.shape() == Shape({s.tokens, s.experts}), "balance_loss needs logits [{}, {}], found {}",
        s.tokens, s.experts, logits.shape().str());
  Tensor loss = Tensor::like(logits, {});
  dispatch_logits("balance_loss", logits, [&]<class T>(auto device) {
    forward(device, logits.data<T>(), r.offsets.data<int32_t>(), loss.data<T>(), s);
  });
  return record("balance_loss", loss, {logits},
                [logits = logits.detached(), offsets = r.offsets, s](const Tensor& dloss) -> Gradients {
                  Tensor dlogits = Tensor::like(logits);
                  dispatch_logits("balance_loss", logits, [&]<class T>(auto device) {
                    backward(device, logits.data<T>(), offsets.data<int32_t>(), dloss.data<T>(), dlogits.data<T>(), s);
                  });
                  return {dlogits};
                });
}

}  // namespace weft
