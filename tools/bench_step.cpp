// bench_step: one training step of each configuration (forward, backward, clipping, AdamW on every weight), timed, with
// its rate set against a matrix product that is measured in the same run.
#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <functional>

#include "engine/allocator.h"
#include "engine/ops.h"
#include "engine/optim/adamw.h"
#include "model/transformer.h"
#include "train/device_info.h"
#include "train/recipe.h"

namespace weft {
namespace {

double milliseconds(Device device, const std::function<void()>& work) {
  wait_for(device);
  const auto start = std::chrono::steady_clock::now();
  work();
  wait_for(device);
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

double at_share(std::vector<double> sorted, double share) {
  std::sort(sorted.begin(), sorted.end());
  return sorted[static_cast<size_t>(share * static_cast<double>(sorted.size() - 1))];
}

// FLOP/s of a large square product in the recipe's precision: what a step could reach if it were nothing else.
double matrix_rate(const Recipe& r) {
  const int64_t n = r.device == Device::cuda ? 8192 : 1024;
  const Tensor a = Tensor::empty({n, n}, r.precision, r.device), b = Tensor::like(a);
  fill_normal(a, 1, {1, 1}), fill_normal(b, 1, {1, 2});
  std::vector<double> ms;
  for (int i = 0; i < 8; ++i) ms.push_back(milliseconds(r.device, [&] { matmul(a, b); }));
  return 2e3 * std::pow(static_cast<double>(n), 3) / at_share(ms, 0.5);
}

Json bench(const Recipe& r, const std::string& name, int64_t steps, double peak) {
  CachingAllocator& memory = allocator(r.device);
  memory.release_cached();
  memory.reset_peaks();
  const Config config = r.config(name);
  Params params;
  const Transformer model(config, Scope(params, r.device, 42));
  AdamW optimizer(params.all(), {.weight_decay = r.weight_decay});
  std::vector<int32_t> ids(static_cast<size_t>(r.batch * r.seq + 1));
  for (size_t i = 0; i < ids.size(); ++i)
    ids[i] = static_cast<int32_t>(random_below({7, 7}, i, static_cast<uint64_t>(config.vocab_size)));
  const auto batch = [&](int64_t from) {
    return Tensor::from(std::span<const int32_t>(ids).subspan(static_cast<size_t>(from), ids.size() - 1), {r.batch, r.seq}, r.device);
  };
  const Tensor tokens = batch(0), targets = batch(1);

  uint64_t step = 0;
  Loss loss;
  const auto forward = [&] {
    Rng rng(42, step++);
    loss = model.loss(tokens, targets, {.training = true, .rng = &rng, .compute = r.precision});
  };
  const auto walk_back = [&] { backward(std::exchange(loss, {}).total); };
  double norm = 0;
  const auto measure_norm = [&] {
    std::vector<Tensor> gradients;
    for (const Parameter& p : params.list()) gradients.push_back(p.value.grad());
    norm = std::sqrt(squared_norm(gradients).item());
  };
  const auto update = [&] {
    optimizer.step(r.adamw_lr, std::min(1.0, r.clip_norm / (norm + 1e-6)));
    params.clear_grads();
  };
  const auto whole = [&] { forward(), walk_back(), measure_norm(), update(); };

  for (int i = 0; i < 4; ++i) whole();
  std::vector<double> step_ms, micro_ms, phases[4];
  for (int64_t i = 0; i < steps; ++i) step_ms.push_back(milliseconds(r.device, whole));
  for (int64_t i = 0; i < steps; ++i) {
    micro_ms.push_back(milliseconds(r.device, [&] { forward(), walk_back(); }));
    measure_norm(), update();
  }
  for (int64_t i = 0; i < steps; ++i) {
    int phase = 0;
    for (const std::function<void()>& f : {std::function<void()>(forward), {walk_back}, {measure_norm}, {update}})
      phases[phase++].push_back(milliseconds(r.device, f));
  }
  const double median = at_share(step_ms, 0.5), flops = flops_per_token(config, r.seq) * static_cast<double>(r.batch * r.seq);
  Json by_phase;
  const char* kPhases[] = {"forward", "backward", "gradient_norm", "adamw"};
  for (int p = 0; p < 4; ++p) by_phase[kPhases[p]] = at_share(phases[p], 0.5);
  return {{"configuration", name},
          {"step_ms", median},
          {"step_ms_p10", at_share(step_ms, 0.1)},
          {"step_ms_p90", at_share(step_ms, 0.9)},
          {"micro_step_ms", at_share(micro_ms, 0.5)},
          {"tokens_per_second", 1e3 * static_cast<double>(r.batch * r.seq) / median},
          {"tflops", flops / median / 1e9},
          {"mfu_of_measured", 1e3 * flops / median / peak},
          {"peak_memory_gb", static_cast<double>(memory.stats().peak_allocated) / 1e9},
          {"phase_ms", by_phase}};
}

int run(int argc, char** argv) {
  CLI::App app("Times one training step of each configuration: forward, backward, clipping and AdamW.");
  std::string preset = "exp1", device = "auto";
  std::vector<std::string> settings;
  int64_t steps = 20;
  bool json = false;
  app.add_option("--preset", preset, preset_list())->capture_default_str();
  app.add_option("--device", device, "auto, cpu or cuda")->check(CLI::IsMember({"auto", "cpu", "cuda"}))->capture_default_str();
  app.add_option("--steps", steps, "timed steps")->check(CLI::Range(1, 10000))->capture_default_str();
  app.add_option("--set", settings, "key=value as in train_exp1; may be repeated");
  app.add_flag("--json", json, "print JSON instead of a table");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : static_cast<int>(Fault::usage);
  }
  if (device == "cuda") require_cuda();
  Recipe r = make_recipe(preset, device == "cuda" || (device == "auto" && cuda_available()) ? Device::cuda : Device::cpu);
  for (const std::string& s : settings) {
    const size_t equals = s.find('=');
    if (equals == std::string::npos) fail(Fault::usage, "--set {}: expected key=value", s);
    set_field(r, s.substr(0, equals), s.substr(equals + 1));
  }
  validate(r);

  const double peak = matrix_rate(r);
  Json all{{"device", device_name(r.device)}, {"batch", r.batch}, {"seq", r.seq}, {"matrix_tflops", peak / 1e12}, {"steps", Json::array()}};
  for (const std::string& name : r.configs) all["steps"].push_back(bench(r, name, steps, peak));
  if (json) {
    fmt::print("{}\n", all.dump(2));
    return 0;
  }
  fmt::print("{}, {} x {} tokens, matrix product {:.1f} TFLOP/s\n", device_name(r.device), r.batch, r.seq, peak / 1e12);
  fmt::print("{:<10} {:>9} {:>15} {:>9} {:>10} {:>8} {:>6} {:>8} | {:>8} {:>8} {:>6} {:>6}\n", "", "step ms", "p10..p90",
             "fwd+bwd", "tokens/s", "TFLOP/s", "share", "peak GB", "forward", "backward", "norm", "adamw");
  for (const Json& s : all["steps"]) {
    const auto n = [&](const char* key) { return s[key].get<double>(); };
    const auto phase = [&](const char* key) { return s["phase_ms"][key].get<double>(); };
    fmt::print("{:<10} {:>9.2f} {:>7.2f}..{:<6.2f} {:>9.2f} {:>10.0f} {:>8.1f} {:>5.1f}% {:>8.2f} | {:>8.2f} {:>8.2f} {:>6.2f} {:>6.2f}\n",
               s["configuration"].get<std::string>(), n("step_ms"), n("step_ms_p10"), n("step_ms_p90"), n("micro_step_ms"),
               n("tokens_per_second"), n("tflops"), 100 * n("mfu_of_measured"), n("peak_memory_gb"), phase("forward"),
               phase("backward"), phase("gradient_norm"), phase("adamw"));
  }
  return 0;
}

}  // namespace
}  // namespace weft

int main(int argc, char** argv) {
  try {
    return weft::run(argc, argv);
  } catch (const weft::Error& e) {
    fmt::print(stderr, "bench_step: error: {}\n", e.what());
    return e.exit_code();
  } catch (const std::exception& e) {
    fmt::print(stderr, "bench_step: bug: {}\n", e.what());
    return 1;
  }
}
