// The main of every test program: doctest's, but cases that need a GPU exit with 77 (skipped) where there is none
// and are passed over where not named, and a word on the command line runs the test case of that name.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdio>
#include <cstring>

#include "engine/device.h"
#include "tests/arguments.h"

namespace {
std::vector<std::string> arguments;
}  // namespace

const std::vector<std::string>& test_arguments() { return arguments; }

int main(int argc, char** argv) {
  doctest::Context context;
  bool needs_gpu = false;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--test-suite=cuda") == 0) needs_gpu = true;
    if (argv[i][0] != '-') arguments.emplace_back(argv[i]);
  }
  if (!arguments.empty() && arguments[0] == "cuda") needs_gpu = true;  // op_test's case of that name
  if (needs_gpu && !weft::cuda_available()) {
    std::puts("SKIPPED: no usable GPU");
    return 77;
  }
  if (!weft::cuda_available()) context.addFilter("test-suite-exclude", "cuda");
  context.applyCommandLine(argc, argv);
  if (!arguments.empty()) {
    context.setOption("test-case", arguments[0].c_str());
    context.setOption("no-skip", true);
  }
  return context.run();
}
