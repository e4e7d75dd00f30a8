#!/usr/bin/env bash
# Installs what is missing, builds everything (the CUDA side too wherever nvcc is, GPU or not) and runs every test.
# Arguments go to ctest, for example: tools/test.sh -L cpu
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if [ "$have_nvcc" = yes ]; then
  preset=cuda
  cmake --preset cuda -DCMAKE_CUDA_ARCHITECTURES="${gpu_arch:-90a}"
else
  preset=cpu
  cmake --preset cpu
fi
cmake --build "build/$preset"
ctest --test-dir "build/$preset" --output-on-failure "$@"
