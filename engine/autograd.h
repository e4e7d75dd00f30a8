// Reverse-mode differentiation on one tape. An op calls record() on its finished output with its inputs and a closure
// from dy to the inputs' gradients; what the closure captures is what is saved.
// A closure that needs its own output captures it before record() attaches the node, so no cycle can form.
#pragma once
#include <functional>
#include <vector>

#include "engine/tensor.h"

namespace weft {

// Gradients in the order of the op's inputs; no tensor where an input has none (check needs_grad() to skip the work).
// Each has its input's shape; its dtype may be narrower (backward converts when it adds).
using Gradients = std::vector<Tensor>;
using GradientFn = std::function<Gradients(const Tensor& dy)>;

struct Node {
  const char* op;
  uint64_t order;  // of creation: backward runs from the highest to the lowest
  Shape shape;
  DType dtype;
  std::vector<std::shared_ptr<Node>> inputs;  // null where an input needs no gradient
  GradientFn gradient;                        // empty on a leaf, and after it ran
  Tensor grad;                                // the sum so far; a leaf keeps it
  bool leaf = false;
  const char* layer = "";  // the memory scope's where the op ran
  Tensor copy;             // of a leaf: its values in a narrower dtype (keep_copy)
  Tensor rest;             // of a split leaf: what its values in bf16 lack of those in f32 (split_leaf)
  bool narrow_sums = false;

  // A part that grad still lacks: sum(), of the rows [N*K, D] that slots [N, K] give each of its own. Whoever runs
  // before the node does may take it over, and add it up on the way.
  struct Owed {
    Tensor rows, slots;
    std::function<Tensor()> sum;
  };
  Owed owed;
};

// Whether record() would attach a node to an op of these inputs: for an op that makes its gradients ahead.
bool records(const std::vector<Tensor>& inputs);

// Attaches a node to y when recording is on and an input needs a gradient; returns y.
Tensor record(const char* op, Tensor y, const std::vector<Tensor>& inputs, GradientFn gradient);

// For an op of several outputs: the closure gets what reached each of them, no tensor where nothing did.
using JointGradientFn = std::function<Gradients(std::vector<Tensor> dys)>;
// Attaches to each of ys a node in front of a common one: the closure runs once, after the gradients of all of ys.
std::vector<Tensor> record_joint(const char* op, std::vector<Tensor> ys, const std::vector<Tensor>& inputs,
                                 JointGradientFn gradient);

// x as a leaf: backward adds to its grad(), in x's dtype, and keeps it until clear_grad(). The first gradient becomes
// grad() itself, without a copy, where nothing else holds it.
Tensor leaf(const Tensor& x);

// A leaf of these f32 values for ops that run in bf16: its tensor holds the bf16 nearest to each, its node the other 16
// bits (Halves in engine/dtype.h). Both are the f32 master value, to its last bit, in the memory of that value alone,
// where a leaf that keeps a copy takes half as much again. To its optimizer and its gradients' sums it is an f32 leaf.
Tensor split_leaf(const Tensor& values);

// The values of any leaf in its own dtype, f32 of a split one. Not to be written into.
Tensor master_value(const Tensor& leaf);
// Writes them, and the copy where the leaf keeps one.
void set_master_value(const Tensor& leaf, const Tensor& values);

// What a leaf adds its gradients up in: its own dtype, or that of the first, if narrower: right where one is all.
enum class GradientSums : uint8_t { own, as_given };
void sum_gradients(const Tensor& leaf, GradientSums sums);  // own where it was never called

// From here on the leaf keeps a copy of its values in a narrower dtype, and cast() gives that. Whoever writes the values
// writes the copy too: optimizers do, with their updates, and set_master_value.
void keep_copy(const Tensor& leaf, DType dtype);
void join_copies(const std::vector<Tensor>& leaves);  // lays them one after another, as Tensor::joined wants them
Tensor kept_copy(const Tensor& leaf);   // with the leaf's node: its gradient is the leaf's; no tensor if it keeps none

// Adds d(loss)/d(leaf) to every leaf's grad(). loss has one element. Each node's closure is dropped as soon as it ran,
// so saved activations return to the allocator on the way; a graph can be walked once.
void backward(const Tensor& loss);

// What a profiler learns while a step runs (tools/bench_step): it is called when work was queued, and says whose all that
// was queued since the call before is. Ops that are recorded say so themselves.
enum class Work : uint8_t {
  forward,   // of the op that gave an output of this shape, or something outside autograd
  gradient,  // of that op
  sum,       // adding up what several uses gave as the gradient of that output
};
using WorkObserver = std::function<void(const char* name, const Shape& output, Work work)>;
void observe_work(WorkObserver observer);  // an empty one ends it
void queued(const char* name, const Shape& output = {}, Work work = Work::forward);

// While one lives, ops of this thread record nothing.
class NoGrad {
 public:
  NoGrad();
  ~NoGrad();
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

}  // namespace weft
