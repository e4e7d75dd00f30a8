// Sizes of a dense row-major tensor, outermost first, at most 4 axes.
#pragma once
#include <array>
#include <initializer_list>
#include <string>

#include "engine/check.h"

namespace weft {

class Shape {
 public:
  static constexpr int kMaxRank = 4;
  Shape() = default;  // a scalar: rank 0, one element
  Shape(std::initializer_list<int64_t> dims) {
    check(dims.size() <= kMaxRank, "a shape has at most {} axes, found {}", kMaxRank, dims.size());
    for (const int64_t d : dims) push_back(d);
  }
  int rank() const { return rank_; }
  // Axis i; negative counts from the end.
  int64_t operator[](int i) const {
    const int axis = i < 0 ? i + rank_ : i;
    check(axis >= 0 && axis < rank_, "axis {} of shape {}", i, str());
    return dims_[axis];
  }
  void set(int i, int64_t size) { dims_[i < 0 ? i + rank_ : i] = size; }
  void push_back(int64_t d) {
    check(rank_ < kMaxRank && d >= 0, "axis of size {} added to shape {}", d, str());
    dims_[rank_++] = d;
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < rank_; ++i)
      check(!__builtin_mul_overflow(n, dims_[i], &n), "shape {} has more than 2^63 elements", str());
    return n;
  }
  // Product of all axes but the last: how many rows a matrix view has.
  int64_t rows() const { return rank_ == 0 ? 1 : leading(rank_ - 1); }
  int64_t leading(int axes) const {
    int64_t n = 1;
    for (int i = 0; i < axes; ++i) n *= dims_[i];
    return n;
  }
  bool operator==(const Shape& o) const {
    if (rank_ != o.rank_) return false;
    for (int i = 0; i < rank_; ++i)
      if (dims_[i] != o.dims_[i]) return false;
    return true;
  }
  std::string str() const {
    std::string s = "[";
    for (int i = 0; i < rank_; ++i) s += (i ? ", " : "") + std::to_string(dims_[i]);
    return s + "]";
  }

 private:
  std::array<int64_t, kMaxRank> dims_{};
  int rank_ = 0;
};

}  // namespace weft
