// Shared by the ops that take a Routing: its sizes, the check that it fits their tensors, and their dispatch.
#pragma once
#include <type_traits>

#include "engine/ops.h"

namespace weft {

struct RoutingSize {
  int64_t tokens, chosen, experts;
};

// The sizes of r, which must lie where x lies. `op` is for the message.
inline RoutingSize size_of_routing(const char* op, const Tensor& x, const Routing& r) {
  check(r.slots.rank() == 2 && r.experts.shape() == r.slots.shape() && r.sources.numel() == r.slots.numel() &&
            r.offsets.numel() >= 2 && r.slots.device() == x.device(),
        "{} needs a routing on the device of its input, {}, found slots {} on {}", op, name_of(x.device()),
        r.slots.shape().str(), name_of(r.slots.device()));
  return {r.slots.size(0), r.slots.size(1), r.offsets.numel() - 1};
}

// Calls f(device).template operator()<T>() for the types that router logits have: f32, and f64 on the CPU.
template <class F>
void dispatch_logits(const char* op, const Tensor& logits, F&& f) {
  check(logits.dtype() == DType::f32 || (logits.dtype() == DType::f64 && logits.device() == Device::cpu),
        "{} needs f32 (or f64 on the CPU), found {} on {}", op, name_of(logits.dtype()), name_of(logits.device()));
  on_device(logits.device(), [&]<class D>(D device) {
    if constexpr (std::is_same_v<D, Cpu>)
      if (logits.dtype() == DType::f64) return f.template operator()<double>(device);
    f.template operator()<float>(device);
  });
}

}  // namespace weft
