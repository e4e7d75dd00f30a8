// y = x / (1 - p) where Mask(key, p) keeps it, else 0; dx = the same of dy.
#include "engine/ops.h"
#include "engine/ops/masked.h"

namespace weft {
namespace {

template <class A>
struct Dropped {
  A scale;
  WEFT_HD A operator()(bool kept, A x) const { return kept ? x * scale : A(0); }
};

Tensor dropped(const Tensor& x, double p, RngKey key) {
  const Mask mask(key, p);
  Tensor y = Tensor::like(x);
  on_device(x.device(), [&](auto device) {
    dispatch(device, x.dtype(), [&]<class T>() {
      using A = acc_t<T>;
      map_masked(device, x.numel(), mask, Dropped<A>{A(mask.scale())}, y.data<T>(), x.data<T>());
    });
  });
  return y;
}

}  // namespace

Tensor dropout(const Tensor& x, double p, RngKey key) {
  check(p >= 0 && p < 1, "dropout's probability must be in [0, 1), found {}", p);
  if (p == 0) return x;
  return record("dropout", dropped(x, p, key), {x},
                [p, key](const Tensor& dy) -> Gradients { return {dropped(dy, p, key)}; });
}

}  // namespace weft
