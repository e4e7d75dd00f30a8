// Weights whose f32 values are split: the encoding, and what such a leaf is to ops, gradients and memory.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "engine/allocator.h"
#include "engine/nn/params.h"

using namespace weft;

namespace {

// For every upper half of a float's bits the lower ones around 0, a tie and the end.
std::vector<float> many_floats() {
  std::vector<float> values;
  for (uint32_t upper = 0; upper < 0x10000u; ++upper)
    for (const uint32_t lower : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu})
      values.push_back(std::bit_cast<float>(upper << 16 | lower));
  return values;
}

uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }

// How many values are not what they should be, bit for bit; a NaN should be any NaN.
int64_t differing(const std::vector<float>& found, const std::vector<float>& expected) {
  REQUIRE(found.size() == expected.size());
  int64_t n = 0;
  for (size_t i = 0; i < found.size(); ++i)
    n += std::isnan(expected[i]) ? !std::isnan(found[i]) : bits_of(found[i]) != bits_of(expected[i]);
  return n;
}

void check_values_come_back(Device device) {
  const std::vector<float> values = many_floats();
  const Shape shape{static_cast<int64_t>(values.size())};
  const Tensor w = split_leaf(Tensor::from(values, shape, device));
  CHECK(differing(master_value(w).to_vector<float>(), values) == 0);
  const std::vector<bf16> nearest = w.to_vector<bf16>();
  int64_t wrong = 0, ties = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const bool tie = (bits_of(values[i]) & 0xffffu) == 0x8000u, same = nearest[i].bits == bf16(values[i]).bits;
    if (tie && std::isfinite(values[i])) ++ties, wrong += std::abs(float(nearest[i])) <= std::abs(values[i]);
    else wrong += std::isnan(values[i]) ? !std::isnan(float(nearest[i])) : !same;
  }
  CHECK(wrong == 0);
  CHECK(ties == 2 * 255 * 128);

  set_master_value(w, Tensor::zeros(shape, DType::f32, device));
  CHECK(differing(master_value(w).to_vector<float>(), std::vector<float>(values.size(), 0.0f)) == 0);
}

}  // namespace

TEST_CASE("a split value comes back bit for bit, and its upper half is the nearest bf16") {
  check_values_come_back(Device::cpu);
}

TEST_CASE("a split leaf is its bf16 values to ops in bf16, and f32 to others and to its gradients' sums") {
  const Tensor values = Tensor::from(std::vector<float>{1.001f, -2.5f, 3e-5f, 7.0f}, {4}, Device::cpu);
  const Tensor g = Tensor::from(std::vector<float>{1, 2, 3, 4}, {4}, Device::cpu);
  for (const GradientSums sums : {GradientSums::own, GradientSums::as_given}) {
    const Tensor w = split_leaf(values);
    sum_gradients(w, sums);
    CHECK(cast(w, DType::bf16).raw() == w.raw());
    CHECK_THROWS_AS(w.data<float>(), Error);
    const auto narrow = [&] { backward(sum(mul(cast(w, DType::bf16), cast(g, DType::bf16)))); };
    narrow();
    CHECK(w.grad().dtype() == (sums == GradientSums::own ? DType::f32 : DType::bf16));
    narrow();
    CHECK(cast(w.grad(), DType::f32).to_vector<float>() == std::vector<float>{2, 4, 6, 8});
    w.clear_grad();

    const Tensor wide = cast(w, DType::f32);
    CHECK(wide.to_vector<float>() == values.to_vector<float>());
    backward(sum(mul(wide, g)));
    CHECK(w.grad().to_vector<float>() == g.to_vector<float>());
  }
}

TEST_CASE("experts' parameters are split where the model computes in bf16, and start as in f32") {
  const Shape experts{3, 40, 50}, matrix{40, 50};
  const auto make = [](Params& params, const Shape& shape) {
    return Scope(params, Device::cpu, 7).param("weight", shape, normal(0.02), Kind::matrix);
  };
  Params wide, wide_matrix, narrow_matrix(DType::bf16);
  const Tensor expected = make(wide, experts);
  CachingAllocator& memory = allocator(Device::cpu);
  const auto held = [&] { return memory.stats().current[static_cast<int>(Category::parameter)]; };
  const int64_t before = held();
  Params narrow(DType::bf16);
  const Tensor w = make(narrow, experts);
  CHECK(held() - before == 2 * 12'288);  // 2 bytes a weight, in steps of 512, twice
  CHECK(w.dtype() == DType::bf16);
  CHECK(master_value(w).to_vector<float>() == expected.to_vector<float>());
  CHECK(expected.dtype() == DType::f32);

  CHECK(make(narrow_matrix, matrix).to_vector<float>() == make(wide_matrix, matrix).to_vector<float>());
  CHECK(kept_copy(narrow_matrix.list()[0].value).dtype() == DType::bf16);
  CHECK(!kept_copy(wide_matrix.list()[0].value));
}

TEST_SUITE("cuda") {
  TEST_CASE("a split value comes back bit for bit on the GPU") { check_values_come_back(Device::cuda); }
}
