// Dropout, norms, embedding, softmax, and the loss. The references are plain loops in double.
#include <cmath>

#include "tests/op_cases.h"

namespace weft {
namespace {

const RngKey kKey{7, 11};

// An f32 tensor of `shape` whose element i is f(i).
template <class F>
Tensor made(const Shape& shape, const F& f) {
  std::vector<float> values(static_cast<size_t>(shape.numel()));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(f(static_cast<int64_t>(i)));
  return Tensor::from(values, shape, Device::cpu);
}

Tensor dropout_loops(const Tensor& x, double p) {
  const float* v = x.data<float>();
  const Mask mask(kKey, p);
  return made(x.shape(), [=](int64_t i) {
    const uint32_t word = philox<7>(kKey, static_cast<uint64_t>(i / 8)).v[i % 8 / 2];
    return (i % 2 ? word >> 16 : word & 0xffffu) < mask.threshold ? v[i] * mask.scale() : 0.0;
  });
}

Tensor rms_norm_loops(const Tensor& x, const Tensor& weight, double eps) {
  const float *v = x.data<float>(), *w = weight.data<float>();
  const int64_t d = x.size(-1);
  return made(x.shape(), [=](int64_t i) {
    double squares = 0;
    for (int64_t j = i / d * d; j < i / d * d + d; ++j) squares += double(v[j]) * v[j];
    return v[i] / std::sqrt(squares / static_cast<double>(d) + eps) * w[i % d];
  });
}

Tensor embedding_loops(const Tensor& ids, const Tensor& table, double scale) {
  const int32_t* id = ids.data<int32_t>();
  const float* w = table.data<float>();
  const int64_t d = table.size(1);
  Shape shape = ids.shape();
  shape.push_back(d);
  return made(shape, [=](int64_t i) { return scale * w[id[i / d] * d + i % d]; });
}

double sum_of_exp(const float* row, int64_t d) {
  double total = 0;
  for (int64_t j = 0; j < d; ++j) total += std::exp(double(row[j]));
  return total;
}

Tensor softmax_loops(const Tensor& x) {
  const float* v = x.data<float>();
  const int64_t d = x.size(-1);
  return made(x.shape(), [=](int64_t i) { return std::exp(double(v[i])) / sum_of_exp(v + i / d * d, d); });
}

Tensor cross_entropy_loops(const Tensor& logits, const Tensor& targets) {
  const float* v = logits.data<float>();
  const int32_t* target = targets.data<int32_t>();
  const int64_t d = logits.size(-1), rows = targets.numel();
  return made({}, [=](int64_t) {
    double total = 0;
    for (int64_t row = 0; row < rows; ++row) total += std::log(sum_of_exp(v + row * d, d)) - v[row * d + target[row]];
    return total / static_cast<double>(rows);
  });
}

Tensor count_correct_loops(const Tensor& logits, const Tensor& targets) {
  const float* v = logits.data<float>();
  const int64_t d = logits.size(-1);
  int32_t correct = 0;
  for (int64_t row = 0; row < targets.numel(); ++row) {
    int64_t best = 0;
    for (int64_t j = 1; j < d; ++j)
      if (v[row * d + j] > v[row * d + best]) best = j;
    correct += best == targets.data<int32_t>()[row];
  }
  return Tensor::from(std::vector<int32_t>{correct}, {}, Device::cpu);
}

}  // namespace

void add_layer_cases(std::vector<OpCase>& cases) {
  const Shape tokens{16, 512, 768};
  cases.push_back({.name = "dropout", .sizes = {{{{3, 37}}}, {{{8, 4}}}, {{{1}}}, {{{5, 129, 3}}}},
                   .run = [](auto& x) { return dropout(x[0], 0.3, kKey); },
                   .reference = [](auto& x) { return dropout_loops(x[0], 0.3); }, .large = {{tokens}}});

  const auto norm = [](auto& x) { return rms_norm(x[0], x[1], 1e-6); };
  const auto norm_loops = [](auto& x) { return rms_norm_loops(x[0], x[1], 1e-6); };
  cases.push_back({.name = "rms_norm",
                   .sizes = {{{{3, 37}}, wide({37})}, {{{2, 9, 768}}, wide({768})}, {{{300, 8}}, wide({8})},
                             {{{2, 4104}}, wide({4104})}},
                   .run = norm, .reference = norm_loops, .reduction = 4104, .large = {{tokens}, wide({768})}});
  // One column: only a large eps leaves a gradient that is more than rounding.
  cases.push_back({.name = "rms_norm_one_column", .sizes = {{{{5, 1}}, wide({1})}},
                   .run = [](auto& x) { return rms_norm(x[0], x[1], 0.5); },
                   .reference = [](auto& x) { return rms_norm_loops(x[0], x[1], 0.5); }});
  cases.push_back({.name = "rms_norm_narrow_weight", .sizes = {{{{3, 37}}, {{37}}}, {{{2, 9, 768}}, {{768}}}},
                   .run = norm, .reference = norm_loops, .reduction = 768});

  // Both outputs side by side, then each alone.
  const auto add_norm = [](auto& x, double p) { return add_rms_norm(x[0], x[1], x[2], 1e-6, p, kKey); };
  const auto composed = [](auto& x, double p) {
    const Tensor sum = add(x[0], dropout(x[1], p, kKey));
    return NormedSum{sum, rms_norm(sum, x[2], 1e-6)};
  };
  const std::vector<Inputs> streams = {{{{3, 37}}, {{3, 37}}, wide({37})}, {{{2, 9, 768}}, {{2, 9, 768}}, wide({768})},
                                       {{{300, 8}}, {{300, 8}}, wide({8})}, {{{5, 1000}}, {{5, 1000}}, wide({1000})},
                                       {{{2, 4104}}, {{2, 4104}}, wide({4104})}};
  const auto joined = [](const NormedSum& n) { return concat_last(n.sum, n.normed); };
  cases.push_back({.name = "add_rms_norm", .sizes = streams,
                   .run = [=](auto& x) { return joined(add_norm(x, 0.3)); },
                   .reference = [=](auto& x) { return joined(composed(x, 0.3)); }, .reduction = 4104});
  cases.push_back({.name = "add_rms_norm_whole", .sizes = streams,
                   .run = [=](auto& x) { return joined(add_norm(x, 0)); },
                   .reference = [=](auto& x) { return joined(composed(x, 0)); }, .reduction = 4104});
  cases.push_back({.name = "add_rms_norm_sum", .sizes = streams, .run = [=](auto& x) { return add_norm(x, 0.3).sum; },
                   .reference = [=](auto& x) { return add(composed(x, 0.3).sum, scale(composed(x, 0.3).normed, 0)); }});
  cases.push_back({.name = "add_rms_norm_normed", .sizes = streams,
                   .run = [=](auto& x) { return add_norm(x, 0.3).normed; },
                   .reference = [=](auto& x) { return composed(x, 0.3).normed; }, .reduction = 4104,
                   .large = {{tokens}, {tokens}, wide({768})}});
  cases.push_back({.name = "add_rms_norm_no_residual", .sizes = {{{{3, 37}}, wide({37})}, {{{2, 9, 768}}, wide({768})}},
                   .run = [=](auto& x) { return joined(add_rms_norm({}, x[0], x[1], 1e-6, 0.3, kKey)); },
                   .reference = [=](auto& x) {
                     const Tensor sum = dropout(x[0], 0.3, kKey);
                     return joined({sum, rms_norm(sum, x[1], 1e-6)});
                   },
                   .reduction = 768});

  cases.push_back({.name = "embedding",
                   .sizes = {{ids({2, 5}, 7), wide({7, 37})}, {ids({300}, 3), wide({3, 16})},
                             {ids({4, 33}, 500), wide({500, 768})}, {ids({1}, 1), wide({1, 1})}},
                   .run = [](auto& x) { return embedding(x[0], x[1], 2.5, x[1].dtype()); },
                   .reference = [](auto& x) { return embedding_loops(x[0], x[1], 2.5); }, .reduction = 300,
                   .large = {ids({16, 512}, 49152), wide({49152, 768})}});
  cases.push_back({.name = "embedding_to_bf16", .sizes = {{ids({2, 5}, 7), {{7, 37}}}, {ids({4, 33}, 5), {{5, 264}}}},
                   .run = [](auto& x) { return embedding(x[0], x[1], 2.5, DType::bf16); },
                   .reference = [](auto& x) -> Tensor {
                     const Tensor y = embedding_loops(x[0], x[1], 2.5);
                     const float* v = y.template data<float>();
                     return made(y.shape(), [=](int64_t i) { return float(bf16(v[i])); });
                   },
                   .reduction = 132, .large = {ids({16, 512}, 49152), {{49152, 768}}}, .dtypes = {DType::f32}});

  cases.push_back({.name = "softmax", .sizes = {{{{3, 37}}}, {{{2, 3, 8}}}, {{{2, 5000}}}, {{{4, 1}}}},
                   .run = [](auto& x) { return softmax(x[0]); },
                   .reference = [](auto& x) { return softmax_loops(x[0]); }, .reduction = 5000,
                   .large = {{{2048, 49152}}}});

  const std::vector<Inputs> logits = {{{{6, 37}}, ids({6}, 37)}, {{{2, 3, 8}}, ids({2, 3}, 8)},
                                      {{{3, 9000}}, ids({3}, 9000)}, {{{400, 3}}, ids({400}, 3)}};
  const Inputs many_logits = {{{2048, 49152}}, ids({2048}, 49152)};
  const auto loss_loops = [](auto& x) { return cross_entropy_loops(x[0], x[1]); };
  cases.push_back({.name = "cross_entropy", .sizes = logits, .run = [](auto& x) { return cross_entropy(x[0], x[1]); },
                   .reference = loss_loops, .reduction = 9000, .large = many_logits});
  // Nothing but the loss holds these logits, so the gradient overwrites them.
  cases.push_back({.name = "cross_entropy_in_place", .sizes = logits,
                   .run = [](auto& x) { return cross_entropy(scale(x[0], 1), x[1]); },
                   .reference = loss_loops, .reduction = 9000});
  std::vector<Inputs> constants = logits;
  for (Inputs& inputs : constants) inputs[0].differentiable = false;
  cases.push_back({.name = "count_correct", .sizes = constants,
                   .run = [](auto& x) { return count_correct(x[0], x[1]); },
                   .reference = [](auto& x) { return count_correct_loops(x[0], x[1]); }, .large = many_logits});
}

}  // namespace weft
