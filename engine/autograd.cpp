#include "engine/autograd.h"

#include <algorithm>
#include <atomic>
#include <unordered_set>
#include <utility>

#include "engine/allocator.h"
#include "engine/ops.h"

namespace weft {
namespace {

thread_local bool recording = true;
std::atomic<uint64_t> next_order{0};
WorkObserver work_observer;

// Adds dy to the node's sum. A leaf's sum is its own memory: dy's if no one else holds that. Any other node first
// borrows dy, and adds in place only while nothing else holds it: an op may hand one dy to several inputs.
// A leaf's first gradient keeps the sums of its squares that came with it.
void accumulate(Node& node, const Tensor& dy) {
  check(dy.shape() == node.shape, "the gradient of {}'s output has shape {}, its value {}", node.op, dy.shape().str(),
        node.shape.str());
  if (node.grad && (node.leaf || node.grad.sole_owner())) {
    add_into(node.grad, dy);
    node.grad.set_squares({});
  } else if (node.grad) {
    node.grad = add(node.grad, dy.dtype() == node.grad.dtype() ? dy : cast(dy, node.grad.dtype()));
  } else if (node.leaf && dy.sole_owner() &&
             (dy.dtype() == node.dtype || (node.narrow_sums && size_of(dy.dtype()) < size_of(node.dtype)))) {
    node.grad = dy.detached();
    if (dy.squares()) node.grad.set_squares(*dy.squares());
    allocator(dy.device()).relabel(dy.raw(), Category::gradient, node.layer);
  } else if (node.leaf) {
    MemoryScope scope(Category::gradient, node.layer);
    node.grad = Tensor::empty(node.shape, node.dtype, dy.device());
    copy_into(node.grad, dy);
  } else {
    node.grad = dy.dtype() == node.dtype ? dy.detached() : cast(dy, node.dtype);
  }
}

Node& node_of(const Tensor& leaf) {
  check(leaf.node() && leaf.node()->leaf, "a leaf is needed, found {} {}", name_of(leaf.dtype()), leaf.shape().str());
  return *leaf.node();
}

}  // namespace

NoGrad::NoGrad() : before_(recording) { recording = false; }
NoGrad::~NoGrad() { recording = before_; }

bool records(const std::vector<Tensor>& inputs) {
  return recording && std::any_of(inputs.begin(), inputs.end(), [](const Tensor& x) { return x.needs_grad(); });
}

Tensor record(const char* op, Tensor y, const std::vector<Tensor>& inputs, GradientFn gradient) {
  y.set_node(nullptr);
  if (recording) queued(op, y.shape(), Work::forward);
  if (!records(inputs)) return y;
  auto node = std::make_shared<Node>(op, next_order++, y.shape(), y.dtype());
  for (const Tensor& x : inputs) node->inputs.push_back(x.node());
  node->gradient = std::move(gradient);
  node->layer = MemoryScope::layer();
  y.set_node(std::move(node));
  return y;
}

std::vector<Tensor> record_joint(const char* op, std::vector<Tensor> ys, const std::vector<Tensor>& inputs,
                                 JointGradientFn gradient) {
  auto arrived = std::make_shared<std::vector<Tensor>>(ys.size());
  // An output's gradient waits in `arrived`; the common node gets an empty tensor, which says that it has to run.
  const Tensor common = record(op, Tensor::empty({0}, ys[0].dtype(), ys[0].device()), inputs,
                               [arrived, gradient = std::move(gradient)](const Tensor&) -> Gradients {
                                 return gradient(std::exchange(*arrived, {}));
                               });
  for (size_t i = 0; i < ys.size(); ++i)
    ys[i] = record(op, ys[i], {common}, [arrived, i](const Tensor& dy) -> Gradients {
      const bool first = std::none_of(arrived->begin(), arrived->end(), [](const Tensor& t) { return bool(t); });
      (*arrived)[i] = dy;
      return {first ? Tensor::empty({0}, dy.dtype(), dy.device()) : Tensor{}};
    });
  return ys;
}

Tensor leaf(const Tensor& x) {
  Tensor t = x.detached();
  auto node = std::make_shared<Node>("leaf", next_order++, t.shape(), t.dtype());
  node->leaf = true;
  node->layer = MemoryScope::layer();
  t.set_node(std::move(node));
  return t;
}

Tensor split_leaf(const Tensor& values) {
  const Tensor t = leaf(Tensor::empty(values.shape(), DType::bf16, values.device()));
  t.node()->dtype = DType::f32;
  t.node()->rest = Tensor::empty(values.shape(), DType::u16, values.device());
  set_master_value(t, values);
  return t;
}

Tensor master_value(const Tensor& leaf) {
  const Node& node = node_of(leaf);
  if (!node.rest) return leaf.detached();
  const Tensor values = Tensor::empty(leaf.shape(), node.dtype, leaf.device());
  join_halves(values, leaf, node.rest);
  return values;
}

void set_master_value(const Tensor& leaf, const Tensor& values) {
  const Node& node = node_of(leaf);
  if (node.rest) return split_halves(values, leaf, node.rest);
  copy_into(leaf, values);
  if (node.copy) copy_into(node.copy, values);
}

void sum_gradients(const Tensor& leaf, GradientSums sums) {
  node_of(leaf).narrow_sums = sums == GradientSums::as_given;
}

void observe_work(WorkObserver observer) { work_observer = std::move(observer); }

void queued(const char* name, const Shape& output, Work work) {
  if (work_observer) work_observer(name, output, work);
}

void keep_copy(const Tensor& leaf, DType dtype) {
  Node& node = node_of(leaf);
  check(size_of(dtype) < size_of(leaf.dtype()), "a copy in {} is kept of a leaf in a wider dtype, found {} {}",
        name_of(dtype), name_of(leaf.dtype()), leaf.shape().str());
  const MemoryScope scope(Category::parameter, node.layer);
  node.copy = Tensor::empty(leaf.shape(), dtype, leaf.device());
  copy_into(node.copy, leaf.detached());
}

void join_copies(const std::vector<Tensor>& leaves) {
  std::vector<Shape> shapes;
  int64_t elements = 0;
  for (const Tensor& leaf : leaves) {
    check(leaf.node() && leaf.node()->copy, "join_copies needs leaves that keep copies, found {}", leaf.shape().str());
    shapes.push_back(leaf.shape());
    elements += leaf.numel();
  }
  const Node& first = *leaves[0].node();
  const MemoryScope scope(Category::parameter, first.layer);
  const std::vector<Tensor> parts = Tensor::empty({elements}, first.copy.dtype(), first.copy.device()).cut(shapes);
  for (size_t i = 0; i < leaves.size(); ++i) {
    leaves[i].node()->copy = parts[i];
    copy_into(parts[i], leaves[i].detached());
  }
}

Tensor kept_copy(const Tensor& leaf) {
  if (!leaf.node() || !leaf.node()->copy) return {};
  Tensor copy = leaf.node()->copy;
  copy.set_node(leaf.node());
  return copy;
}

void backward(const Tensor& loss) {
  check(loss.numel() == 1 && loss.needs_grad(), "backward needs one element that depends on a leaf, found shape {}{}",
        loss.shape().str(), loss.needs_grad() ? "" : " without a node");
  NoGrad no_grad;
  std::vector<std::shared_ptr<Node>> nodes;
  {
    std::unordered_set<Node*> seen{loss.node().get()};
    std::vector<std::shared_ptr<Node>> stack{loss.node()};
    while (!stack.empty()) {
      std::shared_ptr<Node> node = std::move(stack.back());
      stack.pop_back();
      for (const auto& input : node->inputs)
        if (input && seen.insert(input.get()).second) stack.push_back(input);
      nodes.push_back(std::move(node));
    }
  }
  std::sort(nodes.begin(), nodes.end(), [](const auto& a, const auto& b) { return a->order > b->order; });

  Tensor one = Tensor::empty(loss.shape(), loss.dtype(), loss.device());
  fill(one, 1.0);
  accumulate(*loss.node(), one);
  for (std::shared_ptr<Node>& node : nodes) {
    if (node->owed.sum) {
      accumulate(*node, std::exchange(node->owed, {}).sum());
      queued(node->op, node->shape, Work::sum);
    }
    if (!node->leaf && node->grad) {
      check(static_cast<bool>(node->gradient), "the graph of {} was walked twice", node->op);
      const MemoryScope scope(Category::activation, node->layer);
      GradientFn gradient = std::exchange(node->gradient, nullptr);
      Gradients gradients = gradient(std::exchange(node->grad, {}));
      gradient = nullptr;
      queued(node->op, node->shape, Work::gradient);
      check(gradients.size() == node->inputs.size(), "{} has {} inputs and gave {} gradients", node->op,
            node->inputs.size(), gradients.size());
      for (size_t i = 0; i < gradients.size(); ++i)
        if (Tensor dx = std::exchange(gradients[i], {}); dx && node->inputs[i]) {
          accumulate(*node->inputs[i], dx);
          queued(node->inputs[i]->op, node->inputs[i]->shape, Work::sum);
        }
    }
    node->inputs.clear();
    node = nullptr;
  }
}

}  // namespace weft
