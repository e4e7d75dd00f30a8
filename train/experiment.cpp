#include "train/experiment.h"

#include <cmath>

#include "engine/allocator.h"
#include "model/transformer.h"
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
  allocator(recipe_.device).set_limit(static_cast<int64_t>(recipe_.memory_limit_gb * 1e9));
  RunFolder folder(out);
  folder.write("resolved_config.json", resolved_config(recipe_));
  folder.write("env.json", environment());
  Json results{{"schema", "weft-results-1"}, {"setup", setup()}, {"status", "interrupted"}, {"runs", Json::array()}};
  folder.write("results.json", results);
  fmt::print(stderr, "{}", plan());
  try {
    for (const uint64_t seed : recipe_.seeds)
      for (const std::string& name : recipe_.configs) {
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
