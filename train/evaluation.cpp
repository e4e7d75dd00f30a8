#include "train/evaluation.h"

#include "engine/ops.h"
#include "train/batch_input.h"

namespace weft {

namespace {

Evaluation evaluate_batches(const Transformer& model, const Loader& loader, const Recipe& recipe) {
  const NoGrad no_grad;
  const int64_t batches = std::min(recipe.eval_batches, loader.validation_batches());
  int64_t tokens = 0;
  std::vector<Tensor> losses, hits;
  std::vector<std::vector<Tensor>> offsets;  // of each batch's layers: where each expert's choices begin
  BatchInput input(recipe.batch, recipe.seq, recipe.device);
  for (int64_t i = 0; i < batches; ++i) {  // nothing here waits for the device
    input.queue(loader.validation(i), 0);
    const Evaluated evaluated = model.evaluate(input.tokens(), input.targets(), recipe.precision);
    losses.push_back(evaluated.loss);
    hits.push_back(evaluated.correct);
    for (std::vector<Tensor>& layers = offsets.emplace_back(); const Routing& r : evaluated.routings)
      layers.push_back(r.offsets);
    tokens += input.tokens().numel();
  }
  Evaluation e;
  for (int64_t i = 0; i < batches; ++i) {
    e.loss += losses[i].item() / static_cast<double>(batches);
    e.accuracy += hits[i].item() / static_cast<double>(tokens);
    e.expert_load.resize(offsets[i].size());
    for (size_t layer = 0; layer < offsets[i].size(); ++layer) {
      const std::vector<int32_t> begins = offsets[i][layer].to_vector<int32_t>();
      std::vector<double>& load = e.expert_load[layer];
      load.resize(begins.size() - 1);
      for (size_t x = 0; x < load.size(); ++x)
        load[x] += (begins[x + 1] - begins[x]) / static_cast<double>(begins.back() * batches);
    }
  }
  return e;
}

}  // namespace

Evaluation evaluate(const Transformer& model, const Loader& loader, const Recipe& recipe, MemoryPool* pool) {
  if (!pool) return evaluate_batches(model, loader, recipe);
  const int64_t blocks = pool->live_blocks();
  Evaluation e;
  {
    const MemoryPool::Use use(*pool);
    e = evaluate_batches(model, loader, recipe);
  }
  check(pool->live_blocks() == blocks, "an evaluation leaves nothing in memory that training steps overwrite, found {}",
        pool->live_blocks() - blocks);
  return e;
}

}  // namespace weft
