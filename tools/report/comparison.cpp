#include "tools/report/comparison.h"

#include <algorithm>
#include <cmath>

#include "engine/check.h"
#include "tools/report/document.h"

namespace weft {

const Measure kValLoss{"val_loss", "Val Loss", "validation loss", "", &Run::val_loss, 1, 4};
const Measure kValPerplexity{"val_perplexity", "Val Perp", "validation perplexity", "", &Run::val_perplexity, 1, 2};
const Measure kValAccuracy{"val_accuracy", "Val Acc", "validation accuracy", "", &Run::val_accuracy, 1, 4};
const Measure kTrainLoss{"train_loss", "Train Loss", "training loss", "", &Run::train_loss, 1, 4};
const Measure kTime{"training_time_minutes", "Time (min)", "training time", " min", &Run::training_time_minutes, 1, 2};
const Measure kPeakMemory{"peak_memory_gb", "Peak Mem (GB)", "peak memory", " GB", &Run::peak_memory_gb, 1, 2};
const Measure kParameters{"parameter_count", "Params (M)", "number of parameters", " M", &Run::parameter_count, 1e-6, 2};
const Measure kStepTime{"step_ms_median", "Step (ms)", "median step time", " ms", &Run::step_ms_median, 1, 2};
const Measure kThroughput{"tokens_per_second", "Tokens/s", "throughput", " tokens/s", &Run::tokens_per_second, 1, 0};
const Measure kActiveParameters{"active_parameter_count", "Active params (M)", "number of parameters active per token", " M",
                                &Run::active_parameter_count, 1e-6, 2};
const Measure kFlops{"flops_per_token", "MFLOP per token", "work per token", " MFLOP", &Run::flops_per_token, 1e-6, 1};
const Measure kKvCache{"kv_cache_bytes_per_token", "K/V cache per token (bytes)", "key/value cache per token", " bytes",
                       &Run::kv_cache_bytes_per_token, 1, 0};

namespace {

const Run* complete_run(const Results& results, const std::string& config, int64_t seed, const Measure& measure) {
  const Run* run = results.find(config, seed);
  return run && run->complete && run->*measure.value ? run : nullptr;
}

Comparison compare_two(const Results& results, const std::string& base, const std::string& other,
                       const Measure& measure) {
  Comparison c;
  c.base = base;
  c.other = other;
  std::vector<double> a, b;
  for (int64_t seed : results.setup.seeds) {
    const Run* x = complete_run(results, base, seed, measure);
    const Run* y = complete_run(results, other, seed, measure);
    if (!x || !y) continue;
    c.seeds.push_back(seed);
    a.push_back(*(x->*measure.value));
    b.push_back(*(y->*measure.value));
  }
  c.paired = compare_paired(a, b);
  return c;
}

Verdict verdict_of(const Comparison& c) {
  const Summary& difference = c.paired.difference;
  if (difference.n < 2) return Verdict::one_seed;
  if (*difference.sd == 0) return difference.mean == 0 ? Verdict::same : Verdict::constant;
  if (*c.p_holm >= kLevel) return Verdict::indistinguishable;
  return difference.mean > 0 ? Verdict::higher : Verdict::lower;
}

}  // namespace

std::vector<double> values_of(const Results& results, const std::string& config, const Measure& measure) {
  std::vector<double> values;
  for (int64_t seed : results.setup.seeds)
    if (const Run* run = complete_run(results, config, seed, measure)) values.push_back(*(run->*measure.value));
  return values;
}

Summary summary_of(const Results& results, const std::string& config, const Measure& measure) {
  return summarise(values_of(results, config, measure));
}

std::vector<Comparison> compare(const Results& results, const Measure& measure, double given) {
  std::vector<Comparison> all;
  const auto& configs = results.setup.configs;
  for (size_t i = 0; i < configs.size(); ++i)
    for (size_t j = i + 1; j < configs.size(); ++j)
      all.push_back(compare_two(results, configs[i], configs[j], measure));

  std::vector<double> p;
  for (const Comparison& c : all)
    if (c.paired.p) p.push_back(*c.paired.p);
  const std::vector<double> adjusted = holm(p);
  size_t next = 0;
  for (Comparison& c : all) {
    if (c.paired.p) c.p_holm = adjusted[next++];
    const Summary& difference = c.paired.difference;
    if (c.p_holm && *difference.sd > 0) {
      const double level = kLevel / static_cast<double>(p.size());  // what Holm asks of its first comparison
      c.detectable = detectable_difference(*difference.sd, difference.n, level);
      c.seeds_needed = seeds_needed(difference.mean, *difference.sd, level);
      c.seeds_for_given = seeds_needed(given, *difference.sd, level);
    }
    c.verdict = verdict_of(c);
  }
  return all;
}

std::string reference_config(const Results& results) {
  const auto& configs = results.setup.configs;
  if (configs.empty()) return "";
  const auto baseline = std::find(configs.begin(), configs.end(), "baseline");
  return baseline == configs.end() ? configs.front() : *baseline;
}

std::string shown(double x, int digits, Sign sign) {
  // A small model's memory and time would vanish in the digits that suit the full one.
  const bool vanishing = x != 0 && std::abs(x) < 10 * std::pow(10.0, -digits);
  if (sign == Sign::always) return vanishing ? fmt::format("{:+.3g}", x) : fmt::format("{:+.{}f}", x, digits);
  return vanishing ? fmt::format("{:.3g}", x) : fmt::format("{:.{}f}", x, digits);
}

std::string shown(const Measure& measure, double value, Sign sign) {
  return shown(value * measure.scale, measure.digits, sign);
}

std::string shown(const Measure& measure, const Value& value, Sign sign) {
  return value ? shown(measure, *value, sign) : "missing";
}

std::string shown_p(double p) { return p < 0.0001 ? "< 0.0001" : fmt::format("{:.4f}", p); }

std::string verdict_sentence(const Comparison& c, const Measure& measure) {
  const std::string base = code(c.base), other = code(c.other);
  const Summary& difference = c.paired.difference;
  const auto size = [&](double x) { return shown(measure, std::abs(x)) + measure.unit; };
  const auto change = [&](double x) { return shown(measure, x, Sign::always) + measure.unit; };
  switch (c.verdict) {
    case Verdict::one_seed:
      if (difference.n == 0) return fmt::format("{} and {} share no complete seed: they cannot be compared.", other, base);
      return fmt::format(
          "{} against {}: {} in {}, seen at one seed. Nothing can be concluded about significance from one seed.", other,
          base, change(difference.mean), measure.noun);
    case Verdict::same:
      return fmt::format("{} and {} have the same {} at each of {} seeds.", other, base, measure.noun, difference.n);
    case Verdict::constant:
      return fmt::format("{} differs from {} in {} by exactly {} at each of {} seeds; with no spread there is nothing to test.",
                         other, base, measure.noun, change(difference.mean), difference.n);
    case Verdict::higher:
    case Verdict::lower: {
      std::string sentence = fmt::format(
          "{} has a **{} {}** than {}, by {} (95% CI {} to {}; paired t-test, Holm-adjusted p {}; {} seeds).", other,
          c.verdict == Verdict::higher ? "higher" : "lower", measure.noun, base, size(difference.mean),
          shown(measure, difference.interval->low, Sign::always),
          shown(measure, difference.interval->high, Sign::always), shown_p(*c.p_holm), difference.n);
      // Below six pairs the permutation test cannot reach kLevel whatever the data.
      if (difference.n >= 6 && c.paired.permutation && *c.paired.permutation >= kLevel)
        sentence += fmt::format(" The permutation test, which assumes no distribution, does not confirm it (p {}).",
                                shown_p(*c.paired.permutation));
      return sentence;
    }
    case Verdict::indistinguishable: {
      std::string sentence = fmt::format(
          "{} and {} are **not distinguishable at {} seeds** in {}: the mean difference is {} (95% CI {} to {}; "
          "Holm-adjusted p {}).",
          other, base, difference.n, measure.noun, change(difference.mean),
          shown(measure, difference.interval->low, Sign::always),
          shown(measure, difference.interval->high, Sign::always), shown_p(*c.p_holm));
      if (c.detectable)
        sentence += fmt::format(" These seeds would find a true difference of {} four times in five, a smaller one less often.",
                                size(*c.detectable));
      if (c.seeds_needed)
        sentence += fmt::format(" To find a difference as large as the one seen would take {} seeds.", *c.seeds_needed);
      return sentence;
    }
  }
  return "";
}

}  // namespace weft
