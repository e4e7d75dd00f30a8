// Loss and accuracy over validation batches, in evaluation mode: no dropout, no router noise, no balance loss.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "engine/allocator.h"
#include "model/transformer.h"
#include "train/recipe.h"

namespace weft {

struct Evaluation {
  double loss = 0;      // mean cross-entropy in nats per token
  double accuracy = 0;  // share of tokens whose largest logit is the target
  std::vector<std::vector<double>> expert_load;  // of each layer: the share of choices that went to each expert
  double perplexity() const { return std::exp(std::min(loss, 20.0)); }
};

// Over the first recipe.eval_batches validation batches, or all when there are fewer. It works in the pool's memory if
// one is given: that of captured training steps, which do not run meanwhile.
Evaluation evaluate(const Transformer& model, const Loader& loader, const Recipe& recipe, MemoryPool* pool = nullptr);

}  // namespace weft
