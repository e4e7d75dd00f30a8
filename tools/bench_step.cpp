// bench_step: the training step of each configuration (forward, backward, clipping, AdamW on every weight), timed whole,
// by phase, by piece and by kernel, each set against what the device was measured to be capable of in the same run.
#include <CLI/CLI.hpp>
#include <algorithm>

#include "engine/allocator.h"
#include "model/transformer.h"
#include "tools/bench_step/pieces.h"
#include "tools/bench_step/recorder.h"
#include "tools/bench_step/stopwatch.h"
#include "train/algorithms.h"
#include "train/device_info.h"
#include "train/recipe.h"
#include "train/step.h"

namespace weft {
namespace {

constexpr int kWarmUp = 4, kRecordedSteps = 3;

double at_share(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(share * static_cast<double>(values.size() - 1))];
}

// Which part of a step an item is in, by the piece it counts to and its owner.
const char* phase_of(const Item& item, const std::string& piece) {
  if (piece == "gradient norm") return "norm";
  if (piece == "optimizer") return "optimizer";
  return item.owner.work == Work::forward ? "forward" : "backward";
}

Batch some_batch(const Recipe& r, int64_t vocabulary) {
  Batch batch;
  batch.batch = r.batch, batch.seq = r.seq;
  for (int64_t i = 0; i <= r.batch * r.seq; ++i)
    batch.tokens.push_back(static_cast<int32_t>(random_below({7, 7}, static_cast<uint64_t>(i), static_cast<uint64_t>(vocabulary))));
  batch.targets.assign(batch.tokens.begin() + 1, batch.tokens.end());
  batch.tokens.pop_back();
  return batch;
}

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
  std::map<std::string, double> phases;
  double busy = 0, items = 0, floor = 0;
  for (const std::vector<Item>& step : recorded) {
    busy += share * busy_time(step), items += share * static_cast<double>(step.size());
    for (const Item& item : step) {
      const std::string piece = piece_of(item, config);
      for (Sum* sum : {&pieces[piece], &kernels[{piece, item.name}]})
        sum->ms += share * (item.end - item.start), sum->calls += share;
      phases[phase_of(item, piece)] += share * (item.end - item.start);
    }
  }
  result["phase_ms"] = phases;
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
  const Config config = r.config(name);
  const Batch batch = some_batch(r, config.vocab_size);
  Params params(r.precision);
  const Transformer model(config, Scope(params, r.device, 42));
  // A captured step's kernels have no owners: those of an eager one, in the same order, do.
  std::vector<Item> eager;
  if (r.graphs && r.device == Device::cuda && recording_problem(r.device).empty()) {
    Recipe eagerly = r;
    eagerly.graphs = false;
    TrainingStep step(model, params, eagerly, 42);
    const auto one = [&] { step.micro_batch(batch), step.update(1), step.take(); };
    one();
    eager = record_items(r.device, one);
  }

  CachingAllocator& memory = allocator(r.device);
  memory.release_cached();
  memory.reset_peaks();
  TrainingStep step(model, params, r, 42);
  std::vector<double> micro_ms, update_ms;
  const auto take = [&](int64_t left) {
    while (step.updates_pending() > left) {
      const StepResult result = step.take();
      micro_ms.push_back(result.micro_ms), update_ms.push_back(result.update_ms);
    }
  };
  const auto one = [&] {
    step.micro_batch(batch);
    step.update(1);
    take(TrainingStep::kInFlight - 1);
  };
  for (int i = 0; i < kWarmUp; ++i) one();
  take(0);
  micro_ms.clear(), update_ms.clear();

  Stopwatch whole(r.device);
  whole.mark();
  for (int64_t i = 0; i < steps; ++i) one(), whole.mark();
  const std::vector<double> step_ms = whole.intervals();
  take(0);
  const double peak_gb = static_cast<double>(memory.stats().peak_allocated) / 1e9;

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
  result["forward_backward_ms"] = at_share(micro_ms, 0.5), result["update_ms"] = at_share(update_ms, 0.5);
  if (!recording_problem(r.device).empty()) return result;
  std::vector<std::vector<Item>> recorded;
  for (int i = 0; i < kRecordedSteps; ++i) {
    recorded.push_back(eager.empty() ? record_items(r.device, one) : record_replay(eager, one));
    take(0);
  }
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
  fmt::print("{:<10} {:>8} {:>15} {:>9} {:>8} {:>6} {:>8} {:>9} | {:>8} {:>8}\n", "", "step ms", "p10..p90",
             "tokens/s", "TFLOP/s", "MFU", "peak GB", "x floor", "fwd+bwd", "update");
  for (const Json& s : all["steps"]) {
    const auto n = [&](const char* key) { return s[key].get<double>(); };
    fmt::print("{:<10} {:>8.2f} {:>7.2f}..{:<6.2f} {:>9.0f} {:>8.1f} {:>5.1f}% {:>8.2f} {:>9} | {:>8.2f} {:>8.2f}\n",
               s["configuration"].get<std::string>(), n("step_ms"), n("step_ms_p10"), n("step_ms_p90"), n("tokens_per_second"),
               n("tflops"), 100 * n("mfu_of_measured"), n("peak_memory_gb"), cell(s, "times_floor", "{:.2f}"), n("forward_backward_ms"),
               n("update_ms"));
  }
}

void print_tables(const Json& s, int64_t kernels) {
  const auto n = [&](const char* key) { return s[key].get<double>(); };
  std::string phases;
  for (const char* phase : {"forward", "backward", "norm", "optimizer"}) phases += fmt::format(", {} {}", phase, cell(s["phase_ms"], phase, "{:.2f}"));
  fmt::print("\n{}: step {:.2f} ms, of which {:.0f} kernels and copies {:.2f} and gaps {:.2f}; floor {:.2f}{}\n",
             s["configuration"].get<std::string>(), n("step_ms"), n("items"), n("busy_ms"), n("gap_ms"), n("floor_ms"), phases);
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
  app.add_option("--set", settings, "key=value as in train_exp1 (configs chooses the configurations); may be repeated");
  AlgorithmOptions algorithms;
  algorithms.add_to(app);
  app.add_flag("--json", json, "print JSON instead of tables");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : static_cast<int>(Fault::usage);
  }
  if (device == "cuda") require_cuda();
  Recipe r = make_recipe(preset, device == "cuda" || (device == "auto" && cuda_available()) ? Device::cuda : Device::cpu);
  r.muon = false, r.accumulate = 1;
  for (const std::string& s : settings) {
    const size_t equals = s.find('=');
    if (equals == std::string::npos) fail(Fault::usage, "--set {}: expected key=value", s);
    const std::string key = s.substr(0, equals);
    for (const char* fixed : {"optimizer", "accumulate", "steps", "memory_limit_gb"})
      if (key == fixed)
        fail(Fault::usage, "--set {}: a timed step is one micro-batch and AdamW, as often as --steps says", s);
    set_field(r, key, s.substr(equals + 1));
  }
  validate(r);
  algorithms.apply(r.device);

  const Capability capability{matrix_rate(r.device, r.precision), copy_rate(r.device)};
  Json all{{"program", "weft"}, {"device", device_name(r.device)}, {"batch", r.batch}, {"seq", r.seq},
           {"matrix_tflops", capability.flops / 1e12}, {"copy_gb_per_second", capability.bytes / 1e9}, {"steps", Json::array()}};
  all.update(algorithm_settings());
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
  return weft::run_program("bench_step", [&] { return weft::run(argc, argv); });
}
