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

Tensor rotated(const Tensor& x, const Tensor& angles) {
  const float *v = x.data<float>(), *cs = angles.data<float>();
  const int64_t time = x.size(1), heads = x.size(2), d = x.size(3), r = angles.size(1);
  std::vector<float> y;
  for (int64_t i = 0; i < x.numel(); ++i) {
    const int64_t t = i / (heads * d) % time, column = i % d - (d - r);
    const double c = column < 0 ? 1 : cs[t * r + column / 2 * 2], s = column < 0 ? 0 : cs[t * r + column / 2 * 2 + 1];
    y.push_back(static_cast<float>(v[i] * c + (column < 0 ? 0 : column % 2 == 0 ? -v[i + 1] * s : v[i - 1] * s)));
  }
  return Tensor::from(y, x.shape(), x.device());
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

  // Rotated queries and keys: copies, as the caller holds them; then in place.
  const auto with_angles = [](const Inputs& inputs, const Shape& angles) {
    Inputs all = inputs;
    all.push_back(constant(angles, Type::f32));
    return all;
  };
  const std::vector<Inputs> turning = {with_angles(sizes(2, 7, 2, 2, 16, 16), {9, 16}),
                                       with_angles(sizes(1, 12, 5, 1, 24, 8), {12, 8}),
                                       with_angles(sizes(1, 9, 2, 1, 5, 9), {9, 4})};
  const auto turned = [](auto& x) {
    return attention(rotated(x[0], x[3]), rotated(x[1], x[3]), x[2].detached(), {.scale = 0.25});
  };
  cases.push_back({.name = "attention_rotary", .sizes = turning,
                   .run = [](auto& x) { return attention(x[0], x[1], x[2], {.scale = 0.25, .angles = x[3]}); },
                   .reference = turned, .reduction = 4096, .dtypes = dtypes});
  cases.push_back({.name = "attention_rotary_in_place", .sizes = turning,
                   .run = [](auto& x) {
                     return attention(scale(x[0], 1), scale(x[1], 1), x[2], {.scale = 0.25, .angles = x[3]});
                   },
                   .reference = turned, .reduction = 4096, .dtypes = dtypes});
  cases.push_back({.name = "attention_side_by_side",
                   .sizes = {{{{2, 7, 6, 16}}, constant({9, 16}, Type::f32)},
                             {{{1, 37, 9, 12}}, constant({37, 6}, Type::f32)}},
                   .run = [](auto& x) { return attention(scale(x[0], 1), {.scale = 0.25, .angles = x[1]}); },
                   .reference = [](auto& x) {
                     const int64_t b = x[0].size(0), t = x[0].size(1), heads = x[0].size(2) / 3, d = x[0].size(3);
                     const Shape flat{b, t, 3 * heads * d}, part{b, t, heads, d};
                     const int64_t third = heads * d;
                     const auto parts = split_last(reshape(x[0].detached(), flat), {{third}, {third}, {third}});
                     return attention(rotated(reshape(parts[0], part), x[1]), rotated(reshape(parts[1], part), x[1]),
                                      reshape(parts[2], part), {.scale = 0.25});
                   },
                   .reduction = 4096, .dtypes = dtypes});

  cases.push_back(timed("attention_64_64", 12, 64, 64));
  cases.push_back({.name = "attention_side_by_side_64", .sizes = {},
                   .run = [](auto& x) {
                     return attention(scale(x[0], 1), {.scale = 0.1, .dropout = 0.1, .key = {3, 4}, .angles = x[1]});
                   },
                   .large = {{{16, 512, 36, 64}}, constant({512, 64}, Type::f32)}});
  cases.push_back(timed("attention_shared_64_64", 1, 64, 64));
  cases.push_back(timed("attention_shared_128_192", 1, 128, 192));
}

}  // namespace weft
