#include "train/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>

#include "engine/allocator.h"
#include "engine/memory_report.h"
#include "engine/ops.h"
#include "engine/optim/adamw.h"
#include "engine/optim/muon.h"
#include "engine/optim/schedule.h"
#include "model/transformer.h"
#include "train/device_info.h"
#include "train/evaluation.h"
#include "train/progress.h"
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

// Muon for matrices, AdamW for the rest, or AdamW for all.
struct Optimizers {
  Optimizers(const Params& params, const Recipe& recipe) {
    if (recipe.muon)
      muon.emplace(params.of({Kind::matrix}), MuonOptions{.momentum = recipe.momentum, .compute = recipe.precision});
    adamw.emplace(recipe.muon ? params.of({Kind::vector, Kind::embedding}) : params.all(),
                  AdamWOptions{.weight_decay = recipe.weight_decay});
  }
  void step(const Recipe& recipe, double rate_factor, double gradient_scale) {
    if (muon) muon->step(recipe.muon_lr * rate_factor, gradient_scale);
    adamw->step(recipe.adamw_lr * rate_factor, gradient_scale);
  }
  std::optional<Muon> muon;
  std::optional<AdamW> adamw;
};

// The global norm of all gradients. Throws when it is not finite, naming what is.
double checked_gradient_norm(const Params& params, int64_t optimizer_step) {
  std::vector<Tensor> gradients;
  for (const Parameter& p : params.list()) gradients.push_back(p.value.grad());
  const double norm = std::sqrt(squared_norm(gradients).item());
  if (std::isfinite(norm)) return norm;
  for (const Parameter& p : params.list())
    if (!std::isfinite(squared_norm({p.value.grad()}).item()))
      fail(Fault::nonfinite, "optimizer step {}: the gradient of {} is not finite; no update was applied from it",
           optimizer_step, p.name);
  fail(Fault::nonfinite, "optimizer step {}: the global gradient norm overflows; no update was applied from it",
       optimizer_step);
}

}  // namespace

Json train_run(const Recipe& recipe, const std::string& name, uint64_t seed, const Corpus& corpus, RunFolder& folder) {
  const Config config = recipe.config(name);
  CachingAllocator& memory = allocator(recipe.device);
  memory.release_cached();
  memory.reset_peaks();
  const double initial_gb = gigabytes(memory.stats().allocated);
  const auto start = Clock::now();

  Params params;
  const Transformer model(config, Scope(params, recipe.device, seed));
  Optimizers optimizers(params, recipe);
  const Loader loader(corpus, recipe.protocol, recipe.batch, recipe.seq, seed);
  Prefetcher batches([&](int64_t step) { return loader.train(step); }, 0);
  const double flops = flops_per_token(config, recipe.seq);
  const std::optional<double> peak_rate = peak_flops(recipe.device, recipe.precision);
  const int64_t tokens_per_step = recipe.batch * recipe.seq;

  Progress progress(fmt::format("{:<8} seed {}", name, seed));
  std::vector<double> micro_ms, optimizer_ms;
  std::vector<Tensor> losses;
  double train_loss = 0, busy_seconds = 0;
  int64_t done = 0, optimizer_step = 0;
  Evaluation last_evaluation;
  const auto point = [&](const char* kind) {
    return Json{{"kind", kind}, {"experiment_name", name}, {"seed", seed}, {"micro_step", done},
                {"step", optimizer_step}, {"tokens", done * tokens_per_step}};
  };
  const auto run_evaluation = [&] {
    last_evaluation = evaluate(model, loader, recipe);
    Json p = point("eval");
    p.update(Json{{"val_loss", last_evaluation.loss}, {"val_accuracy", last_evaluation.accuracy},
                  {"val_perplexity", last_evaluation.perplexity()}, {"seconds", seconds_since(start)}});
    folder.append_metric(p);
    progress.say(fmt::format("step {}: validation loss {:.4f}, accuracy {:.2f}%, perplexity {:.2f}", done,
                             last_evaluation.loss, 100 * last_evaluation.accuracy, last_evaluation.perplexity()));
  };

  while (done < recipe.steps && !stop_requested()) {
    // The first optimizer step also makes what lasts (its state); the second is like all others.
    if (recipe.memory_report && optimizer_step == 1) memory.start_timeline(kTimelineEvents);
    const auto group_start = Clock::now();
    const int64_t group = std::min(recipe.accumulate, recipe.steps - done);
    losses.clear();
    for (int64_t i = 0; i < group; ++i) {
      const auto [tokens, targets] = to_device(batches.next(), recipe.device);
      Rng rng(seed, static_cast<uint64_t>(done + i));
      Loss loss = model.loss(tokens, targets, {.training = true, .rng = &rng, .compute = recipe.precision});
      losses.push_back(loss.ce.detached());
      backward(scale(loss.total, 1.0 / static_cast<double>(recipe.accumulate)));
    }
    const double norm = checked_gradient_norm(params, optimizer_step);  // waits for the device
    const double group_seconds = seconds_since(group_start);
    for (size_t i = 0; i < losses.size(); ++i)
      if (const double loss = losses[i].item(); !std::isfinite(loss))
        fail(Fault::nonfinite, "micro-step {}: the loss is {}; no update was applied from it", done + i, loss);

    const auto optimizer_start = Clock::now();
    const double rate_factor = schedule(name_of(recipe.protocol)).factor(optimizer_step, {recipe.steps, recipe.optimizer_steps()});
    optimizers.step(recipe, rate_factor, std::min(1.0, recipe.clip_norm / (norm + 1e-6)));
    params.clear_grads();
    wait_for(recipe.device);
    const double optimizer_seconds = seconds_since(optimizer_start);
    memory.stop_timeline();
    micro_ms.push_back(1e3 * group_seconds / static_cast<double>(group));
    optimizer_ms.push_back(1e3 * optimizer_seconds);
    busy_seconds += group_seconds + optimizer_seconds;
    ++optimizer_step;

    const int64_t before = done;
    for (const Tensor& loss : losses) {
      ++done;
      train_loss = loss.item();
      Json p = point("train");
      p.update(Json{{"loss", train_loss}, {"grad_norm", norm}, {"lr", recipe.adamw_lr * rate_factor},
                    {"seconds", seconds_since(start)}, {"memory_gb", gigabytes(memory.stats().allocated)}});
      folder.append_metric(p);
    }
    const double rate = static_cast<double>(group * tokens_per_step) / (group_seconds + optimizer_seconds);
    progress.update({done, recipe.steps, train_loss, rate,
                     peak_rate ? std::optional(rate * flops / *peak_rate) : std::nullopt,
                     gigabytes(memory.stats().peak_allocated)});
    if (done / recipe.eval_every != before / recipe.eval_every && done < recipe.steps && !stop_requested())
      run_evaluation();
  }
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
