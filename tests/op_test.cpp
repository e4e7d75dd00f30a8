// Walks the table of ops. `op_test check|grad|bf16|cuda|bench [op]` runs one kind of test, of one op or of all.
#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <utility>

#include "tests/arguments.h"
#include "tests/op_cases.h"
#include "tests/tolerance.h"
#if WEFT_CUDA
#include "engine/cuda/stream.h"
#endif

using namespace weft;

namespace {

using Values = std::vector<double>;

Values values_of(const Tensor& t) {
  if (t.dtype() == DType::i32) {
    const auto v = t.to_vector<int32_t>();
    return {v.begin(), v.end()};
  }
  return dispatch(Cpu{}, t.dtype(), [&]<class T>() {
    Values values;
    for (const T v : t.to_vector<T>()) values.push_back(static_cast<double>(acc_t<T>(v)));
    return values;
  });
}

Tensor tensor_of(const Values& values, const Shape& shape, DType dtype, Device device) {
  if (dtype == DType::i32) return Tensor::from(std::vector<int32_t>(values.begin(), values.end()), shape, device);
  return dispatch(Cpu{}, dtype, [&]<class T>() {
    std::vector<T> narrow;
    for (const double v : values) narrow.push_back(T(static_cast<acc_t<T>>(v)));
    return Tensor::from(narrow, shape, device);
  });
}

Values rounded_to(DType dtype, const Values& values, const Shape& shape) {
  return dtype == DType::bf16 ? values_of(tensor_of(values, shape, dtype, Device::cpu)) : values;
}

DType dtype_of_input(const Input& input, DType dtype) {
  if (input.fill == Fill::ids) return DType::i32;
  if (input.type == Type::f32 || (input.type == Type::wide && dtype == DType::bf16)) return DType::f32;
  return dtype;
}

Values draw(const Input& input, uint64_t stream) {
  Values values(static_cast<size_t>(input.shape.numel()));
  for (size_t i = 0; i < values.size(); ++i) {
    const RngKey key{1, stream};
    const uint64_t below = static_cast<uint64_t>(input.below);
    if (input.fill == Fill::ids) values[i] = static_cast<double>(random_below(key, i, below));
    else if (input.fill == Fill::positive) values[i] = std::abs(random_normal(key, i)) + 0.5;
    else values[i] = random_normal(key, i);
  }
  return values;
}

// The values of all inputs, exact in `dtype` where the input has it.
std::vector<Values> draw_all(const Inputs& inputs, DType dtype) {
  std::vector<Values> all;
  for (size_t i = 0; i < inputs.size(); ++i)
    all.push_back(rounded_to(dtype_of_input(inputs[i], dtype), draw(inputs[i], i), inputs[i].shape));
  return all;
}

Tensor tensor_of(const Input& input, const Values& values, DType dtype, Device device) {
  return tensor_of(values, input.shape, dtype_of_input(input, dtype), device);
}

// What projects the output of a case to the number whose gradient is compared; the same for every dtype and device.
Values direction_of(const Shape& shape, DType dtype) {
  return rounded_to(dtype, draw({.shape = shape}, 1000), shape);
}

// sum(y * r), an op of the test's own so that a broken mul or sum cannot hide an error.
Tensor project(const Tensor& y, const Values& r) {
  const Tensor direction = tensor_of(r, y.shape(), y.dtype(), y.device());
  const DType dtype = y.dtype() == DType::f64 ? DType::f64 : DType::f32;
  return record("project", Tensor::zeros({}, dtype, y.device()), {y},
                [direction](const Tensor&) -> Gradients { return {direction}; });
}

struct Result {
  Shape shape;
  bool whole;  // an i32 output: compared exactly
  Values y;
  std::vector<Values> gradients;  // empty where an input has none
};

bool wants_gradient(const Input& input) { return input.differentiable && input.fill != Fill::ids; }

// `projection` is the dtype the direction is rounded to, so that results of two dtypes share it.
Result evaluate(const OpCase& c, const OpCase::Function& f, const Inputs& inputs, const std::vector<Values>& x,
                DType dtype, Device device, DType projection) {
  std::vector<Tensor> tensors;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Tensor t = tensor_of(inputs[i], x[i], dtype, device);
    tensors.push_back(wants_gradient(inputs[i]) ? leaf(t) : t);
  }
  const Tensor y = f(tensors);
  Result result{y.shape(), y.dtype() == DType::i32, values_of(y), std::vector<Values>(inputs.size())};
  if (!y.needs_grad()) return result;
  backward(project(y, direction_of(y.shape(), projection)));
  for (size_t i = 0; i < inputs.size(); ++i)
    if (wants_gradient(inputs[i])) {
      check(static_cast<bool>(tensors[i].grad()), "op {} gave no gradient to input {}", c.name, i);
      result.gradients[i] = values_of(tensors[i].grad());
    }
  return result;
}

// Compares element by element and reports the worst one.
void compare(const std::string& what, const Values& found, const Values& expected, double tolerance) {
  CHECK_MESSAGE(found.size() == expected.size(), what, ": ", found.size(), " elements, expected ", expected.size());
  if (found.size() != expected.size()) return;
  double squares = 0;
  for (const double e : expected) squares += e * e;
  const double rms = expected.empty() ? 0 : std::sqrt(squares / static_cast<double>(expected.size()));
  double worst = 0;
  size_t at = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (found[i] == expected[i]) continue;
    const double error = std::abs(found[i] - expected[i]) / std::max(std::abs(expected[i]), rms);
    if (!(error <= worst)) worst = error, at = i;
    if (std::isnan(error)) break;
  }
  const bool close = worst <= tolerance;
  CHECK_MESSAGE(close, what, ", element ", at, ": ", expected.empty() ? 0 : found[at], ", expected ",
                expected.empty() ? 0 : expected[at], " (relative error ", worst, ", allowed ", tolerance, ")");
}

void compare(const std::string& what, const Result& found, const Result& expected, double tolerance) {
  CHECK_MESSAGE(found.shape == expected.shape, what, ": shape ", found.shape.str(), ", expected ",
                expected.shape.str());
  compare(fmt::format("{}, output", what), found.y, expected.y, expected.whole ? 0 : tolerance);
  for (size_t i = 0; i < expected.gradients.size(); ++i)
    if (!expected.gradients[i].empty())  // else a reference without gradients, or an input that has none
      compare(fmt::format("{}, gradient of input {}", what, i), found.gradients[i], expected.gradients[i], tolerance);
}

double allowed(const OpCase& c, DType dtype) {
  return static_cast<double>(c.products) * tolerance(dtype, c.reduction);
}
bool has(const OpCase& c, DType dtype) { return std::find(c.dtypes.begin(), c.dtypes.end(), dtype) != c.dtypes.end(); }

// The case that the command line names after the check, or all.
std::vector<OpCase> chosen_cases() {
  const auto& words = test_arguments();
  std::vector<OpCase> chosen;
  for (const OpCase& c : op_cases())
    if (words.size() < 2 || c.name == words[1]) chosen.push_back(c);
  REQUIRE_MESSAGE(!chosen.empty(), "there is no op case '", words.back(), "'; tests/op_cases/ has them");
  return chosen;
}

// Calls f for each chosen case and each of its sizes; an exception fails that case alone.
template <class F>
void each_case(const F& f) {
  for (const OpCase& c : chosen_cases()) {
    for (const Inputs& inputs : c.sizes) {
      std::string name = c.name;
      for (const Input& i : inputs) name += fmt::format(" {}", i.shape.str());
      try {
        f(c, inputs, name);
      } catch (const std::exception& e) {
        FAIL_CHECK("op ", name, ": ", e.what());
      }
    }
  }
}

TEST_CASE("check") {
  each_case([](const OpCase& c, const Inputs& inputs, const std::string& name) {
    if (!c.reference) return;
    const auto x = draw_all(inputs, DType::f32);
    compare(fmt::format("op {} in f32 against its reference", name),
            evaluate(c, c.run, inputs, x, DType::f32, Device::cpu, DType::f32),
            evaluate(c, c.reference, inputs, x, DType::f32, Device::cpu, DType::f32),
            allowed(c, DType::f32));
  });
}

TEST_CASE("grad") {
  each_case([](const OpCase& c, const Inputs& inputs, const std::string& name) {
    if (!has(c, DType::f64) || std::none_of(inputs.begin(), inputs.end(), wants_gradient)) return;
    auto x = draw_all(inputs, DType::f64);
    const Result exact = evaluate(c, c.run, inputs, x, DType::f64, Device::cpu, DType::f64);
    const Values r = direction_of(exact.shape, DType::f64);
    const auto projected = [&] {
      const NoGrad no_grad;
      std::vector<Tensor> tensors;
      for (size_t i = 0; i < inputs.size(); ++i) tensors.push_back(tensor_of(inputs[i], x[i], DType::f64, Device::cpu));
      const Values y = values_of(c.run(tensors));
      double total = 0;
      for (size_t i = 0; i < y.size(); ++i) total += y[i] * r[i];
      return total;
    };
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (!wants_gradient(inputs[i])) continue;
      CHECK_MESSAGE(!exact.gradients[i].empty(), "op ", name, " recorded no gradient for input ", i);
      if (exact.gradients[i].empty()) continue;
      // All elements of a small input; of a larger one 24, drawn anew for each input.
      const size_t n = x[i].size(), checked = std::min<size_t>(n, 24);
      Values found, expected;
      double squares = 0;
      for (const double g : exact.gradients[i]) squares += g * g;
      for (size_t j = 0; j < checked; ++j) {
        const size_t at = checked == n ? j : random_below({2, i}, j, n);
        constexpr double kStep = 1e-5;
        const double before = x[i][at];
        x[i][at] = before + kStep;
        const double above = projected();
        x[i][at] = before - kStep;
        const double below = projected();
        x[i][at] = before;
        found.push_back(exact.gradients[i][at]);
        expected.push_back((above - below) / (2 * kStep));
      }
      // The whole gradient's size goes with the sample, so that small elements are held to the tensor's scale.
      const double rms = std::sqrt(squares / static_cast<double>(std::max<size_t>(n, 1)));
      found.push_back(rms);
      expected.push_back(rms);
      compare(fmt::format("op {} in f64, gradient of input {} against finite differences (of a sample)", name, i),
              found, expected, kFiniteDifferenceTolerance);
    }
  });
}

TEST_CASE("bf16") {
  each_case([](const OpCase& c, const Inputs& inputs, const std::string& name) {
    if (!has(c, DType::bf16)) return;
    const auto x = draw_all(inputs, DType::bf16);
    compare(fmt::format("op {} in bf16 against f32", name),
            evaluate(c, c.run, inputs, x, DType::bf16, Device::cpu, DType::bf16),
            evaluate(c, c.run, inputs, x, DType::f32, Device::cpu, DType::bf16), allowed(c, DType::bf16));
  });
}

double seconds(const std::function<void()>& f, [[maybe_unused]] Device device) {
  const auto wait = [&] {
#if WEFT_CUDA
    if (device == Device::cuda) synchronize();
#endif
  };
  f();
  wait();
  int runs = 1;
  for (;;) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < runs; ++i) f();
    wait();
    const double elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (elapsed > 0.1 || runs >= 1000) return elapsed / runs;
    runs *= 4;
  }
}

void bench(const OpCase& c, DType dtype, Device device) {
  std::vector<Tensor> x, constants;
  double bytes = 0;
  for (size_t i = 0; i < c.large.size(); ++i) {
    // A block of drawn values, repeated: drawing them all on one core would take longer than the benchmark.
    const Input& input = c.large[i];
    const int64_t n = input.shape.numel(), drawn = std::min<int64_t>(n, 1 << 16);
    Input part = input;
    part.shape = {drawn};
    Values values = draw(part, i);
    values.resize(static_cast<size_t>(n));
    for (int64_t j = drawn; j < n; ++j) values[static_cast<size_t>(j)] = values[static_cast<size_t>(j - drawn)];
    const Tensor t = tensor_of(input, values, dtype, device);
    bytes += static_cast<double>(t.bytes());
    constants.push_back(t);
    x.push_back(wants_gradient(input) ? leaf(t) : t);
  }
  const Tensor y = c.run(constants);
  const double all = bytes + static_cast<double>(y.bytes());
  const double forward = seconds([&] { c.run(constants); }, device);
  const auto rate = [&](double time, double factor) {
    return c.flops > 0 ? fmt::format("{:8.2f} TFLOP/s", factor * c.flops / time * 1e-12)
                       : fmt::format("{:8.1f} GB/s", factor * all / time * 1e-9);
  };
  fmt::print("{:<24} {:<5} {:<5} forward {:9.4f} ms {}", c.name, name_of(device), name_of(dtype), forward * 1e3,
             rate(forward, 1));
  if (c.run(x).needs_grad()) {
    const double both = seconds([&] {
      const Tensor out = c.run(x);
      const auto gradient = std::exchange(out.node()->gradient, nullptr);
      gradient(y);
    }, device);
    const double time = std::max(both - forward, 1e-9);
    // A gradient reads the inputs and dy and writes as much again, or does twice the flops.
    fmt::print("   gradient {:9.4f} ms", time * 1e3);
    if (c.flops > 0) fmt::print(" {}", rate(time, 2));
  }
  fmt::print("\n");
  std::fflush(stdout);
}

TEST_CASE("bench" * doctest::skip()) {
  const Device device = cuda_available() ? Device::cuda : Device::cpu;
  for (const OpCase& c : chosen_cases()) {
    if (c.large.empty()) continue;
    for (const DType dtype : {DType::f32, DType::bf16})
      if (has(c, dtype)) bench(c, dtype, device);
  }
}

}  // namespace

TEST_SUITE("cuda") {
  TEST_CASE("cuda") {
    each_case([](const OpCase& c, const Inputs& inputs, const std::string& name) {
      for (const DType dtype : {DType::f32, DType::bf16}) {
        if (!has(c, dtype)) continue;
        const auto x = draw_all(inputs, dtype);
        compare(fmt::format("op {} on the GPU in {} against the CPU in f32", name, name_of(dtype)),
                evaluate(c, c.run, inputs, x, dtype, Device::cuda, dtype),
                evaluate(c, c.run, inputs, x, DType::f32, Device::cpu, dtype), allowed(c, dtype));
      }
    });
  }
}
