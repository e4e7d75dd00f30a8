#include "tools/report/report.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "engine/check.h"
#include "tools/report/chart.h"
#include "tools/report/comparison.h"
#include "tools/report/figures.h"

namespace weft {
namespace {

const Measure* const kPublishedColumns[] = {&kValLoss, &kValPerplexity, &kValAccuracy,
                                            &kTime,    &kPeakMemory,    &kParameters};

std::string count(const std::optional<int64_t>& n) {
  if (!n) return "not recorded";
  std::string digits = std::to_string(*n);
  for (int64_t at = static_cast<int64_t>(digits.size()) - 3; at > 0; at -= 3) digits.insert(digits.begin() + at, ',');
  return digits;
}

std::string or_unrecorded(const std::string& text) { return text.empty() ? "not recorded" : code(text); }

std::string interval(const Measure& m, const std::optional<Interval>& i, Sign sign = Sign::as_is) {
  return i ? fmt::format("{} to {}", shown(m, i->low, sign), shown(m, i->high, sign)) : "–";
}

std::string mean_of(const Measure& m, const Summary& s) { return s.n ? shown(m, s.mean) : "missing"; }

std::string plural(int64_t n, const char* noun) { return fmt::format("{} {}{}", n, noun, n == 1 ? "" : "s"); }

void add_setup(Document& out, const Results& r) {
  const Setup& s = r.setup;
  std::string configs, seeds;
  for (const std::string& config : s.configs) configs += (configs.empty() ? "" : ", ") + code(config);
  for (int64_t seed : s.seeds) seeds += (seeds.empty() ? "" : ", ") + std::to_string(seed);
  Table table{{"Setting", "Value"}, {}};
  const auto row = [&](const char* name, const std::string& value) { table.rows.push_back({name, value}); };
  row("Configurations", configs.empty() ? "none" : configs);
  row("Seeds", seeds.empty() ? "none" : seeds);
  row("Protocol", code(s.protocol));
  row("Preset", or_unrecorded(s.preset));
  row("Device", or_unrecorded(s.device_name.empty() ? s.device : s.device_name));
  row("Precision", or_unrecorded(s.precision));
  row("Optimizer", or_unrecorded(s.optimizer));
  row("Data", or_unrecorded(s.data));
  row("Tokens in the data", count(s.tokens));
  row("Vocabulary", count(s.vocab_size));
  row("Batch × sequence × accumulation",
      fmt::format("{} × {} × {}", count(s.batch), count(s.seq), count(s.grad_accum)));
  row("Micro-steps, optimizer steps", fmt::format("{}, {}", count(s.micro_steps), count(s.optimizer_steps)));
  row("Training, validation windows", fmt::format("{}, {}", count(s.train_windows), count(s.val_windows)));
  row("Commit", or_unrecorded(s.commit));
  row("Run folder", code(r.folder.string()));
  out.push_back(std::move(table));
  if (s.windows_overlap)
    out.push_back(Paragraph{
        "**Training and validation windows overlap** in this protocol: windows start at every token and are split at "
        "random, so nearly every validation token was also trained on. The validation loss here measures how well the "
        "text was learnt; it is no estimate for unseen text."});
}

void add_gaps(Document& out, const Results& r) {
  std::vector<std::string> gaps;
  for (const std::string& config : r.setup.configs)
    for (int64_t seed : r.setup.seeds) {
      const Run* run = r.find(config, seed);
      if (!run) gaps.push_back(fmt::format("{} with seed {} is missing.", code(config), seed));
      if (run && !run->complete)
        gaps.push_back(fmt::format("{} with seed {} is {}: it is listed but enters no mean and no comparison.",
                                   code(config), seed, code(run->status)));
      if (run && run->complete && !run->val_loss)
        gaps.push_back(fmt::format("{} with seed {} has no validation loss.", code(config), seed));
    }
  if (r.status != "complete" || complete_runs(r) < wanted_runs(r))
    gaps.insert(gaps.begin(), fmt::format("The experiment is {}: {} of {} runs are complete.", code(r.status),
                                          complete_runs(r), wanted_runs(r)));
  gaps.insert(gaps.end(), r.remarks.begin(), r.remarks.end());
  if (!gaps.empty()) out.push_back(Bullets{std::move(gaps)});
}

void add_published_form(Document& out, const Results& r) {
  Table table{{"Experiment"}, {}};
  for (const Measure* m : kPublishedColumns) table.head.push_back(m->name);
  std::set<int64_t> sizes;
  for (const std::string& config : r.setup.configs) {
    std::vector<std::string> row{code(config)};
    for (const Measure* m : kPublishedColumns) row.push_back(mean_of(*m, summary_of(r, config, *m)));
    sizes.insert(static_cast<int64_t>(values_of(r, config, kValLoss).size()));
    table.rows.push_back(std::move(row));
  }
  out.push_back(std::move(table));
  if (sizes.empty()) return;
  out.push_back(Paragraph{
      sizes.size() == 1 && *sizes.begin() == 1
          ? "One seed each. Memory in 10⁹ bytes."
          : fmt::format("Means over the complete seeds ({}). Memory in 10⁹ bytes.",
                        sizes.size() == 1 ? fmt::format("{} each", *sizes.begin())
                                          : fmt::format("{} to {}, not the same for all: compare with care",
                                                        *sizes.begin(), *sizes.rbegin()))});
}

std::string relative_sentence(const Results& r, const std::string& config, const std::string& base) {
  std::vector<std::string> parts;
  for (const Measure* m : {&kTime, &kStepTime, &kPeakMemory, &kParameters, &kFlops, &kKvCache}) {
    const Summary a = summary_of(r, base, *m), b = summary_of(r, config, *m);
    if (!a.n || !b.n || a.mean <= 0) continue;
    const double percent = 100 * (b.mean / a.mean - 1);
    parts.push_back(std::abs(percent) < 0.05
                        ? fmt::format("{} the same", m->noun)
                        : fmt::format("{} {:+.1f}% ({} against {}{})", m->noun, percent, shown(*m, b.mean), shown(*m, a.mean), m->unit));
  }
  if (parts.empty()) return "";
  std::string sentence = fmt::format("{} relative to {}: ", code(config), code(base));
  for (size_t i = 0; i < parts.size(); ++i) sentence += (i ? ", " : "") + parts[i];
  return sentence + ".";
}

void add_findings(Document& out, const Results& r, const std::vector<Comparison>& losses) {
  std::vector<std::string> findings;
  std::vector<std::pair<double, std::string>> ranking;
  double squares = 0, freedom = 0;
  int64_t most_seeds = 0;
  for (const std::string& config : r.setup.configs) {
    const Summary s = summary_of(r, config, kValLoss);
    most_seeds = std::max(most_seeds, s.n);
    if (s.n) ranking.emplace_back(s.mean, config);
    if (!s.sd) continue;
    squares += *s.sd * *s.sd * static_cast<double>(s.n - 1);
    freedom += static_cast<double>(s.n - 1);
  }
  std::sort(ranking.begin(), ranking.end());
  const double spread = freedom > 0 ? std::sqrt(squares / freedom) : 0;

  if (ranking.empty()) findings.push_back("No run is complete: there is nothing to compare yet.");
  if (!ranking.empty()) {
    std::string sentence = fmt::format("Lowest mean validation loss: {} with {}.", code(ranking[0].second),
                                       shown(kValLoss, ranking[0].first));
    for (size_t i = 1; i < ranking.size(); ++i) {
      const double gap = ranking[i].first - ranking[0].first;
      sentence += fmt::format(" {} is {} above it", code(ranking[i].second), shown(kValLoss, gap));
      if (spread > 0) sentence += fmt::format(" ({:.1f} times the spread between seeds)", gap / spread);
      sentence += ".";
    }
    if (spread > 0)
      sentence += fmt::format(" The spread is the standard deviation between seeds of one configuration, {:.4f}.", spread);
    findings.push_back(sentence);
  }
  if (most_seeds == 1)
    findings.push_back(
        "**With one seed nothing can be concluded about significance**: how far two runs of the same configuration "
        "would lie apart is not known. Run several seeds (`--seeds 42,43,44,45,46`).");
  for (const Comparison& c : losses)
    if (c.verdict != Verdict::one_seed || most_seeds != 1) findings.push_back(verdict_sentence(c, kValLoss));
  const std::string base = reference_config(r);
  for (const std::string& config : r.setup.configs)
    if (config != base)
      if (std::string sentence = relative_sentence(r, config, base); !sentence.empty()) findings.push_back(sentence);
  const Setup& s = r.setup;
  if (s.vocab_size && *s.vocab_size > 1 && !ranking.empty())
    findings.push_back(fmt::format("For scale: guessing uniformly over the vocabulary costs {:.4f} nats per token.",
                                   std::log(static_cast<double>(*s.vocab_size))));
  if ((s.entropy_lower || s.entropy_upper) && !ranking.empty()) {
    const double low = s.entropy_lower.value_or(0), high = s.entropy_upper.value_or(low);
    findings.push_back(fmt::format(
        "The text's own entropy is {} nats per token, which no model can beat on unseen text; the lowest loss lies "
        "{:.4f} above {}.",
        low == high ? fmt::format("{:.4f}", low) : fmt::format("between {:.4f} and {:.4f}", low, high),
        ranking[0].first - high, low == high ? "it" : "the upper bound"));
  }
  out.push_back(Bullets{std::move(findings)});
}

void add_runs(Document& out, const Results& r) {
  const Measure* const columns[] = {&kValLoss, &kValPerplexity, &kValAccuracy, &kTrainLoss,
                                    &kTime,    &kPeakMemory,    &kStepTime,    &kThroughput};
  Table table{{"Experiment", "Seed", "Status"}, {}};
  for (const Measure* m : columns) table.head.push_back(m->name);
  for (const std::string& config : r.setup.configs)
    for (int64_t seed : r.setup.seeds) {
      const Run* run = r.find(config, seed);
      std::vector<std::string> row{code(config), std::to_string(seed), run ? code(run->status) : "missing"};
      for (const Measure* m : columns) row.push_back(run ? shown(*m, run->*m->value) : "missing");
      table.rows.push_back(std::move(row));
    }
  out.push_back(std::move(table));
}

void add_summaries(Document& out, const Results& r) {
  Table table{{"Experiment", "Measure", "Seeds", "Mean", "Standard deviation", "95% CI of the mean"}, {}};
  for (const Measure* m : {&kValLoss, &kValPerplexity, &kValAccuracy, &kTrainLoss, &kTime, &kPeakMemory, &kThroughput})
    for (const std::string& config : r.setup.configs) {
      const Summary s = summary_of(r, config, *m);
      table.rows.push_back({code(config), m->name, std::to_string(s.n), mean_of(*m, s),
                            s.sd ? shown(*s.sd * m->scale, m->digits + 1) : "–", interval(*m, s.interval)});
    }
  out.push_back(std::move(table));
}

std::string effect_shown(const std::optional<Effect>& e) {
  if (!e) return "–";
  std::string text = fmt::format("{:+.2f}", e->d);
  if (e->interval) text += fmt::format(" ({:+.2f} to {:+.2f})", e->interval->low, e->interval->high);
  return text + (e->g ? fmt::format(", g {:+.2f}", *e->g) : ", g –");
}

std::string optional_p(const std::optional<double>& p) { return p ? shown_p(*p) : "–"; }

void add_comparisons(Document& out, const Results& r, const std::vector<Comparison>& losses, const ReportOptions& options,
                     const std::string& prefix) {
  const auto shared = [](const Comparison& c) { return c.seeds.size(); };
  const size_t most = losses.empty() ? 0 : shared(*std::max_element(losses.begin(), losses.end(), [&](auto& a, auto& b) {
    return shared(a) < shared(b);
  }));
  if (most < 2) {
    out.push_back(Paragraph{losses.empty() ? "There are no two configurations to compare."
                                           : "No pair of configurations shares two complete seeds: there is no spread to "
                                             "test a difference against, and nothing can be concluded about significance."});
    return;
  }
  Table tests{{"Validation loss", "Seeds", "Difference", "95% CI", "t", "p", "p (Holm)", "p (permutation)", "p (sign)"}, {}};
  Table sizes{{"Validation loss", "Cohen's d, paired (95% CI)", "Cohen's d, pooled (95% CI)", "Smallest detectable",
               "Seeds to find this difference", fmt::format("Seeds to find {:g}", options.difference)},
              {}};
  for (const Comparison& c : losses) {
    const std::string name = fmt::format("{} − {}", code(c.other), code(c.base));
    const Paired& p = c.paired;
    const auto seeds = [&](const std::optional<int64_t>& n) {
      return n ? std::to_string(*n) : p.p ? fmt::format("over {}", kMostSeeds) : "–";
    };
    tests.rows.push_back({name, std::to_string(p.difference.n),
                          p.difference.n ? shown(kValLoss, p.difference.mean, Sign::always) : "missing",
                          interval(kValLoss, p.difference.interval, Sign::always),
                          p.t ? fmt::format("{:.3f}", *p.t) : "–", optional_p(p.p), optional_p(c.p_holm),
                          optional_p(p.permutation), optional_p(p.sign)});
    sizes.rows.push_back({name, effect_shown(p.paired), effect_shown(p.pooled),
                          c.detectable ? shown(kValLoss, *c.detectable) : "–", seeds(c.seeds_needed),
                          seeds(c.seeds_for_given)});
  }
  out.push_back(std::move(tests));
  out.push_back(std::move(sizes));
  std::string text =
      "Runs of one seed see the same batches, so differences are taken within a seed. p: two-sided paired t-test; Holm's "
      "correction covers the comparisons above, and the verdict rests on it at 0.05. The permutation test flips the signs "
      "of the differences in every possible way and assumes no distribution; ";
  text += most < 6 ? fmt::format("with {} its p cannot fall below {:g}, so it can contradict a finding here but not make one. ",
                                 plural(static_cast<int64_t>(most), "pair"), std::ldexp(1.0, 1 - static_cast<int>(most)))
                   : "the sign test looks at the signs alone. ";
  text +=
      "g is d with Hedges' correction for few seeds (it does not exist at one degree of freedom); the interval of the pooled d "
      "treats the two groups as independent. The smallest detectable "
      "difference is the true one that this design finds four times in five, at the level that Holm asks of its first "
      "comparison.";
  out.push_back(Paragraph{text});
  std::vector<Whisker> whiskers;
  const std::string base = reference_config(r);
  for (const Comparison& c : losses) {
    const Summary& d = c.paired.difference;
    if (d.n == 0 || (c.base != base && c.other != base)) continue;
    const bool turned = c.other == base;
    std::optional<Interval> range = d.interval;
    if (range && turned) range = Interval{-range->high, -range->low};
    const std::string& config = turned ? c.base : c.other;
    const auto place = std::find(r.setup.configs.begin(), r.setup.configs.end(), config) - r.setup.configs.begin();
    whiskers.push_back({config, turned ? -d.mean : d.mean, range, static_cast<size_t>(place)});
  }
  add_figure(out, prefix + "differences.svg",
             fmt::format("Validation loss minus that of {}, paired by seed, with 95% confidence intervals (not corrected).", code(base)),
             whisker_chart(whiskers, "validation loss minus " + base));
}

void add_costs(Document& out, const Results& r, const ReportOptions& options) {
  Table table{{"Experiment"}, {}};
  const std::string base = reference_config(r);
  std::vector<const Measure*> present;
  for (const Measure* m : {&kTime, &kStepTime, &kThroughput, &kPeakMemory, &kParameters, &kActiveParameters, &kFlops, &kKvCache})
    if (std::any_of(r.setup.configs.begin(), r.setup.configs.end(), [&](auto& c) { return !values_of(r, c, *m).empty(); }))
      present.push_back(m);
  if (present.empty()) return;
  for (const Measure* m : present) table.head.push_back(m->name);
  for (const std::string& config : r.setup.configs) {
    std::vector<std::string> row{code(config)};
    for (const Measure* m : present) {
      const Summary s = summary_of(r, config, *m), b = summary_of(r, base, *m);
      std::string cell = mean_of(*m, s);
      if (config != base && s.n && b.n && b.mean > 0) cell += fmt::format(" ({:.2f}×)", s.mean / b.mean);
      row.push_back(cell);
    }
    table.rows.push_back(std::move(row));
  }
  out.push_back(Heading{3, "Cost of each configuration"});
  out.push_back(std::move(table));
  out.push_back(Paragraph{fmt::format("In brackets: the ratio to {}. A loss divided by time, memory or parameters would be no "
                                      "efficiency: a loss has no natural zero, so such a quotient can be ordered at will. "
                                      "Cost and loss stand side by side instead.", code(base))});
  std::vector<std::string> verdicts;
  for (const Measure* m : {&kTime, &kStepTime, &kPeakMemory})
    for (const Comparison& c : compare(r, *m, options.difference))
      if (c.verdict != Verdict::one_seed) verdicts.push_back(verdict_sentence(c, *m));
  if (!verdicts.empty()) out.push_back(Bullets{std::move(verdicts)});
}

struct Published {
  const char* config;
  double val_loss;
};
constexpr Published kPublished[] = {{"baseline", 6.3980}, {"lora", 6.4031}, {"enhanced", 6.4035}};

// "Trained for real, ..." from the highest and lowest mean of time and memory over what was published; empty where
// fewer than two are known.
std::string spread_sentence(const Results& r) {
  std::string parts;
  for (const Measure* m : {&kTime, &kPeakMemory}) {
    std::vector<double> means;
    for (const Published& p : kPublished)
      if (const Summary s = summary_of(r, p.config, *m); s.n && s.mean > 0) means.push_back(s.mean);
    if (means.size() < 2) continue;
    const auto [low, high] = std::minmax_element(means.begin(), means.end());
    parts += fmt::format("{} by up to {:.1f}%", parts.empty() ? m->noun : fmt::format(" and {}", m->noun), 100 * (*high / *low - 1));
  }
  return parts.empty() ? "" : fmt::format(" Trained for real, the configurations here differ in {}.", parts);
}

void add_published(Document& out, const Results& r) {
  Table table{{"Experiment", "Published Val Loss", "Val Loss here", "Published minus its baseline", "Here minus baseline",
               "Published Peak Mem (GB)", "Peak Mem here (GB)", "Published Time (min)", "Time here (min)"},
              {}};
  const Summary base = summary_of(r, "baseline", kValLoss);
  for (const Published& p : kPublished) {
    if (std::find(r.setup.configs.begin(), r.setup.configs.end(), p.config) == r.setup.configs.end()) continue;
    const Summary loss = summary_of(r, p.config, kValLoss);
    table.rows.push_back({code(p.config), shown(kValLoss, p.val_loss), mean_of(kValLoss, loss),
                          shown(kValLoss, p.val_loss - kPublished[0].val_loss, Sign::always),
                          loss.n && base.n ? shown(kValLoss, loss.mean - base.mean, Sign::always) : "missing", "16.51–16.53",
                          mean_of(kPeakMemory, summary_of(r, p.config, kPeakMemory)), "1.20",
                          mean_of(kTime, summary_of(r, p.config, kTime))});
  }
  if (table.rows.empty()) return;
  out.push_back(Heading{3, "Beside the published table"});
  out.push_back(std::move(table));
  const Setup& s = r.setup;
  std::vector<std::string> notes{
      fmt::format("**The published equality is an artefact.** Its trainer built each configuration only to count its parameters "
                  "and then trained the baseline all three times. Equal times and equal memory are the trace of that, and its "
                  "losses differ by the noise of three baseline runs.{}", spread_sentence(r)),
      "**Its effect size, Cohen's d = 0.000, compares the baseline with itself.** It says nothing about the configurations.",
      fmt::format("Published: one RTX 4090, another text. Here: {}, {}, {}, optimizer {}, protocol {}. Absolute losses, times "
                  "and memory are therefore not comparable; differences within one table are.",
                  or_unrecorded(s.device_name.empty() ? s.device : s.device_name), or_unrecorded(s.data),
                  or_unrecorded(s.precision), or_unrecorded(s.optimizer), code(s.protocol))};
  if (s.preset != "exp1")
    notes.push_back(fmt::format("This is the preset {}, not the published size of model: only the direction of a difference "
                                "could be compared, and even that need not carry over.", or_unrecorded(s.preset)));
  if (s.protocol != "seed")
    notes.push_back("The published recipe is `--protocol seed`; this run holds documents out whole and counts its schedule in "
                    "optimizer steps.");
  out.push_back(Bullets{std::move(notes)});
}

void add_folder(Document& out, const Results& r, const ReportOptions& options, const std::string& prefix) {
  out.push_back(Heading{3, "Set-up"});
  add_setup(out, r);
  add_gaps(out, r);
  out.push_back(Heading{3, "Results"});
  add_published_form(out, r);
  const std::vector<Comparison> losses = compare(r, kValLoss, options.difference);
  out.push_back(Heading{3, "Findings"});
  add_findings(out, r, losses);
  out.push_back(Heading{3, "Every run"});
  add_runs(out, r);
  out.push_back(Heading{3, "Mean and standard deviation"});
  add_summaries(out, r);
  out.push_back(Heading{3, "Differences"});
  add_comparisons(out, r, losses, options, prefix);
  add_curves(out, r, prefix);
  add_costs(out, r, options);
  add_parameters(out, r);
  add_memory(out, r, prefix);
  add_timeline(out, r, prefix);
  add_expert_load(out, r, prefix);
  add_published(out, r);
}

std::string label(const Results& r) {
  std::filesystem::path path = std::filesystem::absolute(r.folder).lexically_normal();
  return (path.has_filename() ? path : path.parent_path()).filename().string();
}

void add_side_by_side(Document& out, std::span<const Results> folders) {
  out.push_back(Heading{2, "Side by side"});
  std::vector<std::string> configs;
  for (const Results& r : folders)
    for (const std::string& config : r.setup.configs)
      if (std::find(configs.begin(), configs.end(), config) == configs.end()) configs.push_back(config);
  Table setups{{"Setting"}, {}};
  for (size_t i = 0; i < folders.size(); ++i) setups.head.push_back(fmt::format("{}: {}", i + 1, code(label(folders[i]))));
  const auto differing = [&](const char* name, auto&& get) {
    std::vector<std::string> row{name};
    for (const Results& r : folders) row.push_back(get(r.setup));
    if (std::any_of(row.begin() + 2, row.end(), [&](const std::string& v) { return v != row[1]; })) setups.rows.push_back(row);
  };
  differing("Protocol", [](const Setup& s) { return code(s.protocol); });
  differing("Preset", [](const Setup& s) { return or_unrecorded(s.preset); });
  differing("Device", [](const Setup& s) { return or_unrecorded(s.device_name.empty() ? s.device : s.device_name); });
  differing("Precision", [](const Setup& s) { return or_unrecorded(s.precision); });
  differing("Optimizer", [](const Setup& s) { return or_unrecorded(s.optimizer); });
  differing("Data", [](const Setup& s) { return or_unrecorded(s.data); });
  differing("Tokens in the data", [](const Setup& s) { return count(s.tokens); });
  differing("Vocabulary", [](const Setup& s) { return count(s.vocab_size); });
  differing("Batch", [](const Setup& s) { return count(s.batch); });
  differing("Sequence", [](const Setup& s) { return count(s.seq); });
  differing("Micro-steps", [](const Setup& s) { return count(s.micro_steps); });
  differing("Optimizer steps", [](const Setup& s) { return count(s.optimizer_steps); });
  differing("Commit", [](const Setup& s) { return or_unrecorded(s.commit); });
  if (setups.rows.empty())
    out.push_back(Paragraph{"The folders record the same set-up."});
  else
    out.push_back(std::move(setups));

  Table table{{"Experiment", "Measure"}, {}};
  for (size_t i = 0; i < folders.size(); ++i) table.head.push_back(fmt::format("{}: {}", i + 1, code(label(folders[i]))));
  for (const Measure* m : {&kValLoss, &kTrainLoss, &kTime, &kStepTime, &kPeakMemory, &kParameters})
    for (const std::string& config : configs) {
      std::vector<std::string> row{code(config), m->name};
      for (const Results& r : folders) {
        const Summary s = summary_of(r, config, *m);
        row.push_back(!s.n    ? "missing"
                      : !s.sd ? fmt::format("{} (1 seed)", shown(*m, s.mean))
                              : fmt::format("{} ± {} ({} seeds)", shown(*m, s.mean), shown(*s.sd * m->scale, m->digits), s.n));
      }
      table.rows.push_back(std::move(row));
    }
  out.push_back(std::move(table));
  out.push_back(Paragraph{"Mean ± standard deviation over the complete seeds, matched by the configuration's name. Where the "
                          "set-ups above differ, so does what the losses measure."});
}

}  // namespace

Document make_report(std::span<const Results> folders, const ReportOptions& options) {
  check(!folders.empty(), "a report needs a run folder, found none");
  Document out{Heading{1, "Attention configurations compared"},
               Paragraph{"Mixture-of-Experts language models that differ in their attention alone were trained on the same text "
                         "and are compared by their loss on validation text: the mean of −log of the probability given to each "
                         "next token, in nats. Lower is better. The perplexity is e to that loss."}};
  if (folders.size() > 1) add_side_by_side(out, folders);
  for (size_t i = 0; i < folders.size(); ++i) {
    out.push_back(Heading{2, folders.size() > 1 ? fmt::format("{}: {}", i + 1, code(label(folders[i])))
                                                : fmt::format("Run {}", code(label(folders[i])))});
    add_folder(out, folders[i], options, folders.size() > 1 ? fmt::format("report_{}_", i + 1) : "report_");
  }
  return out;
}

}  // namespace weft
