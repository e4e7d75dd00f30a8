// What the numbers of a run folder say: each measure summarised over the complete seeds of a configuration, and
// configurations compared in pairs at the seeds they share. The report's tables, sentences and pictures come from here.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "tools/report/results.h"
#include "tools/report/statistics.h"

namespace weft {

inline constexpr double kLevel = 0.05;  // the chance of a false finding, over all comparisons of one measure

// A column of the runs. `scale` and `digits` say how it is shown.
struct Measure {
  const char* key;
  const char* name;  // with its unit
  const char* noun;  // inside a sentence
  const char* unit;  // after a value inside a sentence, with its space
  Value Run::*value;
  double scale;
  int digits;
};
extern const Measure kValLoss, kValPerplexity, kValAccuracy, kTrainLoss, kTime, kPeakMemory, kParameters, kStepTime,
    kThroughput, kActiveParameters, kFlops, kKvCache;

// The values of the complete runs of one configuration that have the measure, in the order of the seeds.
std::vector<double> values_of(const Results&, const std::string& config, const Measure&);
Summary summary_of(const Results&, const std::string& config, const Measure&);

enum class Verdict {
  one_seed,           // fewer than two shared seeds: nothing can be concluded
  same,               // equal at every seed
  constant,           // the same difference at every seed: exact, and beyond what a test could say
  higher,             // found, Holm-adjusted p below kLevel
  lower,
  indistinguishable,  // not found with this many seeds; never "no difference"
};

// `other` against `base`, at the seeds where both runs are complete.
struct Comparison {
  std::string base, other;
  std::vector<int64_t> seeds;
  Paired paired;
  std::optional<double> p_holm;         // over all comparisons of this measure
  std::optional<double> detectable;     // the smallest true difference found four times in five with these seeds
  std::optional<int64_t> seeds_needed;  // to find a difference as large as the one seen, four times in five
  std::optional<int64_t> seeds_for_given;
  Verdict verdict = Verdict::one_seed;
};

// Every pair of configurations, earlier one as base. `given` is a difference that the reader cares about.
std::vector<Comparison> compare(const Results&, const Measure&, double given);

// The configuration that others are measured against: "baseline", else the first one; empty without any.
std::string reference_config(const Results&);

// "`lora` has a higher validation loss than `baseline` by ..." — derived from the verdict alone.
std::string verdict_sentence(const Comparison&, const Measure&);

// A value as the measure shows it; `signed_` numbers bear a plus.
enum class Sign { as_is, always };
std::string shown(double x, int digits, Sign = Sign::as_is);
std::string shown(const Measure&, double value, Sign = Sign::as_is);
std::string shown(const Measure&, const Value& value, Sign = Sign::as_is);  // "missing" when empty
std::string shown_p(double p);

}  // namespace weft
