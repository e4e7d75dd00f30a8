// Part i of x is columns [starts[i], starts[i + 1]) of each row; dx has the parts' gradients side by side.
#include "engine/ops.h"
#include "engine/ops/columns.h"

namespace weft {

std::vector<Tensor> split_last(const Tensor& x, const std::vector<int64_t>& widths) {
  check(x.rank() >= 1 && !widths.empty(), "split_last cuts the last axis into parts, found {} and {} parts",
        x.shape().str(), widths.size());
  const int64_t rows = x.shape().rows(), item = size_of(x.dtype()), pitch = x.size(-1) * item;
  std::vector<Tensor> parts;
  int64_t start = 0;
  for (const int64_t width : widths) {
    check(width > 0 && start + width <= x.size(-1), "split_last of {} has no columns [{}, {})", x.shape().str(), start,
          start + width);
    Shape shape = x.shape();
    shape.set(-1, width);
    parts.push_back(Tensor::like(x, shape));
    on_device(x.device(), [&](auto device) {
      copy_columns(device, rows, width * item, {static_cast<char*>(parts.back().raw()), width * item},
                   {static_cast<char*>(x.raw()) + start * item, pitch});
    });
    start += width;
  }
  check(start == x.size(-1), "split_last's parts have {} columns together, x {}", start, x.shape().str());
  return record_joint("split_last", parts, {x},
                      [widths, rows, item, pitch, shape = x.shape(), dtype = x.dtype(),
                       where = x.device()](std::vector<Tensor> dys) -> Gradients {
    const Tensor dx = Tensor::empty(shape, dtype, where);
    char* to = static_cast<char*>(dx.raw());
    for (size_t i = 0; i < widths.size(); ++i) {
      if (!dys[i]) dys[i] = Tensor::zeros({rows, widths[i]}, dtype, where);
      on_device(where, [&](auto device) {
        copy_columns(device, rows, widths[i] * item, {to, pitch}, {static_cast<char*>(dys[i].raw()), widths[i] * item});
      });
      to += widths[i] * item;
    }
    return {dx};
  });
}

}  // namespace weft
