#!/usr/bin/env bash
# From a clean clone to the comparison report: installs what is missing, builds, trains the three configurations on the
# built-in corpus and prints the report. With an NVIDIA GPU and nvcc it trains a short exp1 on the GPU, else the quick
# preset on the CPU. Arguments go to train_exp1, for example: tools/quickstart.sh --seeds 42,43
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if [ -n "$gpu_arch" ] && [ "$have_nvcc" = yes ]; then
  cmake --preset cuda -DCMAKE_CUDA_ARCHITECTURES="$gpu_arch" -DBUILD_TESTING=OFF
  build=build/cuda
  preset=(--preset exp1 --device cuda)
else
  cmake --preset cpu -DBUILD_TESTING=OFF
  build=build/cpu
  preset=(--preset quick --device cpu)
fi
cmake --build "$build" --target train_exp1 report

out=runs/quickstart-$(date +%Y%m%d-%H%M%S)
"$build/train_exp1" "${preset[@]}" --memory-report --out "$out" "$@"
"$build/report" "$out"
echo "The report is $out/report.md"
