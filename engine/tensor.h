// Tensor: a dense, row-major array on one device. A small value: copying it is cheap and shares the data.
// Views are reshapes and cuts along the first axis; there are no strides. A tensor made by a differentiable op also
// carries the node that computes its inputs' gradients (engine/autograd.h).
#pragma once
#include <memory>
#include <span>
#include <vector>

#include "engine/dtype.h"
#include "engine/shape.h"
#include "engine/storage.h"

namespace weft {

struct Node;

class Tensor {
 public:
  Tensor() = default;  // no tensor at all: "no bias", "no gradient"
  static Tensor empty(const Shape& shape, DType dtype, Device device);  // uninitialised
  static Tensor zeros(const Shape& shape, DType dtype, Device device);
  // A tensor like x, uninitialised, with another shape where one is given.
  static Tensor like(const Tensor& x) { return empty(x.shape(), x.dtype(), x.device()); }
  static Tensor like(const Tensor& x, const Shape& shape) { return empty(shape, x.dtype(), x.device()); }
  // Copies host values (float, bf16, double or int32_t) to a device.
  template <class T>
  static Tensor from(std::span<const T> values, const Shape& shape, Device device) {
    check(static_cast<int64_t>(values.size()) == shape.numel(), "{} values for shape {}", values.size(), shape.str());
    Tensor t = empty(shape, dtype_of<T>, device);
    copy_bytes(t.raw(), device, values.data(), Device::cpu, t.bytes());
    return t;
  }
  template <class T>
  static Tensor from(const std::vector<T>& values, const Shape& shape, Device device) {
    return from(std::span<const T>(values), shape, device);
  }

  explicit operator bool() const { return storage_ != nullptr; }
  const Shape& shape() const { return shape_; }
  int64_t size(int axis) const { return shape_[axis]; }
  int rank() const { return shape_.rank(); }
  int64_t numel() const { return shape_.numel(); }
  int64_t bytes() const { return numel() * size_of(dtype_); }
  DType dtype() const { return dtype_; }
  Device device() const { return storage_ ? storage_->device() : Device::cpu; }
  void* raw() const { return static_cast<char*>(storage_ ? storage_->data() : nullptr) + offset_; }
  // The elements; T must be the dtype's type. nullptr for no tensor, so optional inputs pass through.
  template <class T>
  T* data() const {
    if (!storage_) return nullptr;
    check(dtype_of<T> == dtype_, "a tensor of {} was read as {}", name_of(dtype_), name_of(dtype_of<T>));
    return static_cast<T*>(raw());
  }

  // A copy on another device; this tensor itself when it is there already. Not differentiable.
  Tensor to(Device device) const;
  // The elements as host values; T must be the dtype's type.
  template <class T>
  std::vector<T> to_vector() const {
    std::vector<T> values(static_cast<size_t>(numel()));
    copy_bytes(values.data(), Device::cpu, data<T>(), device(), bytes());
    return values;
  }
  // The single element of a floating or i32 tensor, as a double. Waits for the device.
  double item() const;
  // Elements [from, to) of the first axis, sharing data. Not differentiable.
  Tensor rows(int64_t from, int64_t to) const;
  // The elements as tensors of these shapes one after another, sharing data; each counts as the sole owner of its part,
  // so this tensor is to be let go. Not differentiable.
  std::vector<Tensor> cut(const std::vector<Shape>& shapes) const;
  // Tensors that lie one after another in one block of memory, as one [elements] sharing data; no tensor where they do
  // not. Not differentiable.
  static Tensor joined(const std::vector<Tensor>& parts);
  // The same elements under another shape, sharing data, without a node; ops.h has the differentiable reshape.
  Tensor view(const Shape& shape) const;
  // This data without its node and its sums of squares.
  Tensor detached() const;
  // True when no other tensor shares the data, so it may be overwritten.
  bool sole_owner() const { return storage_.use_count() == 1; }

  // Autograd: see engine/autograd.h.
  bool needs_grad() const { return node_ != nullptr; }
  const std::shared_ptr<Node>& node() const { return node_; }
  void set_node(std::shared_ptr<Node> node) { node_ = std::move(node); }
  // The gradient that backward left on a leaf; no tensor before that.
  Tensor grad() const;
  void clear_grad() const;
  // The sums of squares of fixed parts of the elements, f32, where the kernel that wrote them gave those along: for
  // squared_norm. Copies of this tensor have them, tensors made from it do not; who writes into it takes them off.
  const Tensor* squares() const { return squares_.get(); }
  void set_squares(const Tensor& squares);

 private:
  std::shared_ptr<Storage> storage_;
  int64_t offset_ = 0;  // bytes
  Shape shape_;
  DType dtype_ = DType::f32;
  std::shared_ptr<Node> node_;
  std::shared_ptr<const Tensor> squares_;
};

}  // namespace weft
