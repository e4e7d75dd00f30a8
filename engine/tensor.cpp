#include "engine/tensor.h"

#include <cstring>

#include "engine/autograd.h"
#include "engine/ops.h"

namespace weft {

Tensor Tensor::empty(const Shape& shape, DType dtype, Device device) {
  Tensor t;
  int64_t bytes = 0;
  check(!__builtin_mul_overflow(shape.numel(), size_of(dtype), &bytes), "shape {} is too large", shape.str());
  t.storage_ = std::make_shared<Storage>(bytes, device);
  t.shape_ = shape;
  t.dtype_ = dtype;
  return t;
}

Tensor Tensor::zeros(const Shape& shape, DType dtype, Device device) {
  Tensor t = empty(shape, dtype, device);
  zero(t);
  return t;
}

Tensor Tensor::to(Device to_device) const {
  if (!storage_ || to_device == device()) return *this;
  Tensor t = empty(shape_, dtype_, to_device);
  copy_bytes(t.raw(), to_device, raw(), device(), bytes());
  return t;
}

double Tensor::item() const {
  check(numel() == 1, "item() needs one element, found shape {}", shape_.str());
  if (dtype_ == DType::i32) return to_vector<int32_t>()[0];
  return dispatch(Cpu{}, dtype_, [&]<class T>() { return static_cast<double>(to_vector<T>()[0]); });
}

Tensor Tensor::rows(int64_t from, int64_t to) const {
  check(rank() >= 1 && 0 <= from && from <= to && to <= size(0), "rows [{}, {}) of shape {}", from, to, shape_.str());
  Tensor t = detached();
  t.shape_.set(0, to - from);
  t.offset_ += from * (size(0) == 0 ? 0 : numel() / size(0)) * size_of(dtype_);
  return t;
}

std::vector<Tensor> Tensor::cut(const std::vector<Shape>& shapes) const {
  std::vector<Tensor> parts;
  int64_t from = 0;
  for (const Shape& shape : shapes) {
    Tensor t = detached();
    t.storage_ = std::shared_ptr<Storage>(storage_.get(), [whole = storage_](Storage*) {});
    t.offset_ += from * size_of(dtype_);
    t.shape_ = shape;
    from += shape.numel();
    parts.push_back(std::move(t));
  }
  check(from == numel(), "a tensor of shape {} was cut into parts of {} elements", shape_.str(), from);
  return parts;
}

Tensor Tensor::joined(const std::vector<Tensor>& parts) {
  check(!parts.empty(), "joined needs a part");
  Tensor t = parts[0].detached();
  int64_t elements = 0;
  for (const Tensor& p : parts) {
    if (p.storage_.get() != t.storage_.get() || p.dtype_ != t.dtype_ ||
        p.offset_ != t.offset_ + elements * size_of(t.dtype_))
      return {};
    elements += p.numel();
  }
  t.shape_ = {elements};
  return t;
}

Tensor Tensor::view(const Shape& shape) const {
  check(shape.numel() == numel(), "a tensor of shape {} was viewed as {}", shape_.str(), shape.str());
  Tensor t = detached();
  t.shape_ = shape;
  return t;
}

Tensor Tensor::detached() const {
  Tensor t = *this;
  t.node_ = nullptr;
  t.squares_ = nullptr;
  return t;
}

Tensor Tensor::grad() const { return node_ ? node_->grad : Tensor{}; }

void Tensor::clear_grad() const {
  if (node_) node_->grad = {};
}

void Tensor::set_squares(const Tensor& squares) {
  check(!squares || (squares.dtype() == DType::f32 && squares.numel() > 0 && squares.device() == device()),
        "sums of squares are f32 on the tensor's device, found {} {}", name_of(squares.dtype()), squares.shape().str());
  squares_ = squares ? std::make_shared<const Tensor>(squares.detached()) : nullptr;
}

}  // namespace weft
