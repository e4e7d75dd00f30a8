// The table of learning-rate schedules: a factor for optimizer step s, counted from 0.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <string>
#include <string_view>

#include "engine/check.h"

namespace weft {

// How long a training is.
struct Course {
  int64_t micro_steps;
  int64_t optimizer_steps;
};

struct ScheduleRow {
  std::string_view name, summary;
  double (*factor)(int64_t s, const Course& course);
};

namespace schedules {

// From 1 at the end of warm-up to 0.1 at `end`.
inline double cosine(int64_t s, int64_t warm, int64_t end) {
  const double done = std::clamp(static_cast<double>(s - warm) / std::max<int64_t>(end - warm, 1), 0.0, 1.0);
  return 0.1 + 0.9 * 0.5 * (1 + std::cos(std::numbers::pi * done));
}
inline int64_t warm_steps(int64_t steps) { return std::max<int64_t>(steps / 20, 1); }

inline double seed(int64_t s, const Course& c) {
  const int64_t warm = warm_steps(c.micro_steps);
  return s < warm ? static_cast<double>(s) / warm : cosine(s, warm, c.micro_steps);
}
inline double strict(int64_t s, const Course& c) {
  const int64_t warm = warm_steps(c.optimizer_steps);
  return s < warm ? static_cast<double>(s + 1) / warm : cosine(s, warm, c.optimizer_steps);
}

}  // namespace schedules

inline constexpr ScheduleRow kSchedules[] = {
    {"seed", "warm-up from 0 and cosine, counted in micro-batches though only optimizer steps happen", schedules::seed},
    {"strict", "warm-up and cosine over the optimizer steps that happen", schedules::strict},
};

inline const ScheduleRow& schedule(std::string_view name) {
  for (const ScheduleRow& row : kSchedules)
    if (row.name == name) return row;
  fail(Fault::config, "unknown schedule '{}'; there are seed, strict", name);
}

}  // namespace weft
