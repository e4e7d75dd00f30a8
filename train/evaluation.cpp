#include "train/evaluation.h"

#include "engine/allocator.h"
#include "engine/ops.h"

namespace weft {

BatchTensors to_device(const Batch& batch, Device device) {
  const MemoryScope scope(Category::data);
  return {Tensor::from(batch.tokens, {batch.batch, batch.seq}, device),
          Tensor::from(batch.targets, {batch.batch, batch.seq}, device)};
}

Evaluation evaluate(const Transformer& model, const Loader& loader, const Recipe& recipe) {
  const NoGrad no_grad;
  const int64_t batches = std::min(recipe.eval_batches, loader.validation_batches());
  int64_t tokens = 0;
  std::vector<Tensor> losses, hits;
  std::vector<std::vector<Routing>> routings;
  for (int64_t i = 0; i < batches; ++i) {
    const auto [ids, targets] = to_device(loader.validation(i), recipe.device);
    const Output output = model(ids, {.compute = recipe.precision});
    losses.push_back(cross_entropy(output.logits, targets));
    hits.push_back(count_correct(output.logits, targets));
    routings.push_back(output.routings);
    tokens += ids.numel();
  }
  Evaluation e;
  for (int64_t i = 0; i < batches; ++i) {
    e.loss += losses[i].item() / static_cast<double>(batches);
    e.accuracy += hits[i].item() / static_cast<double>(tokens);
    e.expert_load.resize(routings[i].size());
    for (size_t layer = 0; layer < routings[i].size(); ++layer) {
      const std::vector<int32_t> offsets = routings[i][layer].offsets.to_vector<int32_t>();
      std::vector<double>& load = e.expert_load[layer];
      load.resize(offsets.size() - 1);
      for (size_t x = 0; x < load.size(); ++x)
        load[x] += (offsets[x + 1] - offsets[x]) / static_cast<double>(offsets.back() * batches);
    }
  }
  return e;
}

}  // namespace weft
