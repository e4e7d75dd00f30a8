// y = x s / (1 - p) where kept, else 0, s = 1 / (1 + exp(-x)); dx = dy s (1 + x (1 - s)) / (1 - p) where kept, else 0.
// Only x is saved: neither silu(x) nor the mask.
#include "engine/cpu/exp.h"
#include "engine/ops.h"
#include "engine/ops/masked.h"

namespace weft {
namespace {

template <class A>
struct SiluDropout {
  A scale;
  WEFT_HD A operator()(bool kept, A x) const {
    const A y = x / (1 + loop_exp(-x)) * scale;
    return kept ? y : A(0);
  }
};
template <class A>
struct SiluDropoutGradient {
  A scale;
  WEFT_HD A operator()(bool kept, A x, A dy) const {
    const A s = 1 / (1 + loop_exp(-x));
    const A dx = dy * scale * s * (1 + x * (1 - s));
    return kept ? dx : A(0);
  }
};

}  // namespace

Tensor silu_dropout(const Tensor& x, double p, RngKey key) {
  check(p >= 0 && p < 1, "silu_dropout's probability must be in [0, 1), found {}", p);
  if (p == 0) return silu(x);
  const Mask mask(key, p);
  const double scale = mask.scale();
  Tensor y = Tensor::like(x);
  on_device(x.device(), [&](auto device) {
    dispatch(device, x.dtype(), [&]<class T>() {
      using A = acc_t<T>;
      map_masked(device, x.numel(), mask, SiluDropout<A>{A(scale)}, y.data<T>(), x.data<T>());
    });
  });
  return record("silu_dropout", y, {x}, [x = x.detached(), mask, scale](const Tensor& dy) -> Gradients {
    Tensor dx = Tensor::like(x);
    on_device(x.device(), [&](auto device) {
      dispatch(device, x.dtype(), [&]<class T>() {
        using A = acc_t<T>;
        map_masked(device, x.numel(), mask, SiluDropoutGradient<A>{A(scale)}, dx.data<T>(), x.data<T>(), dy.data<T>());
      });
    });
    return {dx};
  });
}

}  // namespace weft
