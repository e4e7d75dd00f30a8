// parts[i][.., c] = x[.., starts[i] + c]. All parts' gradients go into one dx, each copied once to its columns: a dx
// for each of three parts, with zeros and sums as wide as x, would move five times the bytes.
#include <memory>

#include "engine/ops.h"
#include "engine/ops/columns.h"

namespace weft {
namespace {

// What the parts' nodes share with the node between them and x, which passes dx on.
struct Split {
  Shape shape;  // of x
  std::vector<int64_t> widths, starts;
  Tensor dx;                  // from the first part's gradient on
  std::vector<bool> written;  // parts whose columns of dx are done

  Shape part_shape(size_t i) const {
    Shape part = shape;
    part.set(-1, widths[i]);
    return part;
  }
  // Copies part i out of a tensor like x, or into one.
  void take(size_t i, const Tensor& part, const Tensor& from) const {
    copy(i, columns(i, part), window(i, from), part);
  }
  void put(size_t i, const Tensor& part, const Tensor& into) const {
    copy(i, window(i, into), columns(i, part), part);
  }

 private:
  Columns columns(size_t i, const Tensor& part) const {
    return {static_cast<char*>(part.raw()), widths[i] * size_of(part.dtype())};
  }
  Columns window(size_t i, const Tensor& whole) const {
    const int64_t item = size_of(whole.dtype());
    return {static_cast<char*>(whole.raw()) + starts[i] * item, shape[-1] * item};
  }
  void copy(size_t i, Columns to, Columns from, const Tensor& part) const {
    on_device(part.device(), [&](auto device) {
      copy_columns(device, shape.rows(), widths[i] * size_of(part.dtype()), to, from);
    });
  }
};

}  // namespace

std::vector<Tensor> split_last(const Tensor& x, const std::vector<int64_t>& widths) {
  auto split = std::make_shared<Split>(x.shape(), widths);
  int64_t total = 0;
  for (const int64_t width : widths) {
    check(width > 0, "split_last needs positive widths, found {}", width);
    split->starts.push_back(total);
    total += width;
  }
  check(x.rank() >= 1 && total == x.size(-1), "split_last's widths must sum to the last axis of {}, found {}",
        x.shape().str(), total);
  split->written.resize(widths.size());

  const Tensor whole = record("split_last", x.detached(), {x}, [split](const Tensor& dx) -> Gradients {
    for (size_t i = 0; i < split->widths.size(); ++i)
      if (!split->written[i]) split->put(i, Tensor::zeros(split->part_shape(i), dx.dtype(), dx.device()), dx);
    split->dx = {};
    return {dx};
  });
  std::vector<Tensor> parts;
  for (size_t i = 0; i < widths.size(); ++i) {
    const Tensor part = Tensor::like(x, split->part_shape(i));
    split->take(i, part, x);
    parts.push_back(record("split_last part", part, {whole}, [split, i](const Tensor& dy) -> Gradients {
      const bool first = !split->dx;
      if (first) split->dx = Tensor::like(dy, split->shape);
      split->put(i, dy, split->dx);
      split->written[i] = true;
      return {first ? split->dx : Tensor{}};  // the node before holds it; the other parts write into that
    }));
  }
  return parts;
}

}  // namespace weft
