// The optimizers, clipping, the copies and gradients of the leaves they work on, and the table of schedules.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "engine/allocator.h"
#include "engine/ops.h"
#include "engine/optim/adamw.h"
#include "engine/optim/clip.h"
#include "engine/optim/muon.h"
#include "engine/optim/schedule.h"

using namespace weft;

namespace {

Tensor random_tensor(const Shape& shape, uint64_t stream, Device device = Device::cpu) {
  const Tensor t = Tensor::empty(shape, DType::f32, device);
  fill_normal(t, 1.0, {11, stream});
  return t;
}

// A leaf with this value whose gradient is `grad`.
Tensor leaf_with_grad(const Tensor& value, const Tensor& grad) {
  const Tensor w = leaf(value);
  backward(sum(mul(w, grad)));
  return w;
}

Tensor transposed(const Tensor& x) {
  const std::vector<float> from = x.to_vector<float>();
  std::vector<float> to;
  for (int64_t j = 0; j < x.size(1); ++j)
    for (int64_t i = 0; i < x.size(0); ++i) to.push_back(from[static_cast<size_t>(i * x.size(1) + j)]);
  return Tensor::from(to, {x.size(1), x.size(0)}, x.device());
}

double largest_difference(const Tensor& a, const Tensor& b) {
  REQUIRE(a.numel() == b.numel());
  const std::vector<float> x = a.to_vector<float>(), y = b.to_vector<float>();
  double worst = 0;
  for (size_t i = 0; i < x.size(); ++i) worst = std::max(worst, std::abs(static_cast<double>(x[i]) - y[i]));
  return worst;
}

// What one step of Muon at rate 1 subtracts from zeros.
Tensor muon_update(const Tensor& grad, MuonOptions options = {}, double grad_scale = 1) {
  const Tensor w = leaf_with_grad(Tensor::zeros(grad.shape(), DType::f32, grad.device()), grad);
  Muon({w}, options).step(1, grad_scale);
  return scale(w.detached(), -1);
}

// The leaf, with the gradient `grad` as an op in bf16 gives it.
Tensor with_narrow_grad(const Tensor& w, const Tensor& grad, GradientSums sums) {
  sum_gradients(w, sums);
  backward(sum(mul(cast(w, DType::bf16), cast(grad, DType::bf16))));
  return w;
}
Tensor leaf_with_copy(const Tensor& value) {
  const Tensor w = leaf(value);
  keep_copy(w, DType::bf16);
  return w;
}
Tensor leaf_with_narrow_grad(const Tensor& value, const Tensor& grad, GradientSums sums = GradientSums::as_given) {
  return with_narrow_grad(leaf_with_copy(value), grad, sums);
}

void check_copy_is_current(const Tensor& w) {
  const std::vector<float> values = w.to_vector<float>();
  const std::vector<bf16> copies = kept_copy(w).to_vector<bf16>();
  int64_t stale = 0;
  for (size_t i = 0; i < values.size(); ++i) stale += bf16(values[i]).bits != copies[i].bits;
  CHECK(stale == 0);
}

void check_adamw_in_bf16(Device device) {
  for (const GradientSums sums : {GradientSums::as_given, GradientSums::own}) {
    std::vector<Tensor> leaves, references;
    for (const int64_t n : {1, 7, 2048, 4100, 100'000}) {
      const Tensor value = random_tensor({n}, 100 + n, device), grad = random_tensor({n}, 300 + n, device);
      leaves.push_back(leaf_with_narrow_grad(value, grad, sums));
      CHECK(leaves.back().grad().dtype() == (sums == GradientSums::own ? DType::f32 : DType::bf16));
      references.push_back(leaf_with_grad(random_tensor({n}, 100 + n, device), cast(cast(grad, DType::bf16), DType::f32)));
    }
    AdamW adamw(leaves), reference(references);
    for (int step = 0; step < 3; ++step) adamw.step(0.01, 0.5), reference.step(0.01, 0.5);
    for (size_t i = 0; i < leaves.size(); ++i) {
      CHECK(largest_difference(leaves[i], references[i]) <= 3 * std::ldexp(8, -24));
      check_copy_is_current(leaves[i]);
      CHECK(cast(leaves[i], DType::bf16).raw() == kept_copy(leaves[i]).raw());
    }
  }
}

void check_muon_in_bf16(Device device) {
  for (const Shape& shape : {Shape{8, 40}, Shape{5, 7}, Shape{3, 64, 128}}) {
    const Tensor value = random_tensor(shape, 8, device), grad = random_tensor(shape, 9, device);
    const Tensor w = leaf_with_narrow_grad(value, grad);
    const Tensor reference = leaf_with_grad(random_tensor(shape, 8, device), cast(cast(grad, DType::bf16), DType::f32));
    Muon muon({w}), of_reference({reference});
    for (int step = 0; step < 2; ++step) muon.step(0.1, 0.5), of_reference.step(0.1, 0.5);
    CHECK(largest_difference(w, reference) < 1e-6);
    check_copy_is_current(w);
  }
}

// Random values, of which some are made ties of bf16, denormals, the largest float and an infinity.
Tensor odd_values(const Shape& shape, Device device) {
  std::vector<float> values = random_tensor(shape, 12).to_vector<float>();
  for (size_t i = 0; i < values.size(); ++i) {
    const uint32_t u = std::bit_cast<uint32_t>(values[i]);
    const uint32_t odd[] = {(u & 0xffff0000u) | 0x8000u, u & 0x807fffffu, 0x7f7fffffu, 0xff800000u};
    if (i % 16 < 4) values[i] = std::bit_cast<float>(odd[i % 16]);
  }
  return Tensor::from(values, shape, device);
}

// With split leaves an optimizer's steps give the values that it gives with whole ones, to the last bit.
template <class Optimizer, class Options>
void check_split_is_whole(const std::vector<Shape>& shapes, Options options, Device device) {
  for (const GradientSums sums : {GradientSums::as_given, GradientSums::own}) {
    std::vector<Tensor> split, whole;
    for (const Shape& shape : shapes) {
      const Tensor value = odd_values(shape, device), grad = random_tensor(shape, 13, device);
      split.push_back(with_narrow_grad(split_leaf(value), grad, sums));
      whole.push_back(with_narrow_grad(leaf_with_copy(value), grad, sums));
      CHECK(split.back().grad().dtype() == whole.back().grad().dtype());
    }
    const Tensor start = master_value(split.back());
    Optimizer of_split(split, options), of_whole(whole, options);
    for (int step = 0; step < 4; ++step) of_split.step(0.003, 0.5), of_whole.step(0.003, 0.5);
    CHECK(master_value(split.back()).to_vector<float>() != start.to_vector<float>());
    for (size_t i = 0; i < shapes.size(); ++i) {
      const std::vector<float> found = master_value(split[i]).to_vector<float>();
      const std::vector<float> expected = whole[i].to_vector<float>();
      const std::vector<bf16> nearest = split[i].to_vector<bf16>();
      int64_t wrong = 0;
      for (size_t j = 0; j < found.size(); ++j) {
        wrong += std::bit_cast<uint32_t>(found[j]) != std::bit_cast<uint32_t>(expected[j]);
        wrong += nearest[j].bits != halves_of(expected[j]).nearest.bits;
      }
      CAPTURE(shapes[i].str());
      CHECK(wrong == 0);
    }
  }
}
void check_adamw_with_split_leaves(Device device) {
  check_split_is_whole<AdamW>({{1}, {7}, {2048}, {4100}, {3, 50, 70}, {3, 64, 128}}, AdamWOptions{}, device);
}
void check_muon_with_split_leaves(Device device) {
  for (const DType compute : {DType::f32, DType::bf16})
    check_split_is_whole<Muon>({{8, 40}, {5, 7}, {3, 5, 7}, {3, 64, 128}}, MuonOptions{.compute = compute}, device);
}

void check_clipping(Device device) {
  std::vector<Tensor> leaves, gradients;
  for (const int64_t n : {3, 70'000, 768, 200'000}) {
    const Tensor value = random_tensor({n}, 1, device), grad = random_tensor({n}, 2 + n, device);
    leaves.push_back(n == 768 ? leaf_with_grad(value, grad) : leaf_with_narrow_grad(value, grad));
    gradients.push_back(leaves.back().grad());
  }
  const double norm = std::sqrt(squared_norm(gradients).item());
  GradientClip loose(leaves, 1e6), clip(leaves, 2);
  loose.measure(), clip.measure();
  CHECK(loose.read().norm == doctest::Approx(norm).epsilon(1e-6));
  CHECK(loose.read().grad_scale == 1);
  CHECK(clip.read().grad_scale == doctest::Approx(2 / (norm + 1e-6)).epsilon(1e-6));
  CHECK(clip.read().finite == 1);
  CHECK(clip.read().parameter == -1);

  // The update is that of the factors given by hand.
  std::vector<Tensor> references;
  for (size_t i = 0; i < leaves.size(); ++i) {
    const Tensor own = Tensor::like(leaves[i]);
    copy_into(own, leaves[i].detached());
    references.push_back(leaf_with_grad(own, cast(gradients[i], DType::f32)));
  }
  AdamW adamw(leaves), reference(references);
  clip.set_rate_factor(0.25);
  for (int step = 0; step < 2; ++step) {
    if (step > 0) clip.measure();
    adamw.step(0.04, clip.state());
    reference.step(0.01, static_cast<double>(clip.read().grad_scale));
  }
  for (size_t i = 0; i < leaves.size(); ++i) CHECK(largest_difference(leaves[i], references[i]) <= 3 * std::ldexp(8, -24));

  // From the first gradient that is not finite on, nothing changes.
  const auto values = [&] {
    std::vector<std::vector<float>> all;
    for (const Tensor& w : leaves) all.push_back(w.to_vector<float>());
    return all;
  };
  const auto before = values();
  fill(gradients[1].rows(69'999, 70'000), std::numeric_limits<double>::infinity());
  fill(gradients[3].rows(0, 1), std::numeric_limits<double>::quiet_NaN());
  clip.measure();
  CHECK(clip.read().finite == 0);
  CHECK(clip.read().parameter == 1);
  CHECK(clip.read().step == 2);
  adamw.step(0.04, clip.state());
  for (const Tensor& g : gradients) fill(g, 0.5);
  clip.measure();
  adamw.step(0.04, clip.state());
  CHECK(values() == before);
  CHECK(adamw.steps() == 2);
  CHECK(clip.read().finite == 0);
  CHECK(clip.read().parameter == 1);
  CHECK(clip.read().step == 2);

  // A gradient whose squares are more than f32 holds counts as not finite.
  GradientClip overflow(leaves, 2);
  fill(gradients[2].rows(0, 1), 2e19);
  overflow.measure();
  CHECK(overflow.read().finite == 0);
  CHECK(overflow.read().parameter == 2);
}

Tensor sums_of_squares(const Tensor& x, int64_t parts) {
  const std::vector<float> values = x.to_vector<float>();
  const int64_t n = x.numel();
  std::vector<float> sums;
  for (int64_t p = 0; p < parts; ++p) {
    double total = 0;
    for (int64_t i = p * n / parts; i < (p + 1) * n / parts; ++i) total += double{values[i]} * values[i];
    sums.push_back(static_cast<float>(total));
  }
  return Tensor::from(sums, {parts}, x.device());
}

// Gradients that bring the sums of their squares, against the same ones that do not.
void check_squares_given_along(Device device) {
  const std::vector<int64_t> sizes = {3, 70'000, 768, 200'000, 130'000}, parts = {0, 7, 0, 37, 1};
  std::vector<Tensor> leaves, references;
  for (const int64_t n : sizes)
    for (auto* const list : {&leaves, &references}) list->push_back(leaf(Tensor::zeros({n}, DType::f32, device)));
  const auto give = [&](const Tensor& w, uint64_t stream, int64_t sums) {
    backward(record("gives", Tensor::zeros({}, DType::f32, device), {w}, [=](const Tensor&) -> Gradients {
      Tensor dw = random_tensor(w.shape(), stream, device);
      if (sums > 0) dw.set_squares(sums_of_squares(dw, sums));
      return {dw};
    }));
  };
  const auto micro_batch = [&](uint64_t stream) {
    for (size_t i = 0; i < sizes.size(); ++i) {
      give(leaves[i], stream + i, parts[i]);
      give(references[i], stream + i, 0);
    }
  };
  const auto measure = [](const std::vector<Tensor>& of) {
    GradientClip clip(of, 1);
    clip.measure();
    return clip.read();
  };
  const auto same_norms = [&] {
    const UpdateState found = measure(leaves), expected = measure(references);
    CHECK(found.norm == doctest::Approx(expected.norm).epsilon(1e-6));
    CHECK(found.grad_scale == doctest::Approx(expected.grad_scale).epsilon(1e-6));
    CHECK(found.finite == 1);
  };
  micro_batch(100);
  same_norms();
  const float norm = measure(leaves).norm;
  CHECK(measure(leaves).norm == norm);
  for (size_t i = 0; i < sizes.size(); ++i) {
    CHECK((leaves[i].grad().squares() != nullptr) == (parts[i] > 0));
    CHECK(leaves[i].grad().view({1, sizes[i]}).squares() == nullptr);
    CHECK(references[i].grad().squares() == nullptr);
  }
  micro_batch(200);  // the sums of two gradients' squares say nothing of their sum's
  for (const Tensor& w : leaves) CHECK(w.grad().squares() == nullptr);
  same_norms();

  // The first gradient that is not finite is found by the sums alone.
  for (const auto* const list : {&leaves, &references})
    for (const Tensor& w : *list) w.clear_grad();
  micro_batch(100);
  const double infinity = std::numeric_limits<double>::infinity();
  fill(leaves[1].grad(), 0);  // no one reads it
  CHECK(measure(leaves).norm == norm);
  fill(leaves[3].grad().squares()->rows(36, 37), infinity);
  fill(leaves[4].grad().squares()->rows(0, 1), std::numeric_limits<double>::quiet_NaN());
  fill(references[3].grad().rows(199'999, 200'000), infinity);
  for (const auto* const list : {&leaves, &references}) {
    CHECK(measure(*list).finite == 0);
    CHECK(measure(*list).parameter == 3);
  }
  fill(leaves[2].grad().rows(0, 1), infinity);
  CHECK(measure(leaves).parameter == 2);
}

void check_same_on_gpu(const Shape& shape, DType compute, double tolerance) {
  const Tensor grad = random_tensor(shape, 3);
  const Tensor expected = muon_update(grad);
  CHECK(largest_difference(muon_update(grad.to(Device::cuda), {.compute = compute}), expected) < tolerance);
}

}  // namespace

TEST_CASE("AdamW follows its formula") {
  // More tensors than one launch takes, of sizes around a block's.
  std::vector<Tensor> leaves, references;
  for (int i = 0; i < 70; ++i) {
    const Shape shape{1 + i % 7 * 1500};
    references.push_back(random_tensor(shape, 100 + i));
    leaves.push_back(leaf_with_grad(random_tensor(shape, 100 + i), random_tensor(shape, 300 + i)));
  }
  AdamW adamw(leaves, {.weight_decay = 0.1});
  for (int step = 0; step < 3; ++step) adamw.step(0.01, 0.5);
  CHECK(adamw.steps() == 3);
  for (size_t i = 0; i < leaves.size(); ++i) {
    const std::vector<float> g = leaves[i].grad().to_vector<float>(), w = leaves[i].to_vector<float>();
    const std::vector<float> start = references[i].to_vector<float>();
    double worst = 0;
    for (size_t j = 0; j < w.size(); ++j) {
      double x = start[j], m = 0, v = 0;
      for (int t = 1; t <= 3; ++t) {
        const double grad = 0.5 * g[j];
        m = 0.9 * m + 0.1 * grad;
        v = 0.999 * v + 0.001 * grad * grad;
        x -= 0.01 * 0.1 * x;
        x -= 0.01 * (m / (1 - std::pow(0.9, t))) / (std::sqrt(v / (1 - std::pow(0.999, t))) + 1e-8);
      }
      worst = std::max(worst, std::abs(x - w[j]));
    }
    CHECK(worst < 1e-5);
  }
}

TEST_CASE("AdamW takes bf16 gradients and writes bf16 copies") { check_adamw_in_bf16(Device::cpu); }
TEST_CASE("Muon takes bf16 gradients and writes bf16 copies") { check_muon_in_bf16(Device::cpu); }
TEST_CASE("AdamW updates split leaves as whole ones, bit for bit") { check_adamw_with_split_leaves(Device::cpu); }
TEST_CASE("Muon updates split leaves as whole ones, bit for bit") { check_muon_with_split_leaves(Device::cpu); }
TEST_CASE("clipping measures the gradients and stops at what is not finite") { check_clipping(Device::cpu); }

TEST_CASE("clipping takes the sums of squares that gradients bring") { check_squares_given_along(Device::cpu); }

TEST_CASE("a leaf's gradient shares memory with nothing else") {
  const Tensor value = random_tensor({64}, 1);
  const auto gives = [](const Tensor& w, const Tensor& dw) {  // an op whose gradient is dw, whatever arrives
    return record("gives", Tensor::zeros({}, DType::f32, Device::cpu), {w}, [dw](const Tensor&) -> Gradients { return {dw}; });
  };
  SUBCASE("one gradient for two leaves") {
    const Tensor a = leaf(value), b = leaf(value);
    backward(sum(add(a, b)));
    CHECK(a.grad().raw() != b.grad().raw());
  }
  SUBCASE("a gradient that someone holds") {
    const Tensor w = leaf(value), held = random_tensor({64}, 2);
    const std::vector<float> values = held.to_vector<float>();
    backward(gives(w, held));
    CHECK(w.grad().raw() != held.raw());
    backward(gives(w, held));
    CHECK(held.to_vector<float>() == values);
    CHECK(largest_difference(w.grad(), scale(held, 2)) == 0);
  }
  SUBCASE("a gradient that no one else holds is taken as it is") {
    const Tensor w = leaf(value);
    Tensor fresh = random_tensor({64}, 2);
    const void* const memory = fresh.raw();
    const Tensor loss = gives(w, fresh);
    fresh = {};
    backward(loss);
    CHECK(w.grad().raw() == memory);
  }
}

TEST_CASE("gradients of a leaf that is used in two dtypes add up") {
  for (const GradientSums sums : {GradientSums::as_given, GradientSums::own}) {
    const Tensor w = leaf_with_copy(random_tensor({64}, 1)), a = random_tensor({64}, 2), b = random_tensor({64}, 3);
    sum_gradients(w, sums);
    const Tensor wide = sum(mul(w, a)), narrow = cast(sum(mul(cast(w, DType::bf16), cast(b, DType::bf16))), DType::f32);
    backward(add(wide, narrow));
    CHECK(largest_difference(cast(w.grad(), DType::f32), add(a, b)) < 0.05);
  }
}

TEST_CASE("gradients count as gradients of their layer in memory reports") {
  const auto held = [] { return allocator(Device::cpu).stats().current[static_cast<int>(Category::gradient)]; };
  const int64_t before = held();
  Tensor w;
  {
    const MemoryScope memory(Category::parameter, "a layer");
    w = leaf(random_tensor({1024}, 1));
  }
  allocator(Device::cpu).reset_peaks();
  backward(sum(mul(w, random_tensor({1024}, 2))));
  CHECK(held() - before == 4096);
  w.clear_grad();
  CHECK(held() == before);
}

TEST_CASE("an optimizer says which parameter has no gradient") {
  const Tensor w = leaf(random_tensor({3, 4}, 1));
  CHECK_THROWS_WITH_AS(AdamW({w}).step(0.1), doctest::Contains("parameter 0 of shape [3, 4] has no gradient"), Error);
  CHECK_THROWS_WITH_AS(Muon({w}).step(0.1), doctest::Contains("parameter 0 of shape [3, 4] has no gradient"), Error);
  CHECK_THROWS_AS(Muon({leaf(random_tensor({3}, 1))}), Error);
}

TEST_CASE("Muon's update is nearly orthogonal, whatever the gradient's size") {
  for (const double size : {1e-4, 1.0, 1e4}) {
    const Tensor x = muon_update(scale(random_tensor({8, 40}, 1), size));
    const std::vector<float> gram = matmul(x, x, Transpose::b).to_vector<float>();
    for (int i = 0; i < 8; ++i)
      for (int j = 0; j < 8; ++j) CHECK(std::abs(gram[static_cast<size_t>(8 * i + j)] - (i == j)) < 0.6);
  }
  CHECK(largest_difference(muon_update(Tensor::zeros({4, 4}, DType::f32, Device::cpu)),
                           Tensor::zeros({4, 4}, DType::f32, Device::cpu)) == 0);
}

TEST_CASE("Muon treats a tall matrix as its transpose, times sqrt(rows / cols)") {
  const Tensor wide = random_tensor({6, 24}, 2);
  CHECK(largest_difference(muon_update(transposed(wide)), scale(transposed(muon_update(wide)), 2)) < 1e-5);
}

TEST_CASE("Muon treats each matrix of a stack by itself") {
  const Tensor stack = random_tensor({3, 5, 7}, 4);
  const Tensor together = muon_update(stack);
  for (int64_t e = 0; e < 3; ++e)
    CHECK(largest_difference(together.rows(e, e + 1), muon_update(stack.rows(e, e + 1).view({5, 7}))) < 1e-6);
}

TEST_CASE("Muon's momentum is Nesterov's and takes in the scaled gradient") {
  const Tensor g1 = random_tensor({4, 6}, 5), g2 = random_tensor({4, 6}, 6);
  const Tensor w = leaf_with_grad(Tensor::zeros({4, 6}, DType::f32, Device::cpu), g1);
  Muon muon({w}, {.momentum = 0.9});
  muon.step(0, 0.5);
  CHECK(largest_difference(w, Tensor::zeros({4, 6}, DType::f32, Device::cpu)) == 0);
  CHECK(largest_difference(muon.momentum()[0], scale(g1, 0.05)) < 1e-6);
  w.clear_grad();
  backward(sum(mul(w, g2)));
  muon.step(1, 0.5);
  // m = 0.9 * 0.05 g1 + 0.1 * 0.5 g2; u = 0.5 g2 + 0.9 (m - 0.5 g2)
  const Tensor m = add(scale(g1, 0.045), scale(g2, 0.05));
  const Tensor u = add(scale(g2, 0.05), scale(m, 0.9));
  const double norm = std::sqrt(squared_norm({u}).item());
  const Tensor expected = orthogonalized(scale(u, 1 / norm).view({1, 4, 6}));
  CHECK(largest_difference(scale(w.detached(), -1), expected) < 1e-5);
}

TEST_CASE("schedules") {
  const Course course{.micro_steps = 100, .optimizer_steps = 25};
  const auto seed = schedule("seed").factor;
  for (int64_t s = 0; s < 5; ++s) CHECK(seed(s, course) == doctest::Approx(s / 5.0));
  for (int64_t s = 5; s < 25; ++s)
    CHECK(seed(s, course) == doctest::Approx(0.1 + 0.9 * 0.5 * (1 + std::cos(3.14159265358979 * (s - 5) / 95.0))));
  const Course longer{.micro_steps = 400, .optimizer_steps = 100};
  const auto strict = schedule("strict").factor;
  CHECK(strict(0, longer) == doctest::Approx(0.2));
  CHECK(strict(4, longer) == 1);
  CHECK(strict(5, longer) == 1);
  CHECK(strict(100, longer) == doctest::Approx(0.1));
  CHECK(strict(0, {1, 1}) == 1);
  CHECK_THROWS_AS(schedule("none"), Error);
}

TEST_SUITE("cuda") {
  TEST_CASE("AdamW takes bf16 gradients and writes bf16 copies on the GPU") { check_adamw_in_bf16(Device::cuda); }
  TEST_CASE("Muon takes bf16 gradients and writes bf16 copies on the GPU") { check_muon_in_bf16(Device::cuda); }
  TEST_CASE("AdamW updates split leaves as whole ones, bit for bit, on the GPU") {
    check_adamw_with_split_leaves(Device::cuda);
  }
  TEST_CASE("Muon updates split leaves as whole ones, bit for bit, on the GPU") {
    check_muon_with_split_leaves(Device::cuda);
  }
  TEST_CASE("clipping measures the gradients and stops at what is not finite on the GPU") {
    check_clipping(Device::cuda);
  }
  TEST_CASE("clipping takes the sums of squares that gradients bring on the GPU") {
    check_squares_given_along(Device::cuda);
  }
  TEST_CASE("Muon on the GPU is Muon on the CPU") {
    for (const Shape& shape : {Shape{8, 40}, Shape{40, 8}, Shape{300, 300}, Shape{3, 64, 128}}) {
      check_same_on_gpu(shape, DType::f32, 1e-4);
      check_same_on_gpu(shape, DType::bf16, 0.1);
    }
  }
  TEST_CASE("AdamW on the GPU is AdamW on the CPU") {
    std::vector<Tensor> cpu, gpu;
    for (int i = 0; i < 70; ++i) {
      const Shape shape{1 + i % 7 * 1500};
      const Tensor value = random_tensor(shape, 100 + i), grad = random_tensor(shape, 300 + i);
      gpu.push_back(leaf_with_grad(value.to(Device::cuda), grad.to(Device::cuda)));
      cpu.push_back(leaf_with_grad(value, grad));
    }
    AdamW on_cpu(cpu), on_gpu(gpu);
    for (int step = 0; step < 3; ++step) on_cpu.step(0.01, 0.5), on_gpu.step(0.01, 0.5);
    // Each step may round a value (below 8) differently by one unit in its last place.
    for (size_t i = 0; i < cpu.size(); ++i) CHECK(largest_difference(cpu[i], gpu[i]) <= 3 * std::ldexp(8, -24));
  }
}
