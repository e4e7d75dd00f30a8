#include "train/progress.h"

#include <fmt/core.h>
#include <unistd.h>

#include <cstdio>
#include <utility>

namespace weft {
namespace {

std::string describe(const Progress::Point& p, double seconds_left) {
  return fmt::format("{}/{} | loss {:.4f} | {:.3g}k tok/s | MFU {} | {:.2f} GB | ETA {}:{:02d}", p.step, p.steps, p.loss,
                     p.tokens_per_second / 1e3, p.mfu ? fmt::format("{:.1f}%", 100 * *p.mfu) : "n/a", p.memory_gb,
                     static_cast<int64_t>(seconds_left) / 60, static_cast<int64_t>(seconds_left) % 60);
}

}  // namespace

Progress::Progress(std::string title) : title_(std::move(title)), terminal_(isatty(STDERR_FILENO) == 1) {}

Progress::~Progress() {
  if (drawn_) std::fputs("\n", stderr);
}

void Progress::update(const Point& point) {
  const auto now = Clock::now();
  const double elapsed = std::chrono::duration<double>(now - start_).count();
  const double left = point.step > 0 ? elapsed / point.step * (point.steps - point.step) : 0;
  if (terminal_) {
    constexpr int kCells = 24;
    const int full = point.steps > 0 ? static_cast<int>(kCells * point.step / point.steps) : kCells;
    std::fputs(fmt::format("\r\033[K{} [{}{}] {}", title_, std::string(full, '#'), std::string(kCells - full, '.'),
                           describe(point, left)).c_str(), stderr);
    std::fflush(stderr);
    drawn_ = true;
  } else if (now - last_line_ >= std::chrono::seconds(10)) {
    std::fputs((title_ + " " + describe(point, left) + "\n").c_str(), stderr);
    last_line_ = now;
  }
}

void Progress::say(const std::string& line) {
  std::fputs(((drawn_ ? "\r\033[K" : "") + title_ + " " + line + "\n").c_str(), stderr);
  drawn_ = false;
}

}  // namespace weft
