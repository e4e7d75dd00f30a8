// What no table of values can say of dropout: that it keeps as often as it should, keeps the mean, and draws the same
// mask for the gradient.
#include <doctest/doctest.h>

#include <cmath>

#include "engine/ops.h"

using namespace weft;

TEST_CASE("dropout keeps 1 - p of the elements, keeps the mean, and masks the gradient alike") {
  constexpr int64_t kN = 1 << 20;
  for (const double p : {0.1, 0.5, 0.93}) {
    CAPTURE(p);
    const Tensor x = leaf(Tensor::from(std::vector<float>(kN, 1.0f), {kN}, Device::cpu));
    const Tensor y = dropout(x, p, {3, 5});
    const auto values = y.to_vector<float>();
    int64_t kept = 0;
    double total = 0;
    for (const float v : values) kept += v != 0, total += v;
    const double sigma = std::sqrt(p * (1 - p) / kN);
    CHECK(std::abs(static_cast<double>(kept) / kN - (1 - p)) < 5 * sigma);
    CHECK(std::abs(total / kN - 1) < 5 * sigma / (1 - p));

    backward(sum(y));
    CHECK(x.grad().to_vector<float>() == values);
  }
}

TEST_CASE("neighbours in a dropout mask, and masks of two keys, are independent") {
  constexpr int64_t kN = 1 << 20;
  const Tensor x = Tensor::from(std::vector<float>(kN, 1.0f), {kN}, Device::cpu);
  const auto a = dropout(x, 0.5, {3, 5}).to_vector<float>(), b = dropout(x, 0.5, {3, 6}).to_vector<float>();
  int64_t neighbours = 0, keys = 0;
  for (size_t i = 0; i + 1 < kN; ++i) neighbours += a[i] == a[i + 1], keys += a[i] == b[i];
  const double sigma = std::sqrt(0.25 / kN);
  CHECK(std::abs(static_cast<double>(neighbours) / kN - 0.5) < 5 * sigma);
  CHECK(std::abs(static_cast<double>(keys) / kN - 0.5) < 5 * sigma);
}

TEST_CASE("dropout with p = 0 is its input, and p outside [0, 1) is refused") {
  const Tensor x = Tensor::from(std::vector<float>{1, 2}, {2}, Device::cpu);
  CHECK(dropout(x, 0, {}).raw() == x.raw());
  CHECK_THROWS_AS(dropout(x, 1, {}), Error);
  CHECK_THROWS_AS(dropout(x, -0.1, {}), Error);
}

TEST_CASE("a key with a step in memory draws what that step's keys draw") {
  constexpr int64_t kN = 1000;
  const Tensor x = Tensor::from(std::vector<float>(kN, 1.0f), {kN}, Device::cpu);
  const Tensor rows = reshape(x, {kN, 1}), gate = Tensor::zeros({1, 1}, DType::f32, Device::cpu);
  uint64_t step = 0;
  Rng by_memory(3, &step);
  const RngKey first = by_memory.next(), second = by_memory.next();
  for (step = 0; step < 3; ++step) {
    CAPTURE(step);
    Rng by_number(3, step);
    for (const RngKey& key : {first, second}) {
      const RngKey expected = by_number.next();
      CHECK(dropout(x, 0.5, key).to_vector<float>() == dropout(x, 0.5, expected).to_vector<float>());
      CHECK(router_logits(rows, gate, 1, key).to_vector<float>() ==
            router_logits(rows, gate, 1, expected).to_vector<float>());
    }
  }
}
