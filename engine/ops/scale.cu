// y = s x; dx = s dy.
#include "engine/ops.h"
#include "engine/ops/elementwise.h"

namespace weft {
namespace {

struct Scale {
  double s;
  template <class A>
  WEFT_HD A operator()(A x) const {
    return static_cast<A>(s) * x;
  }
};

Tensor scaled(const Tensor& x, double s) {
  Tensor y = Tensor::like(x);
  on_device(x.device(), [&](auto device) {
    dispatch(device, x.dtype(), [&]<class T>() {
      map_elements(device, x.numel(), Scale{s}, y.data<T>(), x.data<T>());
    });
  });
  return y;
}

}  // namespace

Tensor scale(const Tensor& x, double s) {
  return record("scale", scaled(x, s), {x}, [s](const Tensor& dy) -> Gradients { return {scaled(dy, s)}; });
}

}  // namespace weft
