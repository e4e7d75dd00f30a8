// Attention. In bf16 it is compared in attention_test.cpp alone: a gradient that cancels to zero (a row with one key)
// keeps the rounding of y, which a tolerance relative to the gradient does not allow.
#include "tests/op_cases.h"

namespace weft {
namespace {

Inputs sizes(int64_t batch, int64_t time, int64_t heads, int64_t key_heads, int64_t key_width, int64_t value_width) {
  return {{{batch, time, heads, key_width}},
          {{batch, time, key_heads, key_width}},
          {{batch, time, heads, value_width}}};
}

OpCase::Function attend(double scale, double dropout) {
  return [=](auto& x) { return attention(x[0], x[1], x[2], {.scale = scale, .dropout = dropout, .key = {3, 4}}); };
}

OpCase timed(const std::string& name, int64_t key_heads, int64_t key_width, int64_t value_width) {
  constexpr int64_t kBatch = 16, kTime = 512, kHeads = 12;
  return {.name = name, .sizes = {}, .run = attend(0.1, 0.1),
          .large = sizes(kBatch, kTime, kHeads, key_heads, key_width, value_width),
          .flops = static_cast<double>(kBatch * kHeads * kTime * (kTime + 1) * (key_width + value_width))};
}

}  // namespace

void add_attention_cases(std::vector<OpCase>& cases) {
  const std::vector<Inputs> small = {sizes(2, 37, 2, 2, 16, 16), sizes(1, 40, 3, 1, 24, 16), sizes(1, 70, 2, 1, 5, 9)};
  const std::vector<DType> dtypes = {DType::f32, DType::f64};
  cases.push_back({.name = "attention", .sizes = small, .run = attend(0.25, 0), .reduction = 4096, .dtypes = dtypes});
  cases.push_back({.name = "attention_dropout", .sizes = small, .run = attend(0.25, 0.2), .reduction = 4096,
                   .dtypes = dtypes});
  cases.push_back(timed("attention_64_64", 12, 64, 64));
  cases.push_back(timed("attention_shared_64_64", 1, 64, 64));
  cases.push_back(timed("attention_shared_128_192", 1, 128, 192));
}

}  // namespace weft
