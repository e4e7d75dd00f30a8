// Trains one configuration with one seed, evaluates it during and after, and says what it took.
#pragma once
#include "train/recipe.h"
#include "train/run_folder.h"

namespace weft {

// Trains `name` with `seed` as the recipe says and writes its points to folder's metrics.jsonl. The result is one
// element of results.json's runs; its "status" is "interrupted" when a stop was requested. Throws Fault::nonfinite
// naming the step and the first bad tensor; from a gradient that is not finite no update is applied.
Json train_run(const Recipe& recipe, const std::string& name, uint64_t seed, const Corpus& corpus, RunFolder& folder);

}  // namespace weft
