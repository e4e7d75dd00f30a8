// Errors: what must hold, what was found and where. Every part of weft reports bad input by throwing Error;
// only a main() catches it, by run_program, prints it once and exits with its code.
#pragma once
#ifdef __CUDACC__
#define FMT_USE_CONSTEXPR 1  // fmt 9 turns constexpr off under nvcc and then breaks in C++20
#endif
#include <fmt/core.h>

#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>

namespace weft {

// What went wrong, by who can mend it. The value is the process's exit code.
enum class Fault {
  internal = 1,   // a bug in weft or in code that calls it
  usage = 2,      // the command line
  config = 3,     // a setting, or settings that contradict each other
  data = 4,       // an input file's content
  io = 5,         // reading or writing failed: permissions, disk full, no such file
  device = 6,     // no GPU, the wrong GPU, out of memory
  nonfinite = 7,  // training met a nan or an infinity
};

class Error : public std::runtime_error {
 public:
  Error(Fault fault, const std::string& what) : std::runtime_error(what), fault_(fault) {}
  Fault fault() const { return fault_; }
  int exit_code() const { return static_cast<int>(fault_); }

 private:
  Fault fault_;
};

// A format string that remembers who wrote it.
struct Located {
  fmt::string_view text;
  std::source_location where;
  constexpr Located(const char* text, std::source_location where = std::source_location::current())
      : text(text), where(where) {}
};

// The message of a failed check: the formatted text, then the file, line and function that checked.
[[noreturn]] void throw_failed_check(const Located& format, fmt::format_args args);
[[noreturn]] void throw_fault(Fault fault, fmt::string_view format, fmt::format_args args);

// Throws Fault::internal with the caller's place: for misuse of the engine's functions (shapes, dtypes, devices).
template <class... A>
void check(bool ok, const Located& format, const A&... args) {
  if (!ok) [[unlikely]] throw_failed_check(format, fmt::make_format_args(args...));
}

// Throws `fault` with the message alone: for what a user gave.
template <class... A>
[[noreturn]] void fail(Fault fault, const char* format, const A&... args) {
  throw_fault(fault, format, fmt::make_format_args(args...));
}

// The whole of a program `name`'s main(): the exit code is body's, or of what it threw, which is printed to stderr.
int run_program(const char* name, const std::function<int()>& body);

}  // namespace weft
