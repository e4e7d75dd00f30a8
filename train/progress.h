// What a person sees while a run trains: one bar that redraws itself on a terminal, plain lines elsewhere.
#pragma once
#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

namespace weft {

class Progress {
 public:
  struct Point {
    int64_t step = 0, steps = 0;  // micro-steps
    double loss = 0;
    double tokens_per_second = 0;
    std::optional<double> mfu;  // of the device's peak rate, where that is known
    double memory_gb = 0;
  };

  explicit Progress(std::string title);
  ~Progress();
  // On a terminal redraws the bar; elsewhere prints a line at most every ten seconds.
  void update(const Point& point);
  // Prints a line that stays.
  void say(const std::string& line);

 private:
  using Clock = std::chrono::steady_clock;
  std::string title_;
  bool terminal_, drawn_ = false;
  Clock::time_point start_ = Clock::now(), last_line_ = start_;
};

}  // namespace weft
