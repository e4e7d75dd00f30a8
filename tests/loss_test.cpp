// The edges of the ops around the vocabulary: targets and ids outside it, extreme logits, ties, and whose memory the
// loss's gradient may take.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/ops.h"

using namespace weft;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

Tensor floats(const std::vector<float>& v, const Shape& shape, Device d) { return Tensor::from(v, shape, d); }
Tensor ints(const std::vector<int32_t>& v, Device d) {
  return Tensor::from(v, {static_cast<int64_t>(v.size())}, d);
}

void extreme_logits(Device d) {
  const Tensor x = floats({-kInf, 3, -kInf, 1e4f, -1e4f, 0, -kInf, -kInf, 7}, {3, 3}, d);
  CHECK(cross_entropy(x, ints({1, 0, 2}, d)).item() == doctest::Approx(0));
  CHECK(cross_entropy(x, ints({1, 2, 2}, d)).item() == doctest::Approx(1e4 / 3));

  // A thousand equal words after thousands that cannot be, so far below zero that exp of them is 0.
  std::vector<float> row(5000, -kInf);
  std::fill(row.begin() + 4000, row.end(), -500.0f);
  CHECK(cross_entropy(floats(row, {1, 5000}, d), ints({4500}, d)).item() == doctest::Approx(std::log(1000)));
}

void ties_and_nans(Device d) {
  const Tensor x = floats({2, 2, 1, /**/ 1, 2, 2, /**/ 0, kNan, 5, /**/ -kInf, -kInf, -kInf}, {4, 3}, d);
  CHECK(count_correct(x, ints({0, 1, 2, 0}, d)).item() == 3);
  CHECK(count_correct(x, ints({1, 2, 1, 1}, d)).item() == 0);
  CHECK(count_correct(x, ints({0, 1, -1, 3}, d)).item() == 2);
}

void memory_of_the_logits(Device d) {
  const Tensor source = leaf(floats({1, 2, 3, 4, 5, 6}, {2, 3}, d));
  const Tensor held = scale(source, 2);
  const auto before = held.to_vector<float>();
  backward(cross_entropy(held, ints({0, 2}, d)));
  CHECK(held.to_vector<float>() == before);

  const Tensor again = leaf(floats({1, 2, 3, 4, 5, 6}, {2, 3}, d));
  Tensor alone = scale(again, 2);
  const Tensor loss = cross_entropy(alone, ints({0, 2}, d));
  const void* const memory = alone.raw();
  alone = {};
  const Gradients gradients = loss.node()->gradient(Tensor::from(std::vector<float>{1}, {}, d));
  loss.node()->gradient = nullptr;
  CHECK(gradients[0].raw() == memory);
  const auto dx = gradients[0].to_vector<float>(), source_gradient = source.grad().to_vector<float>();
  for (size_t i = 0; i < dx.size(); ++i) CHECK(dx[i] * 2 == doctest::Approx(source_gradient[i]));
}

void ids_outside_the_table(Device d) {
  const Tensor table = leaf(floats({1, 2, 3, 4}, {2, 2}, d));
  const Tensor y = embedding(ints({1, -1, 2, 1}, d), table, 10, DType::f32);
  CHECK(y.to_vector<float>() == std::vector<float>{30, 40, 0, 0, 0, 0, 30, 40});
  backward(sum(y));
  CHECK(table.grad().to_vector<float>() == std::vector<float>{0, 0, 20, 20});
}

// A tied table: the head's gradient is there when the embedding adds its rows.
void rows_join_the_gradient(Device d) {
  const Tensor table = leaf(floats({1, 2, 3, 4}, {2, 2}, d));
  const Tensor y = embedding(ints({1, 1}, d), table, 10, DType::f32);
  backward(sum(mul(y, matmul(floats({1, 0, 0, 1}, {2, 2}, d), table, Transpose::b))));
  CHECK(table.grad().to_vector<float>() == std::vector<float>{30, 30, 40 + 30, 40 + 70});
  const auto once = table.grad().to_vector<float>();
  backward(sum(embedding(ints({0}, d), table, 10, DType::f32)));
  CHECK(table.grad().to_vector<float>() == std::vector<float>{once[0] + 10, once[1] + 10, once[2], once[3]});
}

// The second backward adds to what the leaves have, from one part of the rows, two, and more.
void gradients_add_up(Device d) {
  for (const int64_t chunk : {5, 3, 1}) {
    const Tensor x = leaf(floats({1, 2, 3, 4, -1, 0, 2, 2, 0, 1}, {5, 2}, d));
    const Tensor weight = leaf(floats({1, 0, 0, 1, 1, 1}, {3, 2}, d));
    const auto walk = [&] { backward(scale(linear_cross_entropy(x, weight, ints({0, 2, 1, 1, 0}, d), chunk), 0.25)); };
    walk();
    const auto dx = x.grad().to_vector<float>(), dweight = weight.grad().to_vector<float>();
    walk();
    const auto dx_twice = x.grad().to_vector<float>(), dweight_twice = weight.grad().to_vector<float>();
    for (size_t i = 0; i < dx.size(); ++i) CHECK(dx_twice[i] == doctest::Approx(2 * dx[i]));
    for (size_t i = 0; i < dweight.size(); ++i) CHECK(dweight_twice[i] == doctest::Approx(2 * dweight[i]));
  }
}

void nothing_recorded(Device d) {
  const Tensor x = leaf(floats({1, 2, 3, 4}, {2, 2}, d)), weight = leaf(floats({1, 0, 0, 1, 1, 1}, {3, 2}, d));
  const NoGrad no_grad;
  const Tensor loss = linear_cross_entropy(x, weight, ints({0, 2}, d));
  CHECK(!loss.needs_grad());
  CHECK(loss.item() == doctest::Approx(linear_score(x, weight, ints({0, 2}, d), 1).loss.item()));
}

}  // namespace

TEST_CASE("the embedding's rows are added to a gradient that is there") { rows_join_the_gradient(Device::cpu); }
TEST_CASE("the head's gradients add up over micro-batches") { gradients_add_up(Device::cpu); }
TEST_CASE("the head's loss makes no gradient where none is recorded") { nothing_recorded(Device::cpu); }
TEST_CASE("the loss stays exact with logits that are infinite or huge") { extreme_logits(Device::cpu); }
TEST_CASE("accuracy: the first of equals counts, a nan never does") { ties_and_nans(Device::cpu); }
TEST_CASE("the loss's gradient takes the logits' memory only where no one else holds it") {
  memory_of_the_logits(Device::cpu);
}
TEST_CASE("ids outside the table read as zeros and give no gradient") { ids_outside_the_table(Device::cpu); }
TEST_CASE("a target outside the vocabulary is refused") {
  const Tensor x = floats({1, 2, 3, 4}, {2, 2}, Device::cpu);
  CHECK_THROWS_WITH(cross_entropy(x, ints({0, -1}, Device::cpu)), doctest::Contains("target -1 of row 1"));
  CHECK_THROWS_WITH(cross_entropy(x, ints({2, 0}, Device::cpu)), doctest::Contains("target 2 of row 0"));
  CHECK_THROWS_AS(cross_entropy(x, ints({0}, Device::cpu)), Error);
  for (const int64_t chunk_rows : {1, 2})
    CHECK_THROWS_WITH(linear_cross_entropy(x, x, ints({0, 2}, Device::cpu), chunk_rows),
                      doctest::Contains("linear_cross_entropy: target 2 of row 1"));
}

TEST_SUITE("cuda") {
  TEST_CASE("the edges on the GPU") {
    extreme_logits(Device::cuda);
    ties_and_nans(Device::cuda);
    memory_of_the_logits(Device::cuda);
    ids_outside_the_table(Device::cuda);
    rows_join_the_gradient(Device::cuda);
    gradients_add_up(Device::cuda);
    nothing_recorded(Device::cuda);
  }
  TEST_CASE("a target outside the vocabulary makes the loss nan on the GPU") {
    const Tensor x = floats({1, 2, 3, 4}, {2, 2}, Device::cuda);
    CHECK(std::isnan(cross_entropy(x, ints({0, -1}, Device::cuda)).item()));
    CHECK(std::isnan(cross_entropy(x, ints({2, 0}, Device::cuda)).item()));
    CHECK(std::isnan(linear_cross_entropy(x, x, ints({0, 2}, Device::cuda)).item()));
    CHECK(linear_score(x, x, ints({1, -1}, Device::cuda)).correct.item() == 1);
  }
  // Rows of one word among thousands, so that runs are long: sums in another order would differ in bits.
  TEST_CASE("the gradients of embedding and rms_norm are the same bits every time") {
    constexpr int64_t kN = 4096, kD = 768;
    std::vector<int32_t> words(kN);
    std::vector<float> values(kN * kD);
    for (size_t i = 0; i < words.size(); ++i)
      words[i] = static_cast<int32_t>(random_below({1, 2}, i, i % 2 ? 1 : 1000));
    for (size_t i = 0; i < values.size(); ++i) values[i] = random_normal({1, 3}, i);
    const Tensor dy = floats(values, {kN, kD}, Device::cuda);
    const auto run = [&] {
      const Tensor table = leaf(Tensor::zeros({1000, kD}, DType::f32, Device::cuda));
      const Tensor weight = leaf(floats(std::vector<float>(kD, 1), {kD}, Device::cuda));
      backward(sum(mul(embedding(ints(words, Device::cuda), table, 1, DType::f32), dy)));
      backward(sum(rms_norm(dy, weight, 1e-6)));
      return std::pair(table.grad().to_vector<float>(), weight.grad().to_vector<float>());
    };
    CHECK(run() == run());
  }
}
