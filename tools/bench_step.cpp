// bench_step: the training step of each configuration (forward, backward, clipping, AdamW on every weight), timed whole,
// by phase, by piece and by kernel, each set against what the device was measured to be capable of in the same run.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>

#include "engine/allocator.h"
#include "engine/ops.h"
#include "engine/optim/adamw.h"
#include "model/transformer.h"
#include "tools/bench_step/pieces.h"
#include "tools/bench_step/recorder.h"
#include "tools/bench_step/stopwatch.h"
#include "train/device_info.h"
#include "train/recipe.h"

namespace weft {
namespace {

constexpr int kWarmUp = 4, kRecordedSteps = 3;

double at_share(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(share * static_cast<double>(values.size() - 1))];
}

// A model with the one batch that it is trained on over and over.
class Bench {
 public:
  Bench(const Recipe& r, const Config& config)
      : recipe_(r), model_(config, Scope(params_, r.device, 42)), optimizer_(params_.all(), {.weight_decay = r.weight_decay}) {
    std::vector<int32_t> ids(static_cast<size_t>(r.batch * r.seq + 1));
    for (size_t i = 0; i < ids.size(); ++i)
      ids[i] = static_cast<int32_t>(random_below({7, 7}, i, static_cast<uint64_t>(config.vocab_size)));
    const std::span<const int32_t> all(ids);
    tokens_ = Tensor::from(all.first(ids.size() - 1), {r.batch, r.seq}, r.device);
    targets_ = Tensor::from(all.subspan(1), {r.batch, r.seq}, r.device);
  }

  // One step; says when a phase is queued.
  void step(const Phase& ended) {
    Rng rng(42, steps_++);
    Loss loss = model_.loss(tokens_, targets_, {.training = true, .rng = &rng, .compute = recipe_.precision});
    ended("forward");
    backward(std::exchange(loss, {}).total);
    ended("backward");
    std::vector<Tensor> gradients;
    for (const Parameter& p : params_.list()) gradients.push_back(p.value.grad());
    const double norm = std::sqrt(squared_norm(gradients).item());
    ended("gradient_norm");
    optimizer_.step(recipe_.adamw_lr, std::min(1.0, recipe_.clip_norm / (norm + 1e-6)));
    params_.clear_grads();
    ended("optimizer");
  }

 private:
  Recipe recipe_;
  Params params_;
  Transformer model_;
  AdamW optimizer_;
  Tensor tokens_, targets_;
  uint64_t steps_ = 0;
};

constexpr const char* kPhases[] = {"forward", "backward", "gradient_norm", "optimizer"};

// Rates where there is something to rate.
void add_rates(Json& row, double ms, const PieceWork& work) {
  if (ms <= 0) return;
  if (work.flops > 0) row["tflops"] = work.flops / ms / 1e9;
  if (work.bytes > 0) row["gb_per_second"] = work.bytes / ms / 1e6;
  if (work.floor_ms > 0) row["floor_ms"] = work.floor_ms, row["times_floor"] = ms / work.floor_ms;
}

// Piece and kernel tables of some recorded steps, in ms per step.
void add_tables(Json& result, const std::vector<std::vector<Item>>& recorded, const Config& config,
                const std::map<std::string, PieceWork>& works, double step_ms) {
  const double share = 1.0 / static_cast<double>(recorded.size());
  struct Sum {
    double ms = 0, calls = 0;
  };
  std::map<std::string, Sum> pieces;
  std::map<std::pair<std::string, std::string>, Sum> kernels;
  double busy = 0, items = 0, floor = 0;
  for (const std::vector<Item>& step : recorded) {
    busy += share * busy_time(step), items += share * static_cast<double>(step.size());
    for (const Item& item : step) {
      const std::string piece = piece_of(item, config);
      for (Sum* sum : {&pieces[piece], &kernels[{piece, item.name}]})
        sum->ms += share * (item.end - item.start), sum->calls += share;
    }
  }
  result["busy_ms"] = busy, result["gap_ms"] = step_ms - busy, result["items"] = items;
  for (const std::string& name : piece_names()) {
    const auto work = works.find(name);
    if (work != works.end()) floor += work->second.floor_ms;
    const Sum sum = pieces[name];
    if (sum.ms <= 0) continue;
    Json row{{"piece", name}, {"ms", sum.ms}, {"share", sum.ms / step_ms}, {"calls", sum.calls}};
    if (work != works.end()) add_rates(row, sum.ms, work->second);
    result["pieces"].push_back(row);
  }
  result["floor_ms"] = floor, result["times_floor"] = step_ms / floor;
  for (const auto& [key, sum] : kernels)
    result["kernels"].push_back({{"piece", key.first}, {"kernel", key.second}, {"ms", sum.ms}, {"calls", sum.calls}});
  if (result.contains("kernels"))
    std::sort(result["kernels"].begin(), result["kernels"].end(), [](const Json& a, const Json& b) { return a["ms"] > b["ms"]; });
}

Json measure(const Recipe& r, const std::string& name, int64_t steps, const Capability& device) {
  CachingAllocator& memory = allocator(r.device);
  memory.release_cached();
  memory.reset_peaks();
  const Config config = r.config(name);
  Bench bench(r, config);
  const Phase nothing = [](const char*) {};
  for (int i = 0; i < kWarmUp; ++i) bench.step(nothing);

  Stopwatch whole(r.device), parts(r.device);
  whole.mark();
  for (int64_t i = 0; i < steps; ++i) bench.step(nothing), whole.mark();
  const std::vector<double> step_ms = whole.intervals();
  const double peak_gb = static_cast<double>(memory.stats().peak_allocated) / 1e9;
  parts.mark();
  for (int64_t i = 0; i < steps; ++i) bench.step([&](const char*) { parts.mark(); });
  const std::vector<double> part_ms = parts.intervals();

  const double tokens = static_cast<double>(r.batch * r.seq), median = at_share(step_ms, 0.5);
  const double flops = flops_per_token(config, r.seq) * tokens;
  Json result{{"configuration", name},
              {"step_ms", median},
              {"step_ms_p10", at_share(step_ms, 0.1)},
              {"step_ms_p90", at_share(step_ms, 0.9)},
              {"step_ms_min", at_share(step_ms, 0)},
              {"tokens_per_second", 1e3 * tokens / median},
              {"tflops", flops / median / 1e9},
              {"mfu_of_measured", 1e3 * flops / median / device.flops},
              {"peak_memory_gb", peak_gb}};
  if (const std::optional<double> peak = peak_flops(r.device, r.precision))
    result["mfu_of_data_sheet"] = 1e3 * flops / median / *peak;
  for (size_t p = 0; p < std::size(kPhases); ++p) {
    std::vector<double> of_phase;
    for (size_t i = p; i < part_ms.size(); i += std::size(kPhases)) of_phase.push_back(part_ms[i]);
    result["phase_ms"][kPhases[p]] = at_share(of_phase, 0.5);
  }
  if (!recording_problem(r.device).empty()) return result;
  std::vector<std::vector<Item>> recorded;
  for (int i = 0; i < kRecordedSteps; ++i)
    recorded.push_back(record_items(r.device, [&](const Phase& ended) { bench.step(ended); }));
  add_tables(result, recorded, config, piece_work(config, {r.device, r.batch, r.seq, size_of(r.precision)}, device), median);
  return result;
}

std::string cell(const Json& row, const char* key, const char* format, double factor = 1) {
  return row.contains(key) ? fmt::format(fmt::runtime(format), factor * row[key].get<double>()) : "-";
}

void print_summary(const Json& all) {
  fmt::print("{}, {} x {} tokens; measured: matrix product {:.1f} TFLOP/s, copy {:.0f} GB/s\n",
             all["device"].get<std::string>(), all["batch"].get<int64_t>(), all["seq"].get<int64_t>(),
             all["matrix_tflops"].get<double>(), all["copy_gb_per_second"].get<double>());
  fmt::print("{:<10} {:>8} {:>15} {:>9} {:>8} {:>6} {:>8} {:>9} | {:>8} {:>8} {:>6} {:>9}\n", "", "step ms", "p10..p90",
             "tokens/s", "TFLOP/s", "MFU", "peak GB", "x floor", "forward", "backward", "norm", "optimizer");
  for (const Json& s : all["steps"]) {
    const auto n = [&](const char* key) { return s[key].get<double>(); };
    const auto phase = [&](const char* key) { return s["phase_ms"][key].get<double>(); };
    fmt::print("{:<10} {:>8.2f} {:>7.2f}..{:<6.2f} {:>9.0f} {:>8.1f} {:>5.1f}% {:>8.2f} {:>9} | {:>8.2f} {:>8.2f} {:>6.2f} {:>9.2f}\n",
               s["configuration"].get<std::string>(), n("step_ms"), n("step_ms_p10"), n("step_ms_p90"), n("tokens_per_second"),
               n("tflops"), 100 * n("mfu_of_measured"), n("peak_memory_gb"), cell(s, "times_floor", "{:.2f}"), phase("forward"),
               phase("backward"), phase("gradient_norm"), phase("optimizer"));
  }
}

void print_tables(const Json& s, int64_t kernels) {
  fmt::print("\n{}: step {:.2f} ms, items {:.0f} busy {:.2f} ms, gaps {:.2f} ms, floor {:.2f} ms\n",
             s["configuration"].get<std::string>(), s["step_ms"].get<double>(), s["items"].get<double>(), s["busy_ms"].get<double>(),
             s["gap_ms"].get<double>(), s["floor_ms"].get<double>());
  fmt::print("{:<26} {:>8} {:>6} {:>6} {:>8} {:>7} {:>9} {:>8}\n", "piece", "ms", "share", "calls", "TFLOP/s", "GB/s", "floor ms",
             "x floor");
  for (const Json& p : s["pieces"])
    fmt::print("{:<26} {:>8.3f} {:>5.1f}% {:>6.0f} {:>8} {:>7} {:>9} {:>8}\n", p["piece"].get<std::string>(), p["ms"].get<double>(),
               100 * p["share"].get<double>(), p["calls"].get<double>(), cell(p, "tflops", "{:.1f}"),
               cell(p, "gb_per_second", "{:.0f}"), cell(p, "floor_ms", "{:.3f}"), cell(p, "times_floor", "{:.2f}"));
  if (kernels == 0 || s["kernels"][0]["kernel"] == kOnCpu) return;
  fmt::print("{:<26} {:>8} {:>6} {:>6}  {}\n", "piece", "ms", "share", "calls", "kernel");
  for (const Json& k : s["kernels"]) {
    if (kernels-- == 0) break;
    const std::string name = k["kernel"].get<std::string>();
    fmt::print("{:<26} {:>8.3f} {:>5.1f}% {:>6.0f}  {}\n", k["piece"].get<std::string>(), k["ms"].get<double>(),
               100 * k["ms"].get<double>() / s["step_ms"].get<double>(), k["calls"].get<double>(),
               name.size() <= 70 ? name : name.substr(0, 67) + "...");
  }
}

int run(int argc, char** argv) {
  CLI::App app("Times the training step of each configuration: whole, by phase, by piece of the model and by kernel.");
  std::string preset = "exp1", device = "auto";
  std::vector<std::string> settings;
  int64_t steps = 20, kernels = 25;
  bool json = false;
  app.add_option("--preset", preset, preset_list())->capture_default_str();
  app.add_option("--device", device, "auto, cpu or cuda")->check(CLI::IsMember({"auto", "cpu", "cuda"}))->capture_default_str();
  app.add_option("--steps", steps, "timed steps")->check(CLI::Range(1, 10000))->capture_default_str();
  app.add_option("--kernels", kernels, "rows of the table of kernels")->check(CLI::Range(0, 10000))->capture_default_str();
  app.add_option("--set", settings, "key=value as in train_exp1; may be repeated");
  app.add_flag("--json", json, "print JSON instead of tables");
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

  const Capability capability{matrix_rate(r.device, r.precision), copy_rate(r.device)};
  Json all{{"program", "weft"}, {"device", device_name(r.device)}, {"batch", r.batch}, {"seq", r.seq},
           {"matrix_tflops", capability.flops / 1e12}, {"copy_gb_per_second", capability.bytes / 1e9}, {"steps", Json::array()}};
  for (const std::string& name : r.configs) all["steps"].push_back(measure(r, name, steps, capability));
  const std::string problem = recording_problem(r.device);
  if (!problem.empty()) all["no_kernel_table"] = problem;
  if (json) {
    fmt::print("{}\n", all.dump(2));
    return 0;
  }
  print_summary(all);
  if (!problem.empty()) fmt::print("{}\n", problem);
  for (const Json& s : all["steps"])
    if (s.contains("pieces")) print_tables(s, kernels);
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
