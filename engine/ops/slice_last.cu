// y[.., c] = x[.., from + c]; dx[.., from + c] = dy[.., c], 0 elsewhere.
#include "engine/ops.h"
#include "engine/ops/columns.h"

namespace weft {

Tensor slice_last(const Tensor& x, int64_t from, int64_t to) {
  check(x.rank() >= 1 && 0 <= from && from <= to && to <= x.size(-1), "columns [{}, {}) of shape {}", from, to,
        x.shape().str());
  Shape shape = x.shape();
  shape.set(-1, to - from);
  const int64_t item = size_of(x.dtype()), width = (to - from) * item, pitch = x.size(-1) * item, at = from * item;
  Tensor y = Tensor::like(x, shape);
  on_device(x.device(), [&](auto device) {
    copy_columns(device, shape.rows(), width, {static_cast<char*>(y.raw()), width},
                 {static_cast<char*>(x.raw()) + at, pitch});
  });
  return record("slice_last", y, {x}, [shape = x.shape(), width, pitch, at](const Tensor& dy) -> Gradients {
    Tensor dx = Tensor::zeros(shape, dy.dtype(), dy.device());
    on_device(dy.device(), [&](auto device) {
      copy_columns(device, shape.rows(), width, {static_cast<char*>(dx.raw()) + at, pitch},
                   {static_cast<char*>(dy.raw()), width});
    });
    return {dx};
  });
}

}  // namespace weft
