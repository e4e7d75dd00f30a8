#include "train/algorithms.h"

#include <CLI/CLI.hpp>

#include "engine/algorithm_file.h"
#if WEFT_CUDA
#include "engine/cuda/blas.h"
#endif

namespace weft {
namespace {

Json applied{{"gemm_algorithms", nullptr}, {"gemm_cache", nullptr}};

}  // namespace

void AlgorithmOptions::add_to(CLI::App& app) {
  app.add_flag("--deterministic", deterministic,
               "matrix products take the library's first algorithm instead of the fastest timed one, so that a run can "
               "be repeated bit by bit");
  app.add_option("--gemm-cache", file,
                 "file that keeps the timed algorithms for the next run, or none (default: in the user's cache folder)")
      ->take_last();
}

void AlgorithmOptions::apply(Device device) const {
#if WEFT_CUDA
  if (device != Device::cuda) return;
  choose_algorithms(deterministic ? AlgorithmChoice::first : AlgorithmChoice::timed);
  std::string path = file.empty() ? default_algorithm_file(algorithm_machine()) : file;
  if (deterministic || file == "none") path.clear();
  keep_algorithms(path);
  applied["gemm_algorithms"] = deterministic ? "first" : "timed";
  applied["gemm_cache"] = path.empty() ? Json(nullptr) : Json(path);
#else
  (void)device;
#endif
}

Json algorithm_settings() { return applied; }

}  // namespace weft
