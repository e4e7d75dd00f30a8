// y = residual + x / (1 - p) where kept, else residual; dresidual = dy, dx = dy / (1 - p) where kept, else 0.
#include "engine/ops.h"
#include "engine/ops/masked.h"

namespace weft {
namespace {

template <class A>
struct AddDropout {
  A scale;
  WEFT_HD A operator()(bool kept, A residual, A x) const { return kept ? residual + x * scale : residual; }
};

}  // namespace

Tensor add_dropout(const Tensor& residual, const Tensor& x, double p, RngKey key) {
  check(p >= 0 && p < 1, "add_dropout's probability must be in [0, 1), found {}", p);
  check(residual.shape() == x.shape() && residual.dtype() == x.dtype() && residual.device() == x.device(),
        "add_dropout needs two tensors of one shape and dtype, found {} {} and {} {}", name_of(residual.dtype()),
        residual.shape().str(), name_of(x.dtype()), x.shape().str());
  if (p == 0) return add(residual, x);
  Tensor y = Tensor::like(x);
  on_device(x.device(), [&](auto device) {
    dispatch(device, x.dtype(), [&]<class T>() {
      using A = acc_t<T>;
      map_masked(device, x.numel(), Mask(key, p), AddDropout<A>{A(1 / (1 - p))}, y.data<T>(), residual.data<T>(),
                 x.data<T>());
    });
  });
  return record("add_dropout", y, {residual, x}, [p, key, need_x = x.needs_grad()](const Tensor& dy) -> Gradients {
    return {dy, need_x ? dropout(dy, p, key) : Tensor{}};
  });
}

}  // namespace weft
