// The head with its loss by chunks of rows, against the ops that it is made of.
#include "tests/op_cases.h"

namespace weft {

void add_head_cases(std::vector<OpCase>& cases) {
  // x [.., D], weight [V, D], targets; by one row, by rows that do not divide them, and by more than there are.
  const std::vector<Inputs> sizes = {{{{2, 5}}, {{37, 5}}, ids({2}, 37)},
                                     {{{2, 4, 9}}, {{40, 9}}, ids({2, 4}, 40)},
                                     {{{70, 16}}, {{1031, 16}}, ids({70}, 1031)}};
  const auto small = [](auto& x) { return scale(x[0], 0.1); };  // logits below 1: bf16's rounding is not the test
  const auto logits = [=](auto& x) { return matmul(small(x), x[1], Transpose::b); };
  cases.push_back({.name = "linear_cross_entropy", .sizes = sizes,
                   .run = [=](auto& x) { return linear_cross_entropy(small(x), x[1], x[2], 3); },
                   .reference = [=](auto& x) { return cross_entropy(logits(x), x[2]); }, .reduction = 1000});
  cases.push_back({.name = "linear_cross_entropy_whole", .sizes = sizes,
                   .run = [=](auto& x) { return linear_cross_entropy(small(x), x[1], x[2]); },
                   .reference = [=](auto& x) { return cross_entropy(logits(x), x[2]); }, .reduction = 1000,
                   .large = {{{8192, 768}}, {{49152, 768}}, ids({8192}, 49152)}, .flops = 6.0 * 8192 * 768 * 49152});
  // A row that does not fit in a GPU block's shared memory; too long for finite differences.
  const std::vector<Inputs> long_rows = {{{{3, 16}}, {{60000, 16}}, ids({3}, 60000)}};
  cases.push_back({.name = "linear_cross_entropy_long_rows", .sizes = long_rows,
                   .run = [=](auto& x) { return linear_cross_entropy(small(x), x[1], x[2], 2); },
                   .reference = [=](auto& x) { return cross_entropy(logits(x), x[2]); }, .reduction = 1000,
                   .dtypes = {DType::f32, DType::bf16}});
  std::vector<Inputs> constants = sizes;
  constants.insert(constants.end(), long_rows.begin(), long_rows.end());
  for (Inputs& inputs : constants) inputs[0].differentiable = inputs[1].differentiable = false;
  cases.push_back({.name = "linear_score_loss", .sizes = constants,
                   .run = [=](auto& x) { return linear_score(small(x), x[1], x[2], 3).loss; },
                   .reference = [=](auto& x) { return cross_entropy(logits(x), x[2]); }, .reduction = 1000});
  cases.push_back({.name = "linear_score_correct", .sizes = constants,
                   .run = [=](auto& x) { return linear_score(small(x), x[1], x[2], 3).correct; },
                   .reference = [=](auto& x) { return count_correct(logits(x), x[2]); }});
}

}  // namespace weft
