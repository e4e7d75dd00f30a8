// The main of every test program: doctest's, but cases that need a GPU exit with 77 (skipped) where there is none.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdio>
#include <cstring>

#include "engine/device.h"

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i)
    if (std::strcmp(argv[i], "--test-suite=cuda") == 0 && !weft::cuda_available()) {
      std::puts("SKIPPED: no usable GPU");
      return 77;
    }
  doctest::Context context(argc, argv);
  return context.run();
}
