#include "train/experiment.h"

#include <cmath>

#include "engine/allocator.h"
#include "model/transformer.h"
#include "train/algorithms.h"
#include "train/device_info.h"
#include "train/stop.h"
#include "train/trainer.h"

namespace weft {
namespace {

Corpus open_corpus(const Recipe& recipe) {
  const int64_t limit = recipe.max_tokens >= 0 ? recipe.max_tokens : token_limit(recipe.protocol);
  // The model's vocabulary is the same for every configuration.
  const int64_t vocab_size = recipe.config(recipe.configs.front()).vocab_size;
  if (!recipe.data.empty()) return Corpus::open(recipe.data, vocab_size, limit);
  return Corpus::synthetic({.vocab_size = vocab_size, .tokens = limit > 0 ? limit : 2'000'000});
}

Json number_or_null(double x) { return std::isfinite(x) ? Json(x) : Json(nullptr); }

constexpr const char* kSchema = "weft-results-1";

// Throws Fault::config naming the first value that is not the same; `path` is where both lie.
void must_equal(const Json& there, const Json& here, const std::string& path, const std::string& out) {
  if (there.is_object() && here.is_object()) {
    for (const auto& [key, value] : here.items())
      must_equal(there.value(key, Json()), value, path.empty() ? key : path + "." + key, out);
  } else if (there != here) {
    fail(Fault::config, "--resume: {} is {} in {} and {} here; only the same experiment can be continued", path,
         there.dump(), out, here.dump());
  }
}

// The run of the same configuration and seed as `point`; null when there is none.
const Json* find_run(const std::vector<Json>& runs, const Json& point) {
  for (const Json& run : runs)
    if (run.value("experiment_name", Json()) == point.value("experiment_name", Json()) &&
        run.value("seed", Json()) == point.value("seed", Json()))
      return &run;
  return nullptr;
}

}  // namespace

Experiment::Experiment(Recipe recipe)
    : recipe_(std::move(recipe)),
      corpus_(open_corpus(recipe_)),
      split_(split_windows(corpus_, recipe_.protocol, recipe_.seq)) {
  // Refuses data that are too short for one batch before anything is built.
  Loader(corpus_, recipe_.protocol, recipe_.batch, recipe_.seq, recipe_.seeds.front());
}

Json Experiment::setup() const {
  Json s = resolved_config(recipe_)["recipe"];
  s["device_name"] = device_name(recipe_.device);
  s["data"] = corpus_.description();
  s["tokens"] = corpus_.size();
  s["vocab_size"] = corpus_.vocab_size();
  s["grad_accum"] = recipe_.accumulate;
  s["micro_steps"] = recipe_.steps;
  s["optimizer_steps"] = recipe_.optimizer_steps();
  s["train_windows"] = split_.train.count;
  s["val_windows"] = split_.validation.count;
  s["windows_overlap"] = split_.overlaps;
  s["entropy_lower"] = number_or_null(corpus_.entropy().lower);
  s["entropy_upper"] = number_or_null(corpus_.entropy().upper);
  s["commit"] = environment()["commit"];
  return s;
}

std::string Experiment::plan() const {
  std::string text = fmt::format(
      "Data: {}, {} tokens; {} windows of {} to train on, {} to validate on{}\n", corpus_.description(), corpus_.size(),
      split_.train.count, recipe_.seq, split_.validation.count, split_.overlaps ? " (they overlap)" : "");
  if (std::isfinite(corpus_.entropy().upper))
    text += fmt::format("Entropy of the data: {:.4f} nats per token (no model can do better)\n", corpus_.entropy().upper);
  text += fmt::format("Each run: {} micro-batches of {} x {} tokens, {} optimizer steps, {} on {}\n", recipe_.steps,
                      recipe_.batch, recipe_.seq, recipe_.optimizer_steps(),
                      recipe_.precision == DType::bf16 ? "bf16" : "fp32", device_name(recipe_.device));
  for (const std::string& name : recipe_.configs)
    text += fmt::format("{:<10} {:>12} parameters, {} seed{}\n", name, parameter_count(recipe_.config(name)),
                        recipe_.seeds.size(), recipe_.seeds.size() == 1 ? "" : "s");
  return text;
}

void Experiment::run(const std::string& out) {
  RunFolder folder(out);
  folder.write("resolved_config.json", resolved_config(recipe_));
  folder.write("env.json", environment());
  train(folder, setup(), {});
}

void Experiment::resume(const std::string& out) {
  RunFolder folder = RunFolder::existing(out);
  must_equal(folder.read("resolved_config.json"), resolved_config(recipe_), "", out);
  const char* const algorithms = "gemm_algorithms";  // a run timed and one --deterministic are two experiments
  must_equal(folder.read("env.json").value(algorithms, Json()), algorithm_settings()[algorithms], algorithms, out);
  const Json results = folder.read("results.json");
  if (results.value("schema", Json()) != kSchema || !results.contains("setup") || !results.value("runs", Json()).is_array())
    fail(Fault::data, "{}/results.json: expected {} with setup and runs, found something else", out, kSchema);
  // Another build may continue; its commit is not a setting.
  Json now = setup();
  now["commit"] = results["setup"].is_object() ? results["setup"].value("commit", Json()) : Json();
  must_equal(results["setup"], now, "", out);

  std::vector<Json> finished;
  for (const Json& run : results["runs"])
    if (run.is_object() && run.value("status", Json()) == "complete") finished.push_back(run);
  folder.keep_metrics([&](const Json& point) { return find_run(finished, point) != nullptr; });
  fmt::print(stderr, "{}: {} of {} runs are complete and kept\n", out, finished.size(),
             recipe_.seeds.size() * recipe_.configs.size());
  train(folder, std::move(now), finished);
}

void Experiment::train(RunFolder& folder, Json setup, const std::vector<Json>& finished) {
  allocator(recipe_.device).set_limit(static_cast<int64_t>(recipe_.memory_limit_gb * 1e9));
  Json results{{"schema", kSchema}, {"setup", std::move(setup)}, {"status", "interrupted"}, {"runs", finished}};
  folder.write("results.json", results);
  fmt::print(stderr, "{}", plan());
  try {
    for (const uint64_t seed : recipe_.seeds)
      for (const std::string& name : recipe_.configs) {
        if (find_run(finished, {{"experiment_name", name}, {"seed", seed}})) continue;
        if (stop_requested()) return;
        results["runs"].push_back(train_run(recipe_, name, seed, corpus_, folder));
        folder.write("results.json", results);
      }
    if (stop_requested()) return;
    results["status"] = "complete";
  } catch (...) {
    results["status"] = "failed";
    folder.write("results.json", results);
    throw;
  }
  folder.write("results.json", results);
}

}  // namespace weft
