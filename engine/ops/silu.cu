// y = x s, s = 1 / (1 + exp(-x)); dx = dy s (1 + x (1 - s)).
#include "engine/cpu/exp.h"
#include "engine/ops.h"
#include "engine/ops/elementwise.h"

namespace weft {
namespace {

struct Silu {
  template <class A>
  WEFT_HD A operator()(A x) const {
    return x / (1 + loop_exp(-x));
  }
};
struct SiluGradient {
  template <class A>
  WEFT_HD A operator()(A x, A dy) const {
    const A s = 1 / (1 + loop_exp(-x));
    return dy * s * (1 + x * (1 - s));
  }
};

}  // namespace

Tensor silu(const Tensor& x) {
  Tensor y = Tensor::like(x);
  on_device(x.device(), [&](auto device) {
    dispatch(device, x.dtype(), [&]<class T>() { map_elements(device, x.numel(), Silu{}, y.data<T>(), x.data<T>()); });
  });
  return record("silu", y, {x}, [x = x.detached()](const Tensor& dy) -> Gradients {
    Tensor dx = Tensor::like(x);
    on_device(x.device(), [&](auto device) {
      dispatch(device, x.dtype(), [&]<class T>() {
        map_elements(device, x.numel(), SiluGradient{}, dx.data<T>(), x.data<T>(), dy.data<T>());
      });
    });
    return {dx};
  });
}

}  // namespace weft
