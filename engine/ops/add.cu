// y = a + b; da = db = dy. In place: sum += x.
#include "engine/ops.h"
#include "engine/ops/elementwise.h"

namespace weft {
namespace {

struct Add {
  template <class A>
  WEFT_HD A operator()(A a, A b) const {
    return a + b;
  }
};

}  // namespace

Tensor add(const Tensor& a, const Tensor& b) {
  check(a.shape() == b.shape() && a.dtype() == b.dtype() && a.device() == b.device(),
        "add needs two tensors of one shape and dtype, found {} {} and {} {}", name_of(a.dtype()), a.shape().str(),
        name_of(b.dtype()), b.shape().str());
  Tensor y = Tensor::like(a);
  on_device(a.device(), [&](auto device) {
    dispatch(device, a.dtype(), [&]<class T>() {
      map_elements(device, a.numel(), Add{}, y.data<T>(), a.data<T>(), b.data<T>());
    });
  });
  return record("add", y, {a, b}, [](const Tensor& dy) -> Gradients { return {dy, dy}; });
}

void add_into(const Tensor& sum, const Tensor& x) {
  check(sum.numel() == x.numel() && sum.device() == x.device(), "{} was added into {}", x.shape().str(),
        sum.shape().str());
  on_device(x.device(), [&](auto device) {
    dispatch(device, sum.dtype(), [&]<class S>() {
      dispatch(device, x.dtype(), [&]<class X>() {
        map_elements(device, x.numel(), Add{}, sum.data<S>(), sum.data<S>(), x.data<X>());
      });
    });
  });
}

}  // namespace weft
