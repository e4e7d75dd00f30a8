// y = x in another dtype; dx = dy (backward converts where it adds). A leaf that keeps a copy in that dtype has done the
// work: its copy is y; a split one gives its master values where those are wanted. In place: to = x.
#include "engine/ops.h"
#include "engine/ops/elementwise.h"

namespace weft {
namespace {

struct Same {
  template <class A>
  WEFT_HD A operator()(A x) const {
    return x;
  }
};

}  // namespace

void copy_into(const Tensor& to, const Tensor& x) {
  check(to.numel() == x.numel(), "{} was copied into {}", x.shape().str(), to.shape().str());
  if (to.dtype() == x.dtype()) return copy_bytes(to.raw(), to.device(), x.raw(), x.device(), x.bytes());
  check(to.device() == x.device(), "copy_into converts on one device, found {} and {}", name_of(x.device()),
        name_of(to.device()));
  on_device(x.device(), [&](auto device) {
    dispatch(device, to.dtype(), [&]<class Y>() {
      dispatch(device, x.dtype(), [&]<class X>() {
        map_elements(device, x.numel(), Same{}, to.data<Y>(), x.data<X>());
      });
    });
  });
}

Tensor cast(const Tensor& x, DType dtype) {
  if (x.dtype() == dtype) return x;
  if (const Tensor copy = kept_copy(x); copy && copy.dtype() == dtype) return copy;
  Tensor y = Tensor::empty(x.shape(), dtype, x.device());
  copy_into(y, x.node() && x.node()->leaf ? master_value(x) : x.detached());
  return record("cast", y, {x}, [](const Tensor& dy) -> Gradients { return {dy}; });
}

}  // namespace weft
