// Rotary position embedding (Su et al., 2021) with the usual ways to stretch it over longer texts. The angles are
// computed on the host in double; one Rope serves all layers of a model, as its tables are shared.
#pragma once
#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <numbers>
#include <string>
#include <vector>

#include "engine/ops.h"

namespace weft {

enum class RopeScaling : uint8_t {
  none,
  linear,   // positions / factor
  dynamic,  // NTK-aware: a larger base for a text longer than the original, by its length
  yarn,     // slow pairs are divided by factor, fast ones kept, with a ramp between (Peng et al., 2023)
};

struct RopeOptions {
  int64_t dim = 64;  // R: rotated columns, even
  double base = 10000;
  RopeScaling scaling = RopeScaling::none;
  double factor = 1;
  int64_t original_length = 0;             // dynamic, yarn: the length the model was made for
  double beta_fast = 32, beta_slow = 1;    // yarn: turns over the original length between which the ramp lies
  double mscale = 0, mscale_all_dim = 0;   // yarn: attention temperature; 0 means not given
};

// Attention's temperature under YaRN: 0.1 m ln(factor) + 1.
inline double yarn_mscale(double factor, double m) { return factor <= 1 ? 1 : 0.1 * m * std::log(factor) + 1; }

// What rotated queries and keys are multiplied by.
inline double rope_amplitude(const RopeOptions& o) {
  if (o.scaling != RopeScaling::yarn) return 1;
  if (o.mscale != 0 && o.mscale_all_dim != 0)
    return yarn_mscale(o.factor, o.mscale) / yarn_mscale(o.factor, o.mscale_all_dim);
  return yarn_mscale(o.factor, 1);
}

// The angle per position of each of the R/2 pairs, for texts of `length`.
inline std::vector<double> rope_frequencies(const RopeOptions& o, int64_t length) {
  const double r = static_cast<double>(o.dim);
  double base = o.base;
  if (o.scaling == RopeScaling::dynamic && length > o.original_length) {
    const double stretch = o.factor * length / o.original_length - (o.factor - 1);
    base *= std::pow(stretch, r / (r - 2));
  }
  // The pair that turns `turns` times over the original length, and the ramp between two such pairs.
  const auto pair_of = [&](double turns) {
    return r * std::log(o.original_length / (turns * 2 * std::numbers::pi)) / (2 * std::log(o.base));
  };
  const double low = o.scaling == RopeScaling::yarn ? std::max(std::floor(pair_of(o.beta_fast)), 0.0) : 0;
  double high = o.scaling == RopeScaling::yarn ? std::min(std::ceil(pair_of(o.beta_slow)), r - 1) : 1;
  if (low == high) high += 0.001;

  std::vector<double> frequencies;
  for (int64_t i = 0; i < o.dim / 2; ++i) {
    const double f = std::pow(base, -2.0 * i / r);
    const double slow = std::clamp((i - low) / (high - low), 0.0, 1.0);
    frequencies.push_back(o.scaling == RopeScaling::linear ? f / o.factor
                          : o.scaling == RopeScaling::yarn ? f * (1 - slow) + f / o.factor * slow
                                                           : f);
  }
  return frequencies;
}

class Rope {
 public:
  // A table for texts of up to `length`.
  Rope(const RopeOptions& options, int64_t length, Device device)
      : options_(options), length_(length), tables_(std::make_shared<std::map<int64_t, Tensor>>()) {
    tables_->emplace(length, make(length, device));
  }

  // Of a text of this length: what attention takes.
  const Tensor& angles(int64_t length) const {
    check(length <= length_, "a text of {} positions, where the rotary table has {}", length, length_);
    if (options_.scaling != RopeScaling::dynamic) return tables_->at(length_);
    auto table = tables_->find(length);
    if (table == tables_->end()) table = tables_->emplace(length, make(length, tables_->at(length_).device())).first;
    return table->second;
  }

 private:
  Tensor make(int64_t length, Device device) const {  // [T, R]: cos in even, sin in odd columns
    check(options_.dim >= 2 && options_.dim % 2 == 0, "rotary size must be even, found {}", options_.dim);
    const std::vector<double> frequencies = rope_frequencies(options_, length);
    const double amplitude = rope_amplitude(options_);
    std::vector<float> table;
    for (int64_t t = 0; t < length; ++t)
      for (const double f : frequencies) {
        table.push_back(static_cast<float>(amplitude * std::cos(t * f)));
        table.push_back(static_cast<float>(amplitude * std::sin(t * f)));
      }
    return Tensor::from(table, {length, options_.dim}, device);
  }

  RopeOptions options_;
  int64_t length_;
  std::shared_ptr<std::map<int64_t, Tensor>> tables_;  // by length, where the angles depend on it
};

}  // namespace weft
