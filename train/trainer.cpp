#include "train/trainer.h"

#include <algorithm>
#include <chrono>
#include <optional>

#include "engine/allocator.h"
#include "engine/memory_report.h"
#include "engine/optim/schedule.h"
#include "model/transformer.h"
#include "train/device_info.h"
#include "train/evaluation.h"
#include "train/progress.h"
#include "train/step.h"
#include "train/stop.h"

namespace weft {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }
double gigabytes(int64_t bytes) { return static_cast<double>(bytes) / 1e9; }

constexpr int64_t kTimelineEvents = 1 << 18;  // more than a step of exp1 makes

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<int64_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

Json train_run(const Recipe& recipe, const std::string& name, uint64_t seed, const Corpus& corpus, RunFolder& folder) {
  const Config config = recipe.config(name);
  CachingAllocator& memory = allocator(recipe.device);
  memory.release_cached();
  memory.reset_peaks();
  const double initial_gb = gigabytes(memory.stats().allocated);
  const auto start = Clock::now();

  Params params(recipe.precision);
  const Transformer model(config, Scope(params, recipe.device, seed));
  Recipe step_recipe = recipe;
  if (recipe.memory_report) step_recipe.graphs = false;  // a captured step hands no block out
  TrainingStep step(model, params, step_recipe, seed);
  const Loader loader(corpus, recipe.protocol, recipe.batch, recipe.seq, seed);
  Prefetcher batches([&](int64_t step) { return loader.train(step); }, 0);
  const double flops = flops_per_token(config, recipe.seq);
  const std::optional<double> peak_rate = peak_flops(recipe.device, recipe.precision);
  const int64_t tokens_per_step = recipe.batch * recipe.seq;

  Progress progress(fmt::format("{:<8} seed {}", name, seed));
  std::vector<double> micro_ms, optimizer_ms;
  double train_loss = 0, busy_seconds = 0;
  int64_t queued = 0, done = 0, optimizer_step = 0;  // micro-steps queued, and what has been taken of it
  Evaluation last_evaluation;
  const auto point = [&](const char* kind) {
    return Json{{"kind", kind}, {"experiment_name", name}, {"seed", seed}, {"micro_step", done},
                {"step", optimizer_step}, {"tokens", done * tokens_per_step}};
  };
  const auto run_evaluation = [&] {
    last_evaluation = evaluate(model, loader, recipe, step.pool());
    Json p = point("eval");
    p.update(Json{{"val_loss", last_evaluation.loss}, {"val_accuracy", last_evaluation.accuracy},
                  {"val_perplexity", last_evaluation.perplexity()}, {"seconds", seconds_since(start)}});
    folder.append_metric(p);
    progress.say(fmt::format("step {}: validation loss {:.4f}, accuracy {:.2f}%, perplexity {:.2f}", done,
                             last_evaluation.loss, 100 * last_evaluation.accuracy, last_evaluation.perplexity()));
  };
  const auto take_result = [&] {
    const StepResult result = step.take();
    const int64_t group = static_cast<int64_t>(result.losses.size());
    const double seconds = (result.micro_ms * static_cast<double>(group) + result.update_ms) / 1e3;
    micro_ms.push_back(result.micro_ms);
    optimizer_ms.push_back(result.update_ms);
    busy_seconds += seconds;
    ++optimizer_step;
    for (const double loss : result.losses) {
      ++done;
      train_loss = loss;
      Json p = point("train");
      p.update(Json{{"loss", loss}, {"grad_norm", result.gradient_norm},
                    {"lr", recipe.adamw_lr * result.rate_factor}, {"seconds", seconds_since(start)},
                    {"memory_gb", gigabytes(memory.stats().allocated)}});
      folder.append_metric(p);
    }
    const double rate = static_cast<double>(group * tokens_per_step) / seconds;
    progress.update({done, recipe.steps, train_loss, rate,
                     peak_rate ? std::optional(rate * flops / *peak_rate) : std::nullopt,
                     gigabytes(memory.stats().peak_allocated)});
  };
  const auto take_results = [&] {
    while (step.updates_pending() > 0) take_result();
  };

  const ScheduleRow& rates = schedule(name_of(recipe.protocol));
  for (int64_t s = 0; queued < recipe.steps && !stop_requested(); ++s) {
    // The first optimizer step also makes what lasts (its state); the second is like all others.
    if (recipe.memory_report && s == 1) memory.start_timeline(kTimelineEvents);
    const int64_t before = queued, group = std::min(recipe.accumulate, recipe.steps - queued);
    for (; queued < before + group; ++queued) step.micro_batch(batches.next());
    step.update(rates.factor(s, {recipe.steps, recipe.optimizer_steps()}));
    memory.stop_timeline();
    // A GPU works on the next step meanwhile.
    while (step.updates_pending() > (recipe.device == Device::cuda ? 1 : 0)) take_result();
    if (queued / recipe.eval_every != before / recipe.eval_every && queued < recipe.steps && !stop_requested()) {
      take_results();
      run_evaluation();
    }
  }
  take_results();
  const bool complete = done == recipe.steps;
  run_evaluation();

  const MemoryStats stats = memory.stats();
  if (recipe.memory_report) {
    const std::string suffix = fmt::format("_{}_{}", name, seed);
    folder.write_text("memory" + suffix + ".txt", memory_report(memory));
    if (optimizer_step > 1) folder.write_text("memory_timeline" + suffix + ".csv", timeline_csv(memory));
  }
  Json by_category;
  for (int c = 0; c < kCategories; ++c) by_category[name_of(static_cast<Category>(c))] = gigabytes(stats.at_peak[c]);
  Json by_part;
  for (const Part& part : parameters_by_part(params)) by_part[part.name] = part.parameters;
  const double rate = busy_seconds > 0 ? static_cast<double>(done * tokens_per_step) / busy_seconds : 0;
  return Json{{"experiment_name", name},
              {"seed", seed},
              {"uses_deepseek", attention_row(name).latent},
              {"status", complete ? "complete" : "interrupted"},
              {"val_loss", last_evaluation.loss},
              {"val_accuracy", last_evaluation.accuracy},
              {"val_perplexity", last_evaluation.perplexity()},
              {"train_loss", train_loss},
              {"training_time_minutes", seconds_since(start) / 60},
              {"initial_memory_gb", initial_gb},
              {"peak_memory_gb", gigabytes(stats.peak_allocated)},
              {"final_memory_gb", gigabytes(stats.allocated)},
              {"memory_used_gb", gigabytes(stats.peak_allocated) - initial_gb},
              {"peak_memory_reserved_gb", gigabytes(stats.peak_reserved)},
              {"peak_memory_by_category_gb", by_category},
              {"parameter_count", params.count()},
              {"parameters_millions", static_cast<double>(params.count()) / 1e6},
              {"parameters_by_part", by_part},
              {"active_parameter_count", active_parameter_count(config)},
              {"flops_per_token", flops},
              {"kv_cache_bytes_per_token", kv_cache_bytes_per_token(config, size_of(recipe.precision))},
              {"tokens_per_second", rate},
              {"step_ms_median", median(micro_ms)},
              {"optimizer_ms_median", median(optimizer_ms)},
              {"mfu", peak_rate ? Json(rate * flops / *peak_rate) : Json(nullptr)},
              {"expert_load", last_evaluation.expert_load},
              {"micro_steps", done},
              {"optimizer_steps", optimizer_step}};
}

}  // namespace weft
