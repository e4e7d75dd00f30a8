// One optimizer step of training: the forward and backward passes of its micro-batches, the gradient's norm and
// clipping, and the update. The host only queues the work, and takes each step's results after it has queued the next.
// On a GPU a step is captured as CUDA graphs: each of its pieces runs eagerly once, is then recorded and from there on
// launched as a whole. Used by the trainer and bench_step.
//
//   TrainingStep step(model, params, recipe, seed);
//   step.micro_batch(batch);   // recipe.accumulate times, or fewer
//   step.update(rate_factor);
//   const StepResult result = step.take();  // waits for the oldest update not taken
#pragma once
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "engine/allocator.h"
#include "engine/optim/adamw.h"
#include "engine/optim/clip.h"
#include "engine/optim/muon.h"
#include "engine/queue.h"
#include "model/transformer.h"
#include "train/batch_input.h"
#include "train/recipe.h"

namespace weft {

struct StepResult {
  int64_t step = 0, first_micro_step = 0;  // numbers, from 0
  std::vector<double> losses;              // cross-entropy of each micro-batch
  double gradient_norm = 0;                // before clipping
  double rate_factor = 0;
  double micro_ms = 0;                     // forward and backward of one micro-batch, the mean of the step's
  double update_ms = 0;                    // norm, clipping and update
};

class TrainingStep {
 public:
  // Muon for matrices and AdamW for the rest, or AdamW for all, as the recipe says. Micro-batches are counted from 0:
  // with the seed, a micro-batch's number gives its random masks.
  TrainingStep(const Transformer& model, const Params& params, const Recipe& recipe, uint64_t seed);

  ~TrainingStep();
  // Queues forward and backward; the gradients add up until the update.
  void micro_batch(const Batch& batch);
  // Queues the norm, clipping and the update, with the recipe's learning rates times `rate_factor`.
  void update(double rate_factor);

  int64_t updates_pending() const { return step_ - taken_; }  // queued and not taken: at most kInFlight
  static constexpr int kInFlight = 4;
  // Waits for the oldest of them. Throws Fault::nonfinite naming the step and what was not finite. Where that is a
  // gradient, its update was not applied, nor any later one.
  StepResult take();

  // The memory of the captured work, where there is some. Between updates other work may run in it.
  MemoryPool* pool() { return pool_.get(); }

 private:
  struct Record;
  struct Piece;
  void run(Piece& piece, const std::function<void()>& work);
  void forward_and_backward();

  const Transformer& model_;
  const Params& params_;
  Recipe recipe_;
  uint64_t seed_;
  GradientClip clip_;
  std::optional<Muon> muon_;
  std::optional<AdamW> adamw_;
  BatchInput input_;
  Tensor loss_;  // f32 []: of the micro-batch that ran last
  std::unique_ptr<MemoryPool> pool_;  // before the pieces that run in it
  std::unique_ptr<Piece> first_, later_, update_;  // micro-batches that write the gradients and that add to them
  std::vector<std::unique_ptr<Record>> records_;  // step n's is at n % kInFlight
  int64_t step_ = 0, micro_step_ = 0, micro_in_step_ = 0, taken_ = 0;  // of the next to be queued; of the next to be taken
};

}  // namespace weft
