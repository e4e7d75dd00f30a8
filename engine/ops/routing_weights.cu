// w[n, k] = exp(l[n, e_k]) / sum_j exp(l[n, e_j]) over the chosen experts e; dl[n, e_k] = w_k (dw_k - sum_j dw_j w_j),
// and 0 for experts that were not chosen.
#include <cmath>

#include "engine/cpu/parallel.h"
#include "engine/ops/routing.h"
#if WEFT_CUDA
#include "engine/cuda/stream.h"
#endif

namespace weft {
namespace {

// One token.
template <class T>
WEFT_HD void weights_of(const T* logits, const int32_t* experts, T* weights, int64_t k) {
  T largest = logits[experts[0]], total = 0;
  for (int64_t i = 1; i < k; ++i) largest = logits[experts[i]] > largest ? logits[experts[i]] : largest;
  for (int64_t i = 0; i < k; ++i) total += weights[i] = exp(logits[experts[i]] - largest);
  for (int64_t i = 0; i < k; ++i) weights[i] /= total;
}
template <class T>
WEFT_HD void logits_gradient(const T* weights, const T* dweights, const int32_t* experts, T* dlogits, int64_t e,
                             int64_t k) {
  T dot = 0;
  for (int64_t i = 0; i < k; ++i) dot += weights[i] * dweights[i];
  for (int64_t i = 0; i < e; ++i) dlogits[i] = 0;
  for (int64_t i = 0; i < k; ++i) dlogits[experts[i]] = weights[i] * (dweights[i] - dot);
}

template <class T>
void forward(Cpu, const T* logits, const int32_t* experts, T* weights, const RoutingSize& s) {
  parallel_for(s.tokens, 256, [=](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n)
      weights_of(logits + n * s.experts, experts + n * s.chosen, weights + n * s.chosen, s.chosen);
  });
}
template <class T>
void backward(Cpu, const T* weights, const T* dweights, const int32_t* experts, T* dlogits, const RoutingSize& s) {
  parallel_for(s.tokens, 256, [=](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n)
      logits_gradient(weights + n * s.chosen, dweights + n * s.chosen, experts + n * s.chosen, dlogits + n * s.experts,
                      s.experts, s.chosen);
  });
}

#if WEFT_CUDA
__global__ void routing_weights_forward(const float* logits, const int32_t* experts, float* weights, RoutingSize s) {
  if (const int64_t n = element_index(); n < s.tokens)
    weights_of(logits + n * s.experts, experts + n * s.chosen, weights + n * s.chosen, s.chosen);
}
__global__ void routing_weights_backward(const float* weights, const float* dweights, const int32_t* experts,
                                         float* dlogits, RoutingSize s) {
  if (const int64_t n = element_index(); n < s.tokens)
    logits_gradient(weights + n * s.chosen, dweights + n * s.chosen, experts + n * s.chosen, dlogits + n * s.experts,
                    s.experts, s.chosen);
}
void forward(Cuda, const float* logits, const int32_t* experts, float* weights, const RoutingSize& s) {
  launch_elements(routing_weights_forward, s.tokens, logits, experts, weights, s);
}
void backward(Cuda, const float* weights, const float* dweights, const int32_t* experts, float* dlogits,
              const RoutingSize& s) {
  launch_elements(routing_weights_backward, s.tokens, weights, dweights, experts, dlogits, s);
}
#endif

}  // namespace

Tensor routing_weights(const Tensor& logits, const Routing& r) {
  const RoutingSize s = size_of_routing("routing_weights", logits, r);
  check(logits.shape() == Shape({s.tokens, s.experts}), "routing_weights needs logits [{}, {}], found {}", s.tokens,
        s.experts, logits.shape().str());
  Tensor weights = Tensor::like(logits, {s.tokens, s.chosen});
  dispatch_logits("routing_weights", logits, [&]<class T>(auto device) {
    forward(device, logits.data<T>(), r.experts.data<int32_t>(), weights.data<T>(), s);
  });
  return record("routing_weights", weights, {logits},
                [weights, experts = r.experts, s](const Tensor& dweights) -> Gradients {
                  Tensor dlogits = Tensor::like(weights, {s.tokens, s.experts});
                  dispatch_logits("routing_weights", weights, [&]<class T>(auto device) {
                    backward(device, weights.data<T>(), dweights.data<T>(), experts.data<int32_t>(), dlogits.data<T>(),
                             s);
                  });
                  return {dlogits};
                });
}

}  // namespace weft
