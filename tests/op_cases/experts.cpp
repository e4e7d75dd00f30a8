// Mixture of experts. Input 0 of each case is the logits that its routing to two experts is made from.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "tests/op_cases.h"

namespace weft {
namespace {

using Values = std::vector<float>;
constexpr int64_t kChosen = 2;

// The choices (token * 2 + k) of a token's two largest logits, and all of them sorted by expert.
struct Choices {
  std::vector<int64_t> experts, order;
  explicit Choices(const Tensor& logits) {
    const Values l = logits.to_vector<float>();
    const int64_t n = logits.size(0), e = logits.size(1);
    for (int64_t token = 0; token < n; ++token) {
      std::vector<int64_t> by_logit(static_cast<size_t>(e));
      std::iota(by_logit.begin(), by_logit.end(), 0);
      std::stable_sort(by_logit.begin(), by_logit.end(),
                       [&](int64_t a, int64_t b) { return l[token * e + a] > l[token * e + b]; });
      experts.insert(experts.end(), by_logit.begin(), by_logit.begin() + kChosen);
    }
    order.resize(experts.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return experts[a] < experts[b]; });
  }
};

Tensor reference_slots(const Tensor& logits) {
  const Choices choices(logits);
  std::vector<int32_t> slots(choices.order.size());
  for (size_t row = 0; row < slots.size(); ++row) slots[choices.order[row]] = static_cast<int32_t>(row);
  return Tensor::from(slots, {logits.size(0), kChosen}, Device::cpu);
}

Tensor reference_weights(const Tensor& routed, const Tensor& logits) {
  const Choices choices(routed);
  const Values l = logits.to_vector<float>();
  const int64_t n = logits.size(0), e = logits.size(1);
  Values weights;
  for (int64_t token = 0; token < n; ++token) {
    const double difference = double(l[token * e + choices.experts[2 * token]]) -
                              double(l[token * e + choices.experts[2 * token + 1]]);
    weights.push_back(static_cast<float>(1 / (1 + std::exp(-difference))));
    weights.push_back(static_cast<float>(1 / (1 + std::exp(difference))));
  }
  return Tensor::from(weights, {n, kChosen}, Device::cpu);
}

Tensor reference_balance(const Tensor& routed, const Tensor& logits) {
  const Choices choices(routed);
  const Values l = logits.to_vector<float>();
  const int64_t n = logits.size(0), e = logits.size(1);
  std::vector<double> share(static_cast<size_t>(e)), probability(share);
  for (const int64_t expert : choices.experts) share[expert] += 1.0 / static_cast<double>(choices.experts.size());
  for (int64_t token = 0; token < n; ++token) {
    double total = 0;
    for (int64_t i = 0; i < e; ++i) total += std::exp(double(l[token * e + i]));
    for (int64_t i = 0; i < e; ++i) probability[i] += std::exp(double(l[token * e + i])) / total / double(n);
  }
  double loss = 0;
  for (int64_t i = 0; i < e; ++i) loss += double(e) * share[i] * probability[i];
  return Tensor::from(Values{static_cast<float>(loss)}, {}, Device::cpu);
}

Tensor reference_gather(const Tensor& logits, const Tensor& x) {
  const Choices choices(logits);
  const Values from = x.to_vector<float>();
  const int64_t d = x.size(1);
  Values y;
  for (const int64_t choice : choices.order)
    y.insert(y.end(), from.begin() + choice / kChosen * d, from.begin() + (choice / kChosen + 1) * d);
  return Tensor::from(y, {static_cast<int64_t>(choices.order.size()), d}, Device::cpu);
}

Tensor reference_sum(const Tensor& logits, const Tensor& y) {
  const Choices choices(logits);
  const Values ys = y.to_vector<float>();
  const int64_t n = logits.size(0), d = y.size(1);
  std::vector<double> sums(static_cast<size_t>(n * d));
  for (size_t row = 0; row < choices.order.size(); ++row)
    for (int64_t i = 0; i < d; ++i)
      sums[choices.order[row] / kChosen * d + i] += double(ys[static_cast<int64_t>(row) * d + i]);
  return Tensor::from(Values(sums.begin(), sums.end()), {n, d}, Device::cpu);
}

Tensor reference_weighed(const Tensor& logits, const Tensor& y, const Tensor& weights) {
  const Choices choices(logits);
  Values ys = y.to_vector<float>();
  const Values ws = weights.to_vector<float>();
  const int64_t d = y.size(1);
  for (size_t row = 0; row < choices.order.size(); ++row)
    for (int64_t i = 0; i < d; ++i) ys[static_cast<int64_t>(row) * d + i] *= ws[choices.order[row]];
  return Tensor::from(ys, y.shape(), Device::cpu);
}

Tensor reference_grouped(const Tensor& logits, const Tensor& x, const Tensor& w) {
  const Choices choices(logits);
  const Values xs = x.to_vector<float>(), ws = w.to_vector<float>();
  const int64_t rows = x.size(0), inputs = x.size(1), outputs = w.size(1);
  Values y;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t o = 0; o < outputs; ++o) {
      const float* matrix = ws.data() + (choices.experts[choices.order[row]] * outputs + o) * inputs;
      double sum = 0;
      for (int64_t i = 0; i < inputs; ++i) sum += double(xs[row * inputs + i]) * double(matrix[i]);
      y.push_back(static_cast<float>(sum));
    }
  return Tensor::from(y, {rows, outputs}, Device::cpu);
}

Routing route(const Tensor& logits) { return route(logits, {.chosen = kChosen}).routing; }

}  // namespace

void add_expert_cases(std::vector<OpCase>& cases) {
  const auto logits = [](int64_t n, int64_t e) { return constant({n, e}, Type::wide); };
  cases.push_back({.name = "router_logits",
                   .sizes = {{{{1, 1}}, wide({1, 1})}, {{{37, 13}}, wide({3, 13})}, {{{150, 264}}, wide({8, 264})},
                             {{{66, 40}}, wide({19, 40})}, {{{35, 776}}, wide({8, 776})}},
                   .run = [](auto& x) { return router_logits(x[0], x[1]); },
                   .reference = [](auto& x) { return matmul(cast(x[0], DType::f32), x[1], Transpose::b); },
                   .reduction = 776,
                   .large = {{{8192, 768}}, wide({8, 768})}});
  cases.push_back({.name = "router_logits_and_another_use",
                   .sizes = {{{{37, 13}}, wide({3, 13})}, {{{150, 264}}, wide({8, 264})}},
                   .run = [](auto& x) {
                     const Tensor rows = scale(x[0], 1), logits = router_logits(rows, x[1]), other = scale(rows, 0.5);
                     return add(sum(mul(logits, logits)), sum(mul(other, other)));
                   },
                   .reference = [](auto& x) {
                     const Tensor logits = matmul(cast(x[0], DType::f32), x[1], Transpose::b);
                     return add(sum(mul(logits, logits)), scale(sum(mul(x[0], x[0])), 0.25));
                   },
                   .reduction = 150 * 264});
  cases.push_back({.name = "router_logits_with_noise",
                   .sizes = {{{{37, 13}}, wide({3, 13})}, {{{150, 264}}, wide({8, 264})}},
                   .run = [](auto& x) { return router_logits(x[0], x[1], 0.5, {7, 11}); },
                   .reference = [](auto& x) {
                     const Tensor logits = matmul(cast(x[0], DType::f32), x[1], Transpose::b);
                     const Tensor noise = Tensor::like(logits);
                     fill_normal(noise, 0.5, {7, 11});
                     return add(logits, noise);
                   },
                   .reduction = 264});
  const std::vector<Inputs> routed = {{wide({1, 2})}, {wide({37, 3})}, {wide({700, 8})}, {wide({300, 256})}};
  const RouteOptions balanced{.chosen = kChosen, .balance = 0.7};
  cases.push_back({.name = "route",
                   .sizes = {{logits(1, 2)}, {logits(37, 3)}, {logits(700, 8)}, {logits(300, 256)}},
                   .run = [](auto& x) { return route(x[0]).slots; },
                   .reference = [](auto& x) { return reference_slots(x[0]); },
                   .large = {logits(8192, 8)}});
  cases.push_back({.name = "route_weights",
                   .sizes = routed,
                   .run = [](auto& x) { return route(x[0], {.chosen = kChosen}).weights; },
                   .reference = [](auto& x) { return reference_weights(x[0], x[0]); },
                   .reduction = 8});
  cases.push_back({.name = "route_balance",
                   .sizes = {{wide({1, 2})}, {wide({37, 3})}, {wide({700, 8})}},
                   .run = [=](auto& x) { return route(x[0], balanced).balance; },
                   .reference = [](auto& x) { return scale(reference_balance(x[0], x[0]), 0.7); },
                   .reduction = 700});
  cases.push_back({.name = "route_weights_and_balance",
                   .sizes = routed,
                   .run = [=](auto& x) {
                     const Routed r = route(x[0], balanced);
                     return add(sum(mul(r.weights, r.weights)), r.balance);
                   },
                   .reference = [](auto& x) {
                     const Tensor w = reference_weights(x[0], x[0]);
                     return add(sum(mul(w, w)), scale(reference_balance(x[0], x[0]), 0.7));
                   },
                   .reduction = 700,
                   .large = {wide({8192, 8})}});
  cases.push_back({.name = "gather_rows",
                   .sizes = {{logits(1, 2), {{1, 1}}}, {logits(37, 3), {{37, 13}}}, {logits(100, 8), {{100, 264}}}},
                   .run = [](auto& x) { return gather_rows(x[1], route(x[0])); },
                   .reference = [](auto& x) { return reference_gather(x[0], x[1]); },
                   .reduction = kChosen,
                   .large = {logits(8192, 8), {{8192, 768}}}});
  cases.push_back({.name = "sum_rows",
                   .sizes = {{logits(1, 2), {{2, 1}}}, {logits(37, 3), {{74, 13}}}, {logits(100, 8), {{200, 264}}}},
                   .run = [](auto& x) { return sum_rows(x[1], route(x[0])); },
                   .reference = [](auto& x) { return reference_sum(x[0], x[1]); },
                   .reduction = kChosen,
                   .large = {logits(8192, 8), {{16384, 768}}}});
  cases.push_back({.name = "add_rms_norm_of_rows",
                   .sizes = {{logits(1, 2), {{1, 8}}, {{2, 8}}, wide({8})},
                             {logits(37, 3), {{37, 13}}, {{74, 13}}, wide({13})},
                             {logits(100, 8), {{100, 264}}, {{200, 264}}, wide({264})}},
                   .run = [](auto& x) {
                     const NormedSum n = add_rms_norm(x[1], x[2], route(x[0]), x[3], 1e-6, 0.3, {7, 11});
                     return concat_last(n.sum, n.normed);
                   },
                   .reference = [](auto& x) {
                     const Tensor y = dropout(sum_rows(x[2], route(x[0])), 0.3, {7, 11});
                     const Tensor sum = add(x[1], y);
                     return concat_last(sum, rms_norm(sum, x[3], 1e-6));
                   },
                   .reduction = 264,
                   .large = {logits(8192, 8), {{8192, 768}}, {{16384, 768}}, wide({768})}});
  cases.push_back({.name = "grouped_matmul",
                   .sizes = {{logits(1, 6), {{2, 8}}, {{6, 16, 8}}},
                             {logits(5, 3), {{10, 7}}, {{3, 9, 7}}},
                             {logits(67, 4), {{134, 40}}, {{4, 24, 40}}},
                             {logits(300, 3), {{600, 136}}, {{3, 264, 136}}},
                             {logits(70, 2), {{140, 130}}, {{2, 131, 130}}}},
                   .run = [](auto& x) { return grouped_matmul(x[1], x[2], route(x[0])); },
                   .reference = [](auto& x) { return reference_grouped(x[0], x[1], x[2]); },
                   .reduction = 264,
                   .large = {logits(8192, 8), {{16384, 768}}, {{8, 3072, 768}}},
                   .flops = 2.0 * 16384 * 768 * 3072});
  const auto mlp = [](int64_t n, int64_t e, int64_t d, int64_t f) {
    return Inputs{constant({n, e}, Type::wide), {{n, d}}, {{e, f, d}}, {{e, d, f}}, wide({n, kChosen})};
  };
  const RngKey key{5, 9};
  cases.push_back({.name = "expert_mlp",
                   .sizes = {mlp(1, 6, 8, 16), mlp(5, 3, 7, 9), mlp(67, 4, 24, 40), mlp(150, 3, 72, 136)},
                   .run = [key](auto& x) { return expert_mlp(x[1], x[2], x[3], x[4], route(x[0]), 0.3, key); },
                   .reference = [key](auto& x) {
                     const Tensor h = reference_grouped(x[0], reference_gather(x[0], x[1]), x[2]);
                     return reference_weighed(x[0], reference_grouped(x[0], dropout(silu(h), 0.3, key), x[3]), x[4]);
                   },
                   .reduction = 136,
                   .products = 2,
                   .large = mlp(8192, 8, 768, 3072),
                   .flops = 4.0 * 16384 * 768 * 3072});

  // Both have a gradient for the rows: the router's adds the experts' up on the way.
  const auto shared = [mlp](int64_t n, int64_t e, int64_t d, int64_t f) {
    Inputs inputs = mlp(n, e, d, f);
    inputs.push_back(wide({e, d}));
    return inputs;
  };
  cases.push_back({.name = "router_logits_and_expert_mlp",
                   .sizes = {shared(5, 3, 7, 9), shared(67, 4, 24, 40), shared(37, 3, 256, 8)},
                   .run = [key](auto& x) {
                     const Tensor rows = scale(x[1], 1), logits = router_logits(rows, x[5]);
                     const Tensor y = expert_mlp(rows, x[2], x[3], x[4], route(x[0]), 0.3, key);
                     return add(sum(mul(logits, logits)), sum(mul(y, y)));
                   },
                   .reference = [key](auto& x) {
                     const Tensor logits = matmul(cast(x[1], DType::f32), x[5], Transpose::b).detached();
                     const Tensor h = reference_grouped(x[0], reference_gather(x[0], x[1]), x[2]);
                     const Tensor a = dropout(silu(h), 0.3, key);
                     const Tensor y = reference_weighed(x[0], reference_grouped(x[0], a, x[3]), x[4]);
                     return add(sum(mul(logits, logits)), sum(mul(y, y)));
                   },
                   .reduction = 67 * 40,
                   .products = 2});
}

}  // namespace weft
