#include "tools/report/statistics.h"

#include <algorithm>
#include <boost/math/distributions/binomial.hpp>
#include <boost/math/distributions/non_central_t.hpp>
#include <boost/math/distributions/students_t.hpp>
#include <boost/math/special_functions/gamma.hpp>
#include <cmath>
#include <numeric>

#include "engine/check.h"

namespace weft {
namespace {

using boost::math::complement;
using boost::math::students_t;

double mean_of(std::span<const double> values) {
  if (std::all_of(values.begin(), values.end(), [&](double v) { return v == values[0]; })) return values[0];
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

// Differences of equal decimals differ in their last bits; a spread that small is rounding and no measurement.
double rounding_of(std::span<const double> a, std::span<const double> b) {
  double largest = 0;
  for (double v : a) largest = std::max(largest, std::abs(v));
  for (double v : b) largest = std::max(largest, std::abs(v));
  return largest * 1e-14;
}

double two_sided(double t, double freedom) { return 2 * cdf(complement(students_t(freedom), std::abs(t))); }

// P(T <= t) for noncentral t. Boost wants a nonnegative t in its tails to stay accurate: mirror the other half.
double noncentral_cdf(double t, double freedom, double shift) {
  if (shift == 0) return cdf(students_t(freedom), t);
  if (t < 0) return 1 - noncentral_cdf(-t, freedom, -shift);
  return cdf(boost::math::non_central_t(freedom, shift), t);
}

double bisect(double low, double high, auto&& below) {
  for (int i = 0; i < 200 && low < high; ++i) {
    const double middle = low + (high - low) / 2;
    if (middle == low || middle == high) break;
    (below(middle) ? low : high) = middle;
  }
  return low + (high - low) / 2;
}

// The shift under which t lies at the lower-tail chance `tail`: the chance falls as the shift grows.
double shift_at(double t, double freedom, double tail) {
  double reach = std::abs(t) + 10;
  while (noncentral_cdf(t, freedom, t + reach) > tail) reach *= 2;
  double back = std::abs(t) + 10;
  while (noncentral_cdf(t, freedom, t - back) < tail) back *= 2;
  return bisect(t - back, t + reach, [&](double shift) { return noncentral_cdf(t, freedom, shift) > tail; });
}

// d = t * unit; t follows the noncentral t distribution whose shift is the true effect / unit.
Effect effect(double d, double unit, double freedom) {
  Effect e{d, {}, {}};
  if (freedom >= 2) e.g = d * hedges_correction(freedom);
  const double t = d / unit;
  // Beyond this the series behind the distribution no longer converges; so extreme a ratio says "no spread" anyway.
  if (std::abs(t) < 1000) e.interval = Interval{unit * shift_at(t, freedom, 0.975), unit * shift_at(t, freedom, 0.025)};
  return e;
}

double sign_flip_test(std::span<const double> differences) {
  const double observed = std::abs(std::accumulate(differences.begin(), differences.end(), 0.0));
  double size = 0;
  for (double d : differences) size += std::abs(d);
  const double threshold = observed - 1e-12 * size;  // sums equal up to the order of their additions are ties
  const uint64_t flips = uint64_t{1} << differences.size();
  uint64_t extreme = 0;
  for (uint64_t flip = 0; flip < flips; ++flip) {
    double sum = 0;
    for (size_t i = 0; i < differences.size(); ++i) sum += flip >> i & 1 ? -differences[i] : differences[i];
    extreme += std::abs(sum) >= threshold;
  }
  return static_cast<double>(extreme) / static_cast<double>(flips);
}

double sign_test(std::span<const double> differences) {
  const auto up = std::count_if(differences.begin(), differences.end(), [](double d) { return d > 0; });
  const auto down = std::count_if(differences.begin(), differences.end(), [](double d) { return d < 0; });
  if (up + down == 0) return 1;
  const boost::math::binomial coin(static_cast<double>(up + down), 0.5);
  return std::min(1.0, 2 * cdf(coin, static_cast<double>(std::min(up, down))));
}

}  // namespace

Summary summarise(std::span<const double> values, double confidence) {
  Summary s;
  s.n = static_cast<int64_t>(values.size());
  if (s.n == 0) return s;
  s.mean = mean_of(values);
  if (s.n < 2) return s;
  double squares = 0;
  for (double v : values) squares += (v - s.mean) * (v - s.mean);
  const double n = static_cast<double>(s.n);
  s.sd = std::sqrt(squares / (n - 1));
  const double half = quantile(complement(students_t(n - 1), (1 - confidence) / 2)) * *s.sd / std::sqrt(n);
  s.interval = Interval{s.mean - half, s.mean + half};
  return s;
}

Paired compare_paired(std::span<const double> a, std::span<const double> b) {
  check(a.size() == b.size(), "pairs: both sides have as many values, found {} and {}", a.size(), b.size());
  std::vector<double> differences(a.size());
  const double rounding = rounding_of(a, b);
  for (size_t i = 0; i < a.size(); ++i) {
    differences[i] = b[i] - a[i];
    if (std::abs(differences[i]) <= rounding) differences[i] = 0;
  }
  Paired result;
  result.difference = summarise(differences);
  const int64_t n = result.difference.n;
  if (n < 2) return result;
  if (*result.difference.sd <= rounding) {
    result.difference.sd = 0;
    result.difference.interval = Interval{result.difference.mean, result.difference.mean};
  }

  const double mean = result.difference.mean, sd = *result.difference.sd;
  const double root = std::sqrt(static_cast<double>(n)), freedom = static_cast<double>(n - 1);
  if (sd > 0) {
    result.t = mean / (sd / root);
    result.p = two_sided(*result.t, freedom);
    result.paired = effect(mean / sd, 1 / root, freedom);
  }
  if (n <= kPermutationSeeds) result.permutation = sign_flip_test(differences);
  result.sign = sign_test(differences);

  const double sd_a = *summarise(a).sd, sd_b = *summarise(b).sd;
  const double pooled = std::sqrt((sd_a * sd_a + sd_b * sd_b) / 2);
  if (pooled > rounding) result.pooled = effect(mean / pooled, std::sqrt(2.0) / root, 2 * freedom);
  return result;
}

double hedges_correction(double freedom) {
  if (freedom <= 1) return 0;
  using boost::math::lgamma;
  return std::exp(lgamma(freedom / 2) - lgamma((freedom - 1) / 2) - std::log(freedom / 2) / 2);
}

std::vector<double> holm(std::span<const double> p) {
  std::vector<size_t> order(p.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t i, size_t j) { return p[i] < p[j]; });
  std::vector<double> adjusted(p.size());
  double floor = 0;
  for (size_t rank = 0; rank < order.size(); ++rank) {
    floor = std::max(floor, std::min(1.0, p[order[rank]] * static_cast<double>(order.size() - rank)));
    adjusted[order[rank]] = floor;
  }
  return adjusted;
}

double paired_power(double effect, int64_t n, double alpha) {
  check(n >= 2 && alpha > 0 && alpha < 1, "power: at least 2 pairs and a level within (0, 1), found {}, {}", n, alpha);
  const double freedom = static_cast<double>(n - 1), shift = std::abs(effect) * std::sqrt(static_cast<double>(n));
  const double critical = quantile(complement(students_t(freedom), alpha / 2));
  if (shift > critical + 40) return 1;
  return 1 - noncentral_cdf(critical, freedom, shift) + noncentral_cdf(-critical, freedom, shift);
}

std::optional<double> detectable_difference(double sd, int64_t n, double alpha, double power) {
  if (n < 2 || sd <= 0) return {};
  double high = 1;
  while (paired_power(high, n, alpha) < power) high *= 2;
  return sd * bisect(0, high, [&](double effect) { return paired_power(effect, n, alpha) < power; });
}

std::optional<int64_t> seeds_needed(double difference, double sd, double alpha, double power) {
  const double effect = std::abs(difference) / sd;
  if (!(effect > 0) || !std::isfinite(effect)) return {};
  int64_t low = 1, high = 2;  // `low` is too few
  while (paired_power(effect, high, alpha) < power) {
    low = high;
    high *= 2;
    if (low >= kMostSeeds) return {};
  }
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (paired_power(effect, middle, alpha) < power ? low : high) = middle;
  }
  if (high > kMostSeeds) return {};
  return high;
}

}  // namespace weft
