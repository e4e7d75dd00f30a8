// Element by element, shape, reductions and products. References are plain loops in double.
#include <cmath>

#include "tests/op_cases.h"

namespace weft {
namespace {

template <class F>
Tensor made(const Shape& shape, const F& f) {
  std::vector<float> values(static_cast<size_t>(shape.numel()));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(f(static_cast<int64_t>(i)));
  return Tensor::from(values, shape, Device::cpu);
}

// c[m, n] = sum_k a b + bias, from the operands' strides.
Tensor matmul_loops(const Tensor& a, const Tensor& b, Transpose t, const Tensor& bias) {
  const float *x = a.data<float>(), *w = b.data<float>(), *c = bias.data<float>();
  const int64_t k = t == Transpose::a ? a.size(0) : a.size(-1), n = b.size(t == Transpose::b ? 0 : 1);
  const int64_t m = a.numel() / k;
  Shape shape = t == Transpose::a ? Shape{m, n} : a.shape();
  shape.set(-1, n);
  return made(shape, [=](int64_t i) {
    double sum = c ? c[i % n] : 0.0;
    for (int64_t j = 0; j < k; ++j)
      sum += double(x[t == Transpose::a ? j * m + i / n : i / n * k + j]) *
             w[t == Transpose::b ? i % n * k + j : j * n + i % n];
    return sum;
  });
}

void add_matmul_case(std::vector<OpCase>& cases, const char* name, Transpose t, std::vector<Inputs> sizes,
                     Inputs large) {
  const auto bias = [](auto& x) { return x.size() > 2 ? x[2] : Tensor{}; };
  cases.push_back({.name = name, .sizes = std::move(sizes),
                   .run = [=](auto& x) { return matmul(x[0], x[1], t, bias(x)); },
                   .reference = [=](auto& x) { return matmul_loops(x[0], x[1], t, bias(x)); },
                   .reduction = 300, .large = std::move(large), .flops = 2.0 * 8192 * 768 * 2304});
}

// x, two or three weights, and as many biases less the first: [w1, w2, b2] or [w1, w2, w3, b2, b3].
struct Joined {
  std::vector<Tensor> weights, biases;
  explicit Joined(const std::vector<Tensor>& x, bool biased) {
    const size_t n = biased ? x.size() / 2 : x.size() - 1;
    weights.assign(x.begin() + 1, x.begin() + 1 + static_cast<int64_t>(n));
    biases.resize(n);
    if (biased) std::copy(x.begin() + 1 + static_cast<int64_t>(n), x.end(), biases.begin() + 1);
  }
};
void add_joined_case(std::vector<OpCase>& cases, const char* name, bool biased, std::vector<Inputs> sizes,
                     Inputs large) {
  cases.push_back({.name = name, .sizes = std::move(sizes),
                   .run = [=](auto& x) {
                     const Joined j(x, biased);
                     return matmul_joined(x[0], j.weights, j.biases);
                   },
                   .reference = [=](auto& x) {
                     const Joined j(x, biased);
                     Tensor y;
                     for (size_t i = 0; i < j.weights.size(); ++i) {
                       const Tensor part = matmul(x[0], j.weights[i], Transpose::b, j.biases[i]);
                       y = y ? concat_last(y, part) : part;
                     }
                     return y;
                   },
                   .reduction = 300, .large = std::move(large), .flops = 2.0 * 8192 * 768 * 448});
}

}  // namespace

void add_elementwise_cases(std::vector<OpCase>& cases) {
  const Shape small{3, 37}, odd{5, 129, 3}, big{64, 1024, 1024};
  cases.push_back({.name = "silu", .sizes = {{{small}}, {{odd}}}, .run = [](auto& x) { return silu(x[0]); },
                   .reference = [](auto& x) {
                     const float* v = x[0].template data<float>();
                     return made(x[0].shape(), [=](int64_t i) { return v[i] / (1 + std::exp(-double(v[i]))); });
                   },
                   .large = {{big}}});
  cases.push_back({.name = "add", .sizes = {{{small}, {small}}, {{odd}, {odd}}},
                   .run = [](auto& x) { return add(x[0], x[1]); },
                   .reference = [](auto& x) {
                     const float *a = x[0].template data<float>(), *b = x[1].template data<float>();
                     return made(x[0].shape(), [=](int64_t i) { return double(a[i]) + b[i]; });
                   },
                   .large = {{big}, {big}}});
  // Both inputs are one tensor: its gradient gets dy twice.
  cases.push_back({.name = "add_to_itself", .sizes = {{{small}}}, .run = [](auto& x) { return add(x[0], x[0]); },
                   .reference = [](auto& x) { return scale(x[0], 2); }});
  cases.push_back({.name = "mul", .sizes = {{{small}, {small}}, {{odd}, {odd}}},
                   .run = [](auto& x) { return mul(x[0], x[1]); },
                   .reference = [](auto& x) {
                     const float *a = x[0].template data<float>(), *b = x[1].template data<float>();
                     return made(x[0].shape(), [=](int64_t i) { return double(a[i]) * b[i]; });
                   },
                   .large = {{big}, {big}}});
  cases.push_back({.name = "scale", .sizes = {{{small}}, {{odd}}}, .run = [](auto& x) { return scale(x[0], -1.7); },
                   .reference = [](auto& x) {
                     const float* v = x[0].template data<float>();
                     return made(x[0].shape(), [=](int64_t i) { return -1.7 * v[i]; });
                   },
                   .large = {{big}}});
  cases.push_back({.name = "cast", .sizes = {{{small}}, {{odd}}},
                   .run = [](auto& x) { return cast(x[0], x[0].dtype() == DType::f64 ? DType::f64 : DType::f32); },
                   .reference = [](auto& x) { return x[0]; }, .large = {{big}}});
  cases.push_back({.name = "reshape", .sizes = {{{small}}}, .run = [](auto& x) { return reshape(x[0], {37, 3}); },
                   .reference = [](auto& x) {
                     const float* v = x[0].template data<float>();
                     return made({37, 3}, [=](int64_t i) { return v[i]; });
                   }});
  cases.push_back({.name = "concat_last",
                   .sizes = {{{{2, 3, 4, 5}}, {{2, 3, 4, 3}}}, {{{2, 3, 4, 8}}, {{2, 3, 1, 16}}}},
                   .run = [](auto& x) { return concat_last(x[0], x[1]); },
                   .reference = [](auto& x) {
                     const float *a = x[0].template data<float>(), *b = x[1].template data<float>();
                     const int64_t da = x[0].size(-1), db = x[1].size(-1), d = da + db, heads = x[0].size(2);
                     const bool shared = x[1].size(2) == 1;
                     return made({2, 3, heads, d}, [=](int64_t i) {
                       const int64_t row = i / d, column = i % d;
                       return column < da ? a[row * da + column] : b[(shared ? row / heads : row) * db + column - da];
                     });
                   },
                   .reduction = 4, .large = {{{16, 512, 12, 128}}, {{16, 512, 1, 64}}}});
  // The parts in another order, and one alone.
  const auto cut = [](auto& x) { return split_last(x[0], {{5}, {16}, {x[0].size(-1) - 21}}); };
  const auto cut_loops = [](auto& x, int64_t from, int64_t to) {
    const float* v = x[0].template data<float>();
    Shape shape = x[0].shape();
    shape.set(-1, to - from);
    return made(shape, [=, d = x[0].size(-1)](int64_t i) { return v[i / (to - from) * d + from + i % (to - from)]; });
  };
  const std::vector<Inputs> whole = {{{{2, 3, 37}}}, {{{1, 4, 2, 70}}}};
  cases.push_back({.name = "split_last", .sizes = whole,
                   .run = [=](auto& x) {
                     const std::vector<Tensor> y = cut(x);
                     return concat_last(concat_last(y[1], y[2]), y[0]);
                   },
                   .reference = [=](auto& x) {
                     return concat_last(cut_loops(x, 5, x[0].size(-1)), cut_loops(x, 0, 5));
                   }});
  cases.push_back({.name = "split_last_one_part", .sizes = whole, .run = [=](auto& x) { return cut(x)[1]; },
                   .reference = [=](auto& x) { return cut_loops(x, 5, 21); }});
  // The first and the third part normed; the second size is whole packs, as latent attention has it.
  const auto normed = [](auto& x) {
    const int64_t a = x[1].size(0), c = x[2].size(0);
    return split_last(x[0], {{a, x[1], 1e-6}, {x[0].size(-1) - a - c}, {c, x[2], 1e-2}});
  };
  const std::vector<Inputs> weighted = {{{{2, 3, 37}}, wide({10}), wide({21})},
                                        {{{1, 67, 88}}, wide({40}), wide({32})},
                                        {{{2, 33, 448}}, wide({128}), wide({256})},
                                        {{{1, 5, 1088}}, wide({768}), wide({256})}};
  cases.push_back({.name = "split_last_normed", .sizes = weighted,
                   .run = [=](auto& x) {
                     const std::vector<Tensor> y = normed(x);
                     return concat_last(concat_last(y[1], y[2]), y[0]);
                   },
                   .reference = [=](auto& x) {
                     const int64_t a = x[1].size(0), c = x[2].size(0), w = x[0].size(-1);
                     return concat_last(concat_last(cut_loops(x, a, w - c),
                                                    rms_norm(cut_loops(x, w - c, w), x[2].detached(), 1e-2)),
                                        rms_norm(cut_loops(x, 0, a), x[1].detached(), 1e-6));
                   },
                   .reduction = 768, .large = {{{16, 512, 448}}, wide({128}), wide({256})}});
  cases.push_back({.name = "split_last_normed_part", .sizes = weighted, .run = [=](auto& x) { return normed(x)[2]; },
                   .reference = [=](auto& x) {
                     const int64_t w = x[0].size(-1);
                     return rms_norm(cut_loops(x, w - x[2].size(0), w), x[2].detached(), 1e-2);
                   },
                   .reduction = 256});
  cases.push_back({.name = "squared_norm", .sizes = {{constant(small), constant(odd)}},
                   .run = [](auto& x) { return squared_norm({x[0], x[1]}); },
                   .reference = [](auto& x) { return add(sum(mul(x[0], x[0])), sum(mul(x[1], x[1]))); },
                   .reduction = 2046, .large = {constant(big), constant(big)},
                   .dtypes = {DType::f32, DType::bf16}});
  for (const bool mean_of : {false, true})
    cases.push_back({.name = mean_of ? "mean" : "sum", .sizes = {{{small}}, {{odd}}, {{{70, 1001}}}},
                     .run = [=](auto& x) { return mean_of ? mean(x[0]) : sum(x[0]); },
                     .reference = [=](auto& x) {
                       const float* v = x[0].template data<float>();
                       return made({}, [=, n = x[0].numel()](int64_t) {
                         double total = 0;
                         for (int64_t i = 0; i < n; ++i) total += v[i];
                         return mean_of ? total / static_cast<double>(n) : total;
                       });
                     },
                     .reduction = 70070, .large = {{big}}});
  add_matmul_case(cases, "matmul", Transpose::none,
                  {{{{3, 5}}, {{5, 7}}}, {{{2, 70, 40}}, {{40, 72}}, {{72}}}, {{{1, 300}}, {{300, 1}}}},
                  {{{8192, 768}}, {{768, 2304}}});
  add_matmul_case(cases, "matmul_linear", Transpose::b,
                  {{{{3, 5}}, {{7, 5}}, {{7}}}, {{{2, 70, 40}}, {{72, 40}}}, {{{5, 8}}, {{16, 8}}, {{16}}}},
                  {{{8192, 768}}, {{2304, 768}}});
  add_matmul_case(cases, "matmul_transposed", Transpose::a, {{{{5, 3}}, {{5, 7}}}, {{{264, 40}}, {{264, 72}}, {{72}}}},
                  {{{768, 8192}}, {{768, 2304}}});
  add_joined_case(cases, "matmul_joined", false,
                  {{{{3, 5}}, {{7, 5}}, {{2, 5}}},
                   {{{2, 70, 40}}, {{72, 40}}, {{1, 40}}, {{16, 40}}},
                   {{{9, 8}}, {{8, 8}}}},
                  {{{8192, 768}}, {{128, 768}}, {{320, 768}}});
  add_joined_case(cases, "matmul_joined_with_bias", true,
                  {{{{3, 5}}, {{7, 5}}, {{2, 5}}, {{2}}},
                   {{{2, 70, 40}}, {{72, 40}}, {{1, 40}}, {{16, 40}}, {{1}}, {{16}}}},
                  {{{8192, 768}}, {{128, 768}}, {{384, 768}}, {{384}}});
}

}  // namespace weft
