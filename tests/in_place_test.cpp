// What works in place and takes no gradient: zero, fill, fill_normal, add_into, copy_into, squared_norm.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "engine/ops.h"

namespace {
using namespace weft;

void check_in_place(Device device) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const int64_t n : {1, 7, 64, 1000, 4099}) {
      const Tensor x = Tensor::empty({n}, dtype, device), wide = Tensor::empty({n}, DType::f32, device);
      const auto all_are = [&](const Tensor& t, double value) {
        const Tensor f = cast(t, DType::f32).to(Device::cpu);
        for (int64_t i = 0; i < n; ++i)
          if (f.data<float>()[i] != value) return false;
        return true;
      };
      fill(x, 1.5), fill(wide, 0.25);
      CHECK(all_are(x, 1.5));
      add_into(wide, x);
      CHECK(all_are(wide, 1.75));
      add_into(x, wide);
      CHECK(all_are(x, 3.25));
      copy_into(wide, x);
      CHECK(all_are(wide, 3.25));
      // 3.25^2 * n is exact in f32 at these sizes.
      CHECK(squared_norm({x, wide, x}).item() == 3 * 3.25 * 3.25 * static_cast<double>(n));
      zero(x);
      CHECK(all_are(x, 0));
    }
    const Tensor x = Tensor::empty({100'000}, dtype, device);
    fill_normal(x, 2, {5, 6});
    const Tensor host = cast(x, DType::f32).to(Device::cpu);
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < x.numel(); ++i) {
      sum += host.data<float>()[i], squares += std::pow(host.data<float>()[i], 2);
      if (i < 100) {
        const double drawn = 2 * random_normal({5, 6}, static_cast<uint64_t>(i));
        CHECK(host.data<float>()[i] == doctest::Approx(drawn).epsilon(dtype == DType::f32 ? 1e-5 : 0.005));
      }
    }
    CHECK(std::abs(sum / 1e5) < 5 * 2 / std::sqrt(1e5));
    CHECK(squares / 1e5 == doctest::Approx(4).epsilon(5 * std::sqrt(2 / 1e5)));
    for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
      fill(x.rows(99'999, 100'000), bad);
      CHECK(!std::isfinite(squared_norm({x}).item()));
    }
  }
}

// More tensors than one launch takes, of sizes below, at and above the range that one block sums, at odd addresses.
void check_squared_norm_of_many(Device device) {
  std::vector<Tensor> xs;
  double expected = 0;
  for (int64_t i = 0; i < 300; ++i) {
    const int64_t n = i % 50 == 0 ? 65536 : i % 50 == 1 ? 65536 * 2 + 5 : i % 50 == 2 ? 0 : 3 * i + 1;
    const Tensor x = Tensor::empty({n + 3}, i % 2 == 0 ? DType::f32 : DType::bf16, device);
    fill(x, 0.5);
    xs.push_back(x.rows(i % 4, n + i % 4));
    expected += 0.25 * static_cast<double>(n);
  }
  CHECK(squared_norm(xs).item() == expected);
}

}  // namespace

TEST_CASE("the squared norm of many tensors on the CPU") { check_squared_norm_of_many(Device::cpu); }
TEST_CASE("in-place ops on the CPU") { check_in_place(Device::cpu); }
TEST_SUITE("cuda") {
  TEST_CASE("the squared norm of many tensors on the GPU") { check_squared_norm_of_many(Device::cuda); }
  TEST_CASE("in-place ops on the GPU") { check_in_place(Device::cuda); }
}
