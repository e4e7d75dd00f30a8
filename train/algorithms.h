// How matrix products on the GPU choose their algorithms: the options of train_exp1 and bench_step, and what env.json says
// of them.
#pragma once
#include <string>

#include "engine/device.h"
#include "train/run_folder.h"

namespace CLI {
class App;
}

namespace weft {

struct AlgorithmOptions {
  bool deterministic = false;  // the library's first choice: the same in every process, so a run repeats bit by bit
  std::string file;            // of the choices timed before; "": in the user's cache folder, "none": nowhere

  void add_to(CLI::App& app);
  void apply(Device device) const;  // before the first product
};

// {"gemm_algorithms": "timed" or "first", "gemm_cache": the file or null} as they were last applied.
Json algorithm_settings();

}  // namespace weft
