// The parameters of a model: one ordered list under dotted names. Layers draw theirs from a Scope; optimizers choose
// theirs by Kind.
#pragma once
#include <initializer_list>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "engine/allocator.h"
#include "engine/ops.h"

namespace weft {

// What a parameter is to an optimizer. A rank-3 matrix [E, O, I] is E matrices, one per expert.
enum class Kind : uint8_t { matrix, vector, embedding };

struct Parameter {
  std::string name;
  Shape shape;
  Kind kind;
  Tensor value;  // a leaf of f32 values, whole or split; no tensor when the parameters are only counted
  bool of_experts() const { return shape.rank() == 3; }
};

// How a parameter starts.
struct Init {
  enum class Kind : uint8_t { constant, normal } kind;
  double value;  // the constant, or the standard deviation
};
inline Init normal(double std) { return {Init::Kind::normal, std}; }
inline Init ones() { return {Init::Kind::constant, 1.0}; }
inline Init zeros() { return {Init::Kind::constant, 0.0}; }

// A name that lives as long as the process, as MemoryScope wants it.
inline const char* interned(const std::string& name) {
  static std::set<std::string> names;
  return names.insert(name).first->c_str();
}

class Params {
 public:
  enum class Build : uint8_t { allocate, count_only };
  explicit Params(Build build) : build_(build) {}
  // For a model that computes in f32, or in bf16: then weights lie in memory in bf16 too, for the ops that run in it.
  explicit Params(DType compute = DType::f32) : compute_(compute) {}

  const std::vector<Parameter>& list() const { return list_; }
  Build build() const { return build_; }
  DType compute() const { return compute_; }
  // The parameter of that name; null when there is none.
  const Parameter* find(std::string_view name) const {
    for (const Parameter& p : list_)
      if (p.name == name) return &p;
    return nullptr;
  }
  // The values of some kinds, in order.
  std::vector<Tensor> of(std::initializer_list<Kind> kinds) const {
    std::vector<Tensor> values;
    for (const Parameter& p : list_)
      for (const Kind k : kinds)
        if (p.kind == k) values.push_back(p.value);
    return values;
  }
  std::vector<Tensor> all() const { return of({Kind::matrix, Kind::vector, Kind::embedding}); }
  int64_t count() const {
    int64_t n = 0;
    for (const Parameter& p : list_) n += p.shape.numel();
    return n;
  }
  void clear_grads() const {
    for (const Parameter& p : list_) p.value.clear_grad();
  }
  void sum_gradients(GradientSums sums) const {
    for (const Parameter& p : list_) weft::sum_gradients(p.value, sums);
  }
  void add(Parameter p) {
    check(!find(p.name), "parameter {} is made once", p.name);
    list_.push_back(std::move(p));
  }

 private:
  std::vector<Parameter> list_;
  Build build_ = Build::allocate;
  DType compute_ = DType::f32;
};

// Where a layer makes its parameters: a place in the dotted names. Each parameter's random numbers depend only on the
// seed and its full name, so models share the initial weights of what they share.
class Scope {
 public:
  Scope(Params& params, Device device, uint64_t seed) : params_(&params), device_(device), seed_(seed) {}

  Scope operator/(std::string_view name) const {
    Scope inner = *this;
    inner.prefix_ = path(name);
    return inner;
  }
  // An f32 leaf; the experts' of a model that computes in bf16 is a bf16 one, split (engine/autograd.h).
  Tensor param(std::string_view name, const Shape& shape, Init init, Kind kind) const {
    Parameter p{path(name), shape, kind, {}};
    if (!counting()) {
      MemoryScope memory(Category::parameter, interned(prefix_));
      const Tensor value = Tensor::empty(shape, DType::f32, device_);
      if (init.kind == Init::Kind::normal)
        fill_normal(value, init.value, RngKey{seed_, stream_of(p.name)});
      else
        fill(value, init.value);
      p.value = as_leaf(p, value);
    }
    const Tensor value = p.value;
    params_->add(std::move(p));
    return value;
  }
  // Copies of these values are kept one after another: for an op that takes them as one (matmul_joined).
  void join(const std::vector<Tensor>& values) const {
    if (!counting() && params_->compute() != DType::f32) join_copies(values);
  }
  const std::string& prefix() const { return prefix_; }
  Device device() const { return device_; }
  bool counting() const { return params_->build() == Params::Build::count_only; }

 private:
  // Where products run in bf16, experts' weights, which nothing else reads, are split; of others ops read f32 too.
  Tensor as_leaf(const Parameter& p, const Tensor& value) const {
    if (params_->compute() == DType::f32) return leaf(value);
    if (p.of_experts()) return split_leaf(value);
    const Tensor whole = leaf(value);
    keep_copy(whole, params_->compute());
    return whole;
  }
  std::string path(std::string_view name) const { return (prefix_.empty() ? "" : prefix_ + ".") + std::string(name); }

  Params* params_;
  Device device_;
  uint64_t seed_;
  std::string prefix_;
};

}  // namespace weft
