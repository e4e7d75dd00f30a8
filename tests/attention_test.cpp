// Attention against dense f64 formulas written out in full, and the GPU's kernels against the CPU's loops.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "engine/device.h"
#include "engine/ops.h"

using namespace weft;

namespace {

struct Sizes {
  int64_t batch, time, heads, key_heads, key_width, value_width;
  int64_t rotated = 0;
  bool side_by_side = false;
  std::string str() const {
    return fmt::format("B={} T={} H={} Hk={} Dk={} Dv={} R={} {}", batch, time, heads, key_heads, key_width,
                       value_width, rotated, side_by_side ? "side by side" : "apart");
  }
};

std::vector<double> normals(int64_t n, uint64_t stream) {
  std::vector<double> x(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) x[static_cast<size_t>(i)] = random_normal({11, stream}, static_cast<uint64_t>(i));
  return x;
}

struct Values {
  std::vector<double> q, k, v, dy;
  explicit Values(const Sizes& z)
      : q(normals(z.batch * z.time * z.heads * z.key_width, 1)),
        k(normals(z.batch * z.time * z.key_heads * z.key_width, 2)),
        v(normals(z.batch * z.time * z.heads * z.value_width, 3)),
        dy(normals(z.batch * z.time * z.heads * z.value_width, 4)) {}
};

struct Result {
  std::vector<double> y, dq, dk, dv;
};

// The formulas, one full row of the [T, T] matrices after the other.
Result dense(const Sizes& z, const Values& x, const AttentionOptions& o) {
  Result r{std::vector<double>(x.v.size()), std::vector<double>(x.q.size()), std::vector<double>(x.k.size()),
           std::vector<double>(x.v.size())};
  const int64_t T = z.time, H = z.heads, Dk = z.key_width, Dv = z.value_width;
  const Mask mask(o.key, o.dropout);
  const int64_t row_width = (T + 63) / 64 * 64;
  std::vector<double> p(static_cast<size_t>(T)), m(p), dp(p);
  for (int64_t b = 0; b < z.batch; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t t = 0; t < T; ++t) {
        const auto q_at = [&](int64_t time) { return static_cast<size_t>(((b * T + time) * H + h) * Dk); };
        const auto k_at = [&](int64_t time) {
          return static_cast<size_t>(((b * T + time) * z.key_heads + h % z.key_heads) * Dk);
        };
        const auto v_at = [&](int64_t time) { return static_cast<size_t>(((b * T + time) * H + h) * Dv); };
        double total = 0, delta = 0;
        for (int64_t s = 0; s <= t; ++s) {
          double score = 0;
          for (int64_t d = 0; d < Dk; ++d) score += x.q[q_at(t) + d] * x.k[k_at(s) + d];
          total += p[s] = std::exp(o.scale * score);
          const uint64_t index = static_cast<uint64_t>(((b * H + h) * T + t) * row_width + s);
          m[s] = o.dropout == 0 ? 1 : Kept8(mask, index / 8)[index % 8] ? mask.scale() : 0;
        }
        for (int64_t s = 0; s <= t; ++s) {
          p[s] /= total;
          dp[s] = 0;
          for (int64_t d = 0; d < Dv; ++d) {
            r.y[v_at(t) + d] += m[s] * p[s] * x.v[v_at(s) + d];
            r.dv[v_at(s) + d] += m[s] * p[s] * x.dy[v_at(t) + d];
            dp[s] += m[s] * x.dy[v_at(t) + d] * x.v[v_at(s) + d];
          }
          delta += p[s] * dp[s];
        }
        for (int64_t s = 0; s <= t; ++s)
          for (int64_t d = 0; d < Dk; ++d) {
            const double ds = o.scale * p[s] * (dp[s] - delta);
            r.dq[q_at(t) + d] += ds * x.k[k_at(s) + d];
            r.dk[k_at(s) + d] += ds * x.q[q_at(t) + d];
          }
      }
  return r;
}

Tensor tensor_of(const std::vector<double>& values, const Shape& shape, DType dtype, Device device) {
  if (dtype == DType::f64) return Tensor::from(values, shape, device);
  if (dtype == DType::f32) return Tensor::from(std::vector<float>(values.begin(), values.end()), shape, device);
  std::vector<bf16> rounded;
  for (const double v : values) rounded.push_back(bf16(static_cast<float>(v)));
  return Tensor::from(rounded, shape, device);
}

std::vector<double> values_of(const Tensor& t) {
  return dispatch(Cpu{}, t.dtype(), [&]<class T>() {
    std::vector<double> values;
    for (const T v : t.to_vector<T>()) values.push_back(v);
    return values;
  });
}

// [a, b, c] of each token, as one vector; and its parts.
std::vector<double> side_by_side(const std::vector<double>& a, const std::vector<double>& b,
                                 const std::vector<double>& c, int64_t width) {
  std::vector<double> all;
  for (auto at = a.begin(), bt = b.begin(), ct = c.begin(); at != a.end(); at += width, bt += width, ct += width)
    for (const auto& from : {at, bt, ct}) all.insert(all.end(), from, from + width);
  return all;
}
std::vector<double> part_of(const std::vector<double>& all, int64_t part, int64_t width) {
  std::vector<double> values;
  for (auto at = all.begin() + part * width; at < all.end(); at += 3 * width)
    values.insert(values.end(), at, at + width);
  return values;
}

// The op's result; the gradient closure is called directly, so that only attention is under test.
Result attend(const Sizes& z, const Values& x, AttentionOptions o, DType dtype, Device device) {
  if (z.rotated > 0) {
    std::vector<float> angles;
    for (int64_t i = 0; i < z.time * z.rotated; ++i) {
      const double angle = static_cast<double>(i / z.rotated) / (1.0 + static_cast<double>(i % z.rotated / 2));
      angles.push_back(static_cast<float>(i % 2 == 0 ? std::cos(angle) : std::sin(angle)));
    }
    o.angles = Tensor::from(angles, {z.time, z.rotated}, device);
  }
  if (z.side_by_side) {
    const int64_t width = z.heads * z.key_width;
    const Tensor all = leaf(tensor_of(side_by_side(x.q, x.k, x.v, width), {z.batch, z.time, 3 * z.heads, z.key_width},
                                      dtype, device));
    const Tensor y = attention(all, o);
    const Gradients g = y.node()->gradient(tensor_of(x.dy, y.shape(), dtype, device));
    REQUIRE(g.size() == 1);
    CHECK(g[0].shape() == all.shape());
    const std::vector<double> d = values_of(g[0]);
    return {values_of(y), part_of(d, 0, width), part_of(d, 1, width), part_of(d, 2, width)};
  }
  const Tensor q = leaf(tensor_of(x.q, {z.batch, z.time, z.heads, z.key_width}, dtype, device));
  const Tensor k = leaf(tensor_of(x.k, {z.batch, z.time, z.key_heads, z.key_width}, dtype, device));
  const Tensor v = leaf(tensor_of(x.v, {z.batch, z.time, z.heads, z.value_width}, dtype, device));
  const Tensor y = attention(q, k, v, o);
  const Gradients g = y.node()->gradient(tensor_of(x.dy, y.shape(), dtype, device));
  REQUIRE(g.size() == 3);
  CHECK(g[0].shape() == q.shape());
  CHECK(g[1].shape() == k.shape());
  CHECK(g[2].shape() == v.shape());
  return {values_of(y), values_of(g[0]), values_of(g[1]), values_of(g[2])};
}

void check_close(const std::string& name, const std::vector<double>& found, const std::vector<double>& expected,
                 double tolerance) {
  REQUIRE(found.size() == expected.size());
  double difference = 0, size = 0;
  size_t worst = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    const double d = std::abs(found[i] - expected[i]);
    if (!(d <= difference)) difference = d, worst = i;
    size = std::max(size, std::abs(expected[i]));
  }
  INFO(name, "[", worst, "] is ", found[worst], ", expected ", expected[worst], "; largest expected ", size);
  CHECK(difference <= tolerance * (1 + size));
}

void check_results(const Result& found, const Result& expected, double tolerance) {
  check_close("y", found.y, expected.y, tolerance);
  check_close("dq", found.dq, expected.dq, tolerance);
  check_close("dk", found.dk, expected.dk, tolerance);
  check_close("dv", found.dv, expected.dv, tolerance);
}

// x rounded to what dtype can hold: the reference then sees the same inputs.
Values rounded(Values x, DType dtype) {
  for (auto* values : {&x.q, &x.k, &x.v, &x.dy})
    *values = values_of(tensor_of(*values, {static_cast<int64_t>(values->size())}, dtype, Device::cpu));
  return x;
}

AttentionOptions options_for(const Sizes& z, double dropout) {
  return {.scale = 1 / std::sqrt(static_cast<double>(z.key_width)), .dropout = dropout, .key = {7, 5}};
}

double tolerance_of(DType dtype) { return dtype == DType::f64 ? 1e-12 : dtype == DType::f32 ? 2e-5 : 3e-2; }

// The share of elements that dropout keeps, over all rows: with q = 0 and v = 1, y_t is that share of a row over 1-p.
void check_keep_rate(DType dtype, Device device) {
  const Sizes z{2, 64, 3, 3, 16, 16};
  const double p = 0.1;
  Values x(z);
  x.q.assign(x.q.size(), 0);
  x.v.assign(x.v.size(), 1);
  const Result r = attend(z, x, options_for(z, p), dtype, device);
  double kept = 0, drawn = 0;
  for (int64_t b = 0; b < z.batch; ++b)
    for (int64_t t = 0; t < z.time; ++t)
      for (int64_t h = 0; h < z.heads; ++h) {
        const double share = r.y[static_cast<size_t>(((b * z.time + t) * z.heads + h) * z.value_width)] * (1 - p);
        kept += std::round(share * static_cast<double>(t + 1));
        drawn += static_cast<double>(t + 1);
      }
  INFO("kept ", kept, " of ", drawn);
  CHECK(std::abs(kept - (1 - p) * drawn) <= 5 * std::sqrt(drawn * p * (1 - p)));
}

// The widths cover every tensor-core instantiation, padding inside one, and widths only the other kernels take.
void check_against_cpu(int64_t batch, int64_t time) {
  for (const auto& [key_width, value_width] :
       {std::pair<int64_t, int64_t>{64, 64}, {128, 192}, {48, 32}, {16, 24}, {128, 128}, {256, 256}, {20, 30}})
    for (const int64_t key_heads : {2, 1})
      for (const double dropout : {0.0, 0.1}) {
        const Sizes z{batch, time, 2, key_heads, key_width, value_width};
        const AttentionOptions o = options_for(z, dropout);
        for (const DType dtype : {DType::f32, DType::bf16}) {
          CAPTURE(z.str());
          CAPTURE(dropout);
          CAPTURE(std::string(name_of(dtype)));
          const Values x = rounded(Values(z), dtype);
          check_results(attend(z, x, o, dtype, Device::cuda), attend(z, x, o, DType::f32, Device::cpu),
                        tolerance_of(dtype));
        }
      }
}

}  // namespace

TEST_CASE("attention and its gradient equal the dense formulas") {
  for (const Sizes& z : {Sizes{2, 1, 2, 2, 8, 8}, Sizes{1, 7, 2, 1, 6, 10}, Sizes{2, 13, 3, 3, 16, 24},
                         Sizes{2, 37, 2, 2, 24, 16}, Sizes{1, 64, 2, 1, 16, 16}, Sizes{1, 70, 1, 1, 48, 32}})
    for (const double dropout : {0.0, 0.3})
      for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
        CAPTURE(z.str());
        CAPTURE(dropout);
        CAPTURE(std::string(name_of(dtype)));
        const Values x = rounded(Values(z), dtype);
        const AttentionOptions o = options_for(z, dropout);
        check_results(attend(z, x, o, dtype, Device::cpu), dense(z, x, o), tolerance_of(dtype));
      }
}

TEST_CASE("the dense formulas' gradient is the slope of the output") {
  const Sizes z{1, 5, 2, 1, 3, 4};
  const Values x(z);
  const AttentionOptions o = options_for(z, 0.3);
  const Result r = dense(z, x, o);
  const auto loss = [&](const Values& at) {
    const Result moved = dense(z, at, o);
    double sum = 0;
    for (size_t i = 0; i < moved.y.size(); ++i) sum += moved.y[i] * x.dy[i];
    return sum;
  };
  const auto check_slopes = [&](std::vector<double> Values::*input, const std::vector<double>& gradient) {
    for (size_t i = 0; i < gradient.size(); ++i) {
      Values up = x, down = x;
      (up.*input)[i] += 1e-5;
      (down.*input)[i] -= 1e-5;
      CHECK(gradient[i] == doctest::Approx((loss(up) - loss(down)) / 2e-5).epsilon(1e-6).scale(1));
    }
  };
  check_slopes(&Values::q, r.dq);
  check_slopes(&Values::k, r.dk);
  check_slopes(&Values::v, r.dv);
}

TEST_CASE("attention does not look ahead") {
  const Sizes z{1, 40, 2, 2, 16, 24};
  const int64_t now = 17;
  Values x(z);
  const AttentionOptions o = options_for(z, 0.1);
  const auto from = [&](int64_t width) { return static_cast<size_t>((now + 1) * z.heads * width); };
  for (size_t i = from(z.value_width); i < x.dy.size(); ++i) x.dy[i] = 0;  // nothing later than `now` matters
  const Result before = attend(z, x, o, DType::f64, Device::cpu);
  for (size_t i = from(z.key_width); i < x.k.size(); ++i) CHECK(before.dk[i] == 0);
  for (size_t i = from(z.value_width); i < x.v.size(); ++i) CHECK(before.dv[i] == 0);
  for (size_t i = from(z.key_width); i < x.k.size(); ++i) x.k[i] = 50;
  for (size_t i = from(z.value_width); i < x.v.size(); ++i) x.v[i] = -50;
  const Result after = attend(z, x, o, DType::f64, Device::cpu);
  for (size_t i = 0; i < from(z.value_width); ++i) CHECK(before.y[i] == after.y[i]);
}

TEST_CASE("attention survives large scores") {
  const Sizes z{1, 9, 1, 1, 8, 8};
  Values x(z);
  for (double& q : x.q) q *= 300;
  const Result r = attend(z, x, options_for(z, 0), DType::f32, Device::cpu);
  for (const double y : r.y) CHECK(std::isfinite(y));
  for (const double d : r.dq) CHECK(std::isfinite(d));
}

TEST_CASE("attention's dropout keeps the share it says") { check_keep_rate(DType::f32, Device::cpu); }

TEST_CASE("attention refuses shapes that do not fit") {
  const auto make = [](const Shape& shape) { return Tensor::zeros(shape, DType::f32, Device::cpu); };
  const AttentionOptions o{.scale = 1};
  CHECK_THROWS_AS(attention(make({1, 4, 2, 8}), make({1, 4, 3, 8}), make({1, 4, 2, 8}), o), Error);
  CHECK_THROWS_AS(attention(make({1, 4, 2, 8}), make({1, 4, 2, 6}), make({1, 4, 2, 8}), o), Error);
  CHECK_THROWS_AS(attention(make({1, 4, 2, 8}), make({1, 4, 2, 8}), make({1, 5, 2, 8}), o), Error);
  CHECK_THROWS_AS(attention(make({4, 2, 8}), make({4, 2, 8}), make({4, 2, 8}), o), Error);
  CHECK_THROWS_AS(attention(make({1, 4, 2, 8}), make({1, 4, 2, 8}), make({1, 4, 2, 8}), {.scale = 1, .dropout = 1}),
                  Error);
}

TEST_SUITE("cuda") {
  TEST_CASE("attention on the GPU equals the CPU's") {
    for (const auto& [batch, time] : {std::pair<int64_t, int64_t>{1, 1}, {1, 37}, {2, 64}, {1, 512}})
      check_against_cpu(batch, time);
  }
  TEST_CASE("attention on the GPU equals the CPU's: three tiles, the last one short") {
    check_against_cpu(2, 130);
  }
  TEST_CASE("attention on the GPU rotates as the CPU does") {
    for (const int64_t time : {1, 37, 130})
      for (const Sizes& z : {Sizes{2, time, 3, 3, 64, 64, 64, true}, Sizes{2, time, 3, 3, 64, 64, 64},
                             Sizes{2, time, 5, 1, 64, 64, 64}, Sizes{1, time, 2, 1, 128, 192, 128},
                             Sizes{1, time, 2, 1, 128, 192, 48}, Sizes{1, time, 2, 2, 72, 72, 24, true},
                             Sizes{1, time, 2, 2, 24, 16, 6}, Sizes{1, time, 3, 3, 10, 10, 4, true},
                             Sizes{1, time, 2, 1, 256, 256, 64}})
        for (const DType dtype : {DType::f32, DType::bf16}) {
          CAPTURE(z.str());
          CAPTURE(std::string(name_of(dtype)));
          const Values x = rounded(Values(z), dtype);
          const AttentionOptions o = options_for(z, 0.1);
          check_results(attend(z, x, o, dtype, Device::cuda), attend(z, x, o, DType::f32, Device::cpu),
                        tolerance_of(dtype));
        }
  }
  TEST_CASE("attention on the GPU gives the same bits twice") {
    const Sizes z{2, 130, 4, 1, 64, 64};
    const Values x(z);
    for (const DType dtype : {DType::f32, DType::bf16}) {
      const Result a = attend(z, x, options_for(z, 0.1), dtype, Device::cuda);
      const Result b = attend(z, x, options_for(z, 0.1), dtype, Device::cuda);
      CHECK((a.y == b.y && a.dq == b.dq && a.dk == b.dk && a.dv == b.dv));
    }
  }
  TEST_CASE("the GPU's dropout keeps the share it says") {
    check_keep_rate(DType::f32, Device::cuda);
    check_keep_rate(DType::bf16, Device::cuda);
  }
}
