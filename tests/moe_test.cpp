// Routing's invariants and the experts' products where experts are empty, alone, or of odd sizes.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "engine/ops.h"
#include "engine/ops/grouped_matmul_kernels.h"
#include "tests/tolerance.h"

using namespace weft;

namespace {

using Ids = std::vector<int32_t>;

std::vector<float> draw(int64_t n, uint64_t stream) {
  std::vector<float> values;
  for (int64_t i = 0; i < n; ++i) values.push_back(random_normal({7, stream}, static_cast<uint64_t>(i)));
  return values;
}

void routing_holds(const std::vector<float>& logits, int64_t n, int64_t e, int64_t k, Device device) {
  INFO(n, " tokens, ", e, " experts, ", k, " chosen, on ", name_of(device));
  const Routing r = route(Tensor::from(logits, {n, e}, device), {.chosen = k}).routing;
  const Ids experts = r.experts.to_vector<int32_t>(), slots = r.slots.to_vector<int32_t>(),
            sources = r.sources.to_vector<int32_t>(), offsets = r.offsets.to_vector<int32_t>();
  int64_t unchosen = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto better = [&](int32_t a, int32_t b) {  // a comes before b
      const float x = logits[i * e + a], y = logits[i * e + b];
      return x > y || (x == y && a < b);
    };
    const auto first = experts.begin() + i * k;
    for (int64_t j = 0; j + 1 < k; ++j) unchosen += !better(first[j], first[j + 1]);
    for (int32_t other = 0; other < e; ++other)
      if (std::find(first, first + k, other) == first + k) unchosen += !better(first[k - 1], other);
  }
  CHECK_MESSAGE(unchosen == 0, "pairs of experts in the wrong order");
  REQUIRE(offsets.size() == static_cast<size_t>(e + 1));
  CHECK(offsets.front() == 0);
  CHECK(offsets.back() == n * k);
  int64_t misplaced = 0;
  for (int64_t c = 0; c < n * k; ++c) {
    const int32_t row = slots[c];
    misplaced += row < offsets[experts[c]] || row >= offsets[experts[c] + 1] || sources[row] != c;
  }
  for (int64_t row = 0; row + 1 < n * k; ++row)
    misplaced += experts[sources[row]] == experts[sources[row + 1]] && sources[row] > sources[row + 1];
  CHECK_MESSAGE(misplaced == 0, "choices outside their expert's rows, or out of order");
}

void all_routings_hold(Device device) {
  struct Size {
    int64_t n, e, k;
  };
  for (const auto [n, e, k] : {Size{0, 4, 2}, Size{1, 1, 1}, Size{1, 8, 8}, Size{129, 3, 2}, Size{2000, 8, 2},
                               Size{300, 256, 8}, Size{5000, 64, 3}})
    routing_holds(draw(n * e, 1), n, e, k, device);
  routing_holds(std::vector<float>(1000 * 8, 0.5f), 1000, 8, 3, device);  // ties: the lowest indices
  std::vector<float> one(500 * 5, 0.0f);
  for (size_t i = 3; i < one.size(); i += 5) one[i] = 1;
  routing_holds(one, 500, 5, 1, device);  // all on expert 3
}

void nan_logits_choose_different_experts(Device device) {
  const std::vector<float> logits(64 * 4, std::numeric_limits<float>::quiet_NaN());
  const Routing r = route(Tensor::from(logits, {64, 4}, device), {.chosen = 2}).routing;
  const Ids experts = r.experts.to_vector<int32_t>();
  for (size_t i = 0; i < experts.size(); i += 2) {
    CHECK(experts[i] >= 0);
    CHECK(experts[i] < 4);
    CHECK(experts[i] != experts[i + 1]);
  }
}

Tensor typed(const std::vector<float>& values, const Shape& shape, DType dtype, Device device) {
  return dispatch(Cpu{}, dtype, [&]<class T>() {
    std::vector<T> narrow;
    for (const float v : values) narrow.push_back(T(v));
    return Tensor::from(narrow, shape, device);
  });
}
std::vector<double> values_of(const Tensor& t) {
  return dispatch(Cpu{}, t.dtype(), [&]<class T>() {
    std::vector<double> values;
    for (const T v : t.to_vector<T>()) values.push_back(static_cast<double>(acc_t<T>(v)));
    return values;
  });
}

void close(const std::string& what, const Tensor& found, const std::vector<double>& expected, double tolerance) {
  const std::vector<double> values = values_of(found);
  REQUIRE(values.size() == expected.size());
  double squares = 0, worst = 0;
  for (const double e : expected) squares += e * e;
  const double rms = std::sqrt(squares / static_cast<double>(expected.size()));
  for (size_t i = 0; i < expected.size(); ++i)
    if (values[i] != expected[i]) {
      const double error = std::abs(values[i] - expected[i]) / std::max(std::abs(expected[i]), rms);
      worst = std::isnan(error) ? error : std::max(worst, error);
    }
  const bool in = worst <= tolerance;
  CHECK_MESSAGE(in, what, ": relative error ", worst, ", allowed ", tolerance);
}

// Routes row i to the expert whose share it falls into: rows_of[e] rows of each.
Routing routing_of(const std::vector<int64_t>& rows_of, Device device) {
  const int64_t experts = static_cast<int64_t>(rows_of.size());
  std::vector<float> logits;
  for (int64_t e = 0; e < experts; ++e)
    for (int64_t i = 0; i < rows_of[e]; ++i)
      for (int64_t j = 0; j < experts; ++j) logits.push_back(j == e ? 1.0f : 0.0f);
  const int64_t rows = static_cast<int64_t>(logits.size()) / experts;
  return route(Tensor::from(logits, {rows, experts}, device), {.chosen = 1}).routing;
}

// y, dx and dw against loops, for rows_of[e] rows of each expert.
void products_hold(const std::vector<int64_t>& rows_of, int64_t inputs, int64_t outputs, DType dtype, Device device) {
  const int64_t experts = static_cast<int64_t>(rows_of.size());
  const Routing r = routing_of(rows_of, device);
  const int64_t rows = r.sources.numel();
  INFO(rows, " rows, ", experts, " experts, ", inputs, " -> ", outputs, ", ", name_of(dtype), " on ", name_of(device));
  const Tensor x = leaf(typed(draw(rows * inputs, 1), {rows, inputs}, dtype, device));
  const Tensor w = leaf(typed(draw(experts * outputs * inputs, 2), {experts, outputs, inputs}, dtype, device));
  const Tensor dy = typed(draw(rows * outputs, 3), {rows, outputs}, dtype, device);
  const Tensor y = grouped_matmul(x, w, r);
  const Gradients gradients = y.node()->gradient(dy);

  const std::vector<double> xs = values_of(x), ws = values_of(w), dys = values_of(dy);
  std::vector<double> ys(dys.size()), dxs(xs.size()), dws(ws.size());
  for (int64_t e = 0, row = 0; e < experts; ++e)
    for (const int64_t end = row + rows_of[e]; row < end; ++row)
      for (int64_t o = 0; o < outputs; ++o)
        for (int64_t i = 0; i < inputs; ++i) {
          const int64_t at = (e * outputs + o) * inputs + i;
          ys[row * outputs + o] += xs[row * inputs + i] * ws[at];
          dxs[row * inputs + i] += dys[row * outputs + o] * ws[at];
          dws[at] += dys[row * outputs + o] * xs[row * inputs + i];
        }
  close("y", y, ys, tolerance(dtype, inputs));
  close("dx", gradients[0], dxs, tolerance(dtype, outputs));
  close("dw", gradients[1], dws, tolerance(dtype, *std::max_element(rows_of.begin(), rows_of.end())));
  // The same bits again.
  CHECK(values_of(grouped_matmul(x, w, r)) == values_of(y));
}

void all_products_hold(Device device) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    products_hold({0, 0, 131, 0}, 20, 12, dtype, device);          // one expert; no multiple of 8
    products_hold({0, 259, 0}, 72, 264, dtype, device);            // one expert, more than a tile each way
    products_hold({1, 127, 128, 129, 0, 3}, 64, 128, dtype, device);
    products_hold({65, 63, 1, 0, 7}, 520, 16, dtype, device);      // many steps along the inputs
    products_hold({300, 0, 211}, 24, 40, dtype, device);           // many steps along the rows
    products_hold({17, 40}, 129, 33, dtype, device);
    products_hold({0, 0}, 16, 8, dtype, device);
  }
}

// expert_mlp in bf16 on the GPU, output and gradients, against the ops it stands for in f32 on the CPU.
void mlp_holds(const std::vector<int64_t>& rows_of, int64_t d, int64_t f, double p) {
  const int64_t experts = static_cast<int64_t>(rows_of.size());
  int64_t rows = 0;
  for (const int64_t n : rows_of) rows += n;
  INFO(rows, " rows, ", experts, " experts, ", d, " -> ", f, ", dropout ", p);
  const auto evaluate = [&](DType dtype, Device device) {
    const auto values = [&](const Shape& shape, uint64_t stream) {
      return cast(typed(draw(shape.numel(), stream), shape, DType::bf16, device), dtype);
    };
    const std::vector<Tensor> x = {leaf(values({rows, d}, 1)), leaf(values({experts, f, d}, 2)),
                                   leaf(values({experts, d, f}, 3)),
                                   leaf(typed(draw(rows, 4), {rows, 1}, DType::f32, device))};
    const Tensor y = expert_mlp(x[0], x[1], x[2], x[3], routing_of(rows_of, device), p, {3, 8});
    std::vector<std::vector<double>> found = {values_of(y)};
    const Tensor dy = values({rows, d}, 5);
    backward(record("project", Tensor::zeros({}, DType::f32, device), {y},
                    [dy](const Tensor&) -> Gradients { return {dy}; }));
    for (const Tensor& t : x) found.push_back(values_of(t.grad()));
    return found;
  };
  const auto expected = evaluate(DType::f32, Device::cpu), found = evaluate(DType::bf16, Device::cuda);
  const char* const names[] = {"y", "dx", "dup", "ddown", "dweights"};
  for (size_t i = 0; i < expected.size(); ++i)
    close(names[i], Tensor::from(found[i], {static_cast<int64_t>(found[i].size())}, Device::cpu), expected[i],
          2 * tolerance(DType::bf16, std::max(d, f)));
  CHECK(evaluate(DType::bf16, Device::cuda) == found);  // the same bits again
}

// The sums of squares that come with a weight gradient in bf16 on the GPU, against the gradient itself.
void squares_hold(const std::vector<int64_t>& rows_of, int64_t inputs, int64_t outputs) {
  const int64_t experts = static_cast<int64_t>(rows_of.size());
  const Routing r = routing_of(rows_of, Device::cuda);
  const int64_t rows = r.sources.numel();
  INFO(rows, " rows, ", experts, " experts, ", inputs, " -> ", outputs);
  const Tensor x = typed(draw(rows * inputs, 1), {rows, inputs}, DType::bf16, Device::cuda);
  const Tensor dy = typed(draw(rows * outputs, 2), {rows, outputs}, DType::bf16, Device::cuda);
  Tensor dw = Tensor::empty({experts, outputs, inputs}, DType::bf16, Device::cuda);
  multiply_grouped(GroupedProduct::weight_gradient, dy, x, dw, r.offsets);
#if WEFT_CUDA
  const bool warpgroups = grouped_matmul_warpgroup(
      GroupedProduct::weight_gradient,
      {.a = dy.data<bf16>(), .b = x.data<bf16>(), .c = dw.data<bf16>(), .offsets = r.offsets.data<int32_t>(),
       .rows = rows, .inputs = inputs, .outputs = outputs, .experts = experts});
  CHECK(warpgroups == (dw.squares() != nullptr));
#endif
  if (!dw.squares()) {
    MESSAGE("no sums of squares: this GPU or this build has no warpgroups");
    return;
  }
  const int64_t high = (outputs + kSquaredRows - 1) / kSquaredRows;
  const int64_t wide = (inputs + kSquaredColumns - 1) / kSquaredColumns;
  REQUIRE(dw.squares()->shape() == Shape({experts, high, wide}));
  const std::vector<double> values = values_of(dw), found = values_of(*dw.squares());
  std::vector<double> expected(found.size());
  for (int64_t e = 0; e < experts; ++e)
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t i = 0; i < inputs; ++i) {
        const double v = values[(e * outputs + o) * inputs + i];
        expected[(e * high + o / kSquaredRows) * wide + i / kSquaredColumns] += v * v;
      }
  int64_t wrong = 0;
  for (size_t i = 0; i < found.size(); ++i) wrong += !(std::abs(found[i] - expected[i]) <= 1e-5 * expected[i]);
  CHECK(wrong == 0);
  multiply_grouped(GroupedProduct::weight_gradient, dy, x, dw, r.offsets);
  CHECK(values_of(*dw.squares()) == found);  // the same bits again
}

TEST_CASE("routing: invariants, ties, one expert") { all_routings_hold(Device::cpu); }
TEST_CASE("routing: logits that are nan") { nan_logits_choose_different_experts(Device::cpu); }
TEST_CASE("grouped_matmul: empty experts, ragged rows, odd sizes") { all_products_hold(Device::cpu); }

TEST_CASE("routing: misuse is refused") {
  const Tensor logits = Tensor::zeros({4, 3}, DType::f32, Device::cpu);
  CHECK_THROWS_AS(route(logits, {.chosen = 4}), Error);
  CHECK_THROWS_AS(route(logits, {.chosen = 0}), Error);
  CHECK_THROWS_AS(route(Tensor::zeros({4, 300}, DType::f32, Device::cpu), {.chosen = 2}), Error);
  const Routing r = route(logits, {.chosen = 2}).routing;
  CHECK_THROWS_AS(gather_rows(Tensor::zeros({5, 2}, DType::f32, Device::cpu), r), Error);
  CHECK_THROWS_AS(grouped_matmul(Tensor::zeros({8, 2}, DType::f32, Device::cpu),
                                 Tensor::zeros({2, 2, 2}, DType::f32, Device::cpu), r), Error);
  const auto zeros = [](const Shape& shape) { return Tensor::zeros(shape, DType::f32, Device::cpu); };
  CHECK_THROWS_WITH(add_rms_norm(zeros({4, 3}), zeros({8, 2}), r, zeros({2}), 1e-6), doctest::Contains("of one width"));
  CHECK_THROWS_WITH(grouped_matmul(zeros({8, 2}), zeros({3, 0, 2}), r), doctest::Contains("at least 1"));
  CHECK_THROWS_WITH(expert_mlp(zeros({4, 2}), zeros({3, 0, 2}), zeros({3, 2, 0}), zeros({4, 2}), r, 0, {}),
                    doctest::Contains("at least 1"));
  CHECK_THROWS_AS(route(Tensor::zeros({0, 3}, DType::f32, Device::cpu), {.chosen = 2, .balance = 1}), Error);
}

}  // namespace

TEST_SUITE("cuda") {
  TEST_CASE("routing on the GPU: invariants, ties, one expert") { all_routings_hold(Device::cuda); }
  TEST_CASE("routing on the GPU: logits that are nan") { nan_logits_choose_different_experts(Device::cuda); }
  TEST_CASE("grouped_matmul on the GPU: empty experts, ragged rows, odd sizes") { all_products_hold(Device::cuda); }
  TEST_CASE("expert_mlp on the GPU: empty experts, all on one, ragged rows, odd sizes") {
    mlp_holds({0, 0, 131, 0}, 24, 40, 0.3);
    mlp_holds({0, 259, 0}, 72, 328, 0);
    mlp_holds({1, 127, 128, 129, 0, 3}, 64, 128, 0.3);
    mlp_holds({65, 63, 1, 0, 7}, 520, 16, 0.1);
    mlp_holds({300, 0, 211}, 136, 264, 0.1);
    mlp_holds({17, 40}, 33, 20, 0.1);  // no multiple of 8: the ops one by one
    mlp_holds({0, 0}, 16, 8, 0.1);
  }
  TEST_CASE("weight gradients on the GPU bring their sums of squares: empty experts, ragged rows, odd sizes") {
    squares_hold({0, 0, 131, 0}, 24, 40);
    squares_hold({0, 259, 0}, 72, 328);
    squares_hold({1, 127, 128, 129, 0, 3}, 64, 128);
    squares_hold({65, 63, 1, 0, 7}, 520, 16);
    squares_hold({300, 0, 211}, 136, 264);
    squares_hold({90, 0, 1, 64, 33, 7, 200, 5}, 264, 1032);  // more tiles than multiprocessors
    squares_hold({0, 96, 32, 128, 1, 255, 0, 64}, 768, 1536);
  }
}
