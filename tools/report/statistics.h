// The statistics of the report: summaries over seeds, paired comparisons, and what a design of n seeds can see.
// Used by comparison.cpp. A value that the sample does not determine (too few seeds, no spread) is an empty optional.
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace weft {

struct Interval {
  double low, high;
};

struct Summary {
  int64_t n = 0;
  double mean = 0;                   // 0 when n is 0
  std::optional<double> sd;          // with n - 1; from n = 2 on
  std::optional<Interval> interval;  // of the mean, by Student's t; from n = 2 on
};
Summary summarise(std::span<const double> values, double confidence = 0.95);

// An effect in units of a standard deviation, with the 95% interval that the noncentral t distribution gives it.
struct Effect {
  double d;                    // Cohen's
  std::optional<double> g;     // d times Hedges' correction; empty with one degree of freedom, where none exists
  std::optional<Interval> interval;  // of d
};

// b against a, measured at the same seeds.
struct Paired {
  Summary difference;                 // b - a; its sd is 0 when all differences agree up to rounding
  std::optional<double> t, p;         // paired t-test, two-sided
  std::optional<double> permutation;  // exact sign-flip test of the mean, up to kPermutationSeeds pairs
  std::optional<double> sign;         // exact sign test; ties carry no sign and are left out
  std::optional<Effect> paired;       // mean difference / sd of the differences
  std::optional<Effect> pooled;       // mean difference / pooled sd of the two groups
};
inline constexpr int64_t kPermutationSeeds = 20;
Paired compare_paired(std::span<const double> a, std::span<const double> b);

// Hedges' exact correction of d's upward bias at `freedom` degrees of freedom: 0 at 1, rising to 1.
double hedges_correction(double freedom);

// Holm's step-down adjustment, in the order given.
std::vector<double> holm(std::span<const double> p);

// The chance that a two-sided paired t-test at level alpha with n pairs finds a true difference of `effect` sds.
double paired_power(double effect, int64_t n, double alpha);

// The smallest true difference that such a test finds with chance `power`, given the sd of the differences.
std::optional<double> detectable_difference(double sd, int64_t n, double alpha, double power = 0.8);

// The fewest pairs with which such a test finds `difference` with chance `power`; empty beyond kMostSeeds.
inline constexpr int64_t kMostSeeds = 100000;
std::optional<int64_t> seeds_needed(double difference, double sd, double alpha, double power = 0.8);

}  // namespace weft
