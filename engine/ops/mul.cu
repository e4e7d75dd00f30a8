// y = a b; da = dy b, db = dy a.
#include "engine/ops.h"
#include "engine/ops/elementwise.h"

namespace weft {
namespace {

struct Multiply {
  template <class A>
  WEFT_HD A operator()(A a, A b) const {
    return a * b;
  }
};

Tensor product(const Tensor& a, const Tensor& b) {
  Tensor y = Tensor::like(a);
  on_device(a.device(), [&](auto device) {
    dispatch(device, a.dtype(), [&]<class T>() {
      map_elements(device, a.numel(), Multiply{}, y.data<T>(), a.data<T>(), b.data<T>());
    });
  });
  return y;
}

}  // namespace

Tensor mul(const Tensor& a, const Tensor& b) {
  check(a.shape() == b.shape() && a.dtype() == b.dtype() && a.device() == b.device(),
        "mul needs two tensors of one shape and dtype, found {} {} and {} {}", name_of(a.dtype()), a.shape().str(),
        name_of(b.dtype()), b.shape().str());
  const bool for_a = a.needs_grad(), for_b = b.needs_grad();
  return record("mul", product(a, b), {a, b},
                [a = for_b ? a.detached() : Tensor{},
                 b = for_a ? b.detached() : Tensor{}](const Tensor& dy) -> Gradients {
                  return {b ? product(dy, b) : Tensor{}, a ? product(dy, a) : Tensor{}};
                });
}

}  // namespace weft
