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
template <class A>
struct AddDropoutGradient {
  A scale;
  WEFT_HD A operator()(bool kept, A dy) const { return kept ? dy * scale : A(0); }
};

}  // namespace

Tensor add_dropout(const Tensor& residual, const Tensor& x, double p, RngKey key) {
  check(p >= 0 && p < 1, "add_dropout's probability must be in [0, 1), found {}", p);
  check(residual.shape() == x.shape() && residual.dtype() == x.dtype() && residual.device() == x.device(),
        "add_dropout needs two tensors of one shape and dtype, found {} {} and {} {}", name_of(residual.dtype()),
        residual.shape().str(), name_of(x.dtype()), x.shape().str());
  if (p == 0) return add(residual, x);
  const Mask mask(key, p);
  const double scale = 1 / (1 - p);
  Tensor y = Tensor::like(x);
  on_device(x.device(), [&](auto device) {
    dispatch(device, x.dtype(), [&]<class T>() {
      using A = acc_t<T>;
      map_masked(device, x.numel(), mask, AddDropout<A>{A(scale)}, y.data<T>(), residual.data<T>(), x.data<T>());
    });
  });
  return record("add_dropout", y, {residual, x},
                [mask, scale, need_x = x.needs_grad()](const Tensor& dy) -> Gradients {
                  if (!need_x) return {dy, {}};
                  Tensor dx = Tensor::like(dy);
                  on_device(dy.device(), [&](auto device) {
                    dispatch(device, dy.dtype(), [&]<class T>() {
                      using A = acc_t<T>;
                      map_masked(device, dy.numel(), mask, AddDropoutGradient<A>{A(scale)}, dx.data<T>(), dy.data<T>());
                    });
                  });
                  return {dy, dx};
                });
}

}  // namespace weft
