#include "train/step.h"

#include <cmath>

#if WEFT_CUDA
#include "engine/cuda/graph.h"
#endif

namespace weft {

// What is known of one step only when the device is through with it, and when it began on its parts.
struct TrainingStep::Record {
  explicit Record(const Recipe& r)
      : begin(r.device), backward_done(r.device), end(r.device),
        losses(r.accumulate * static_cast<int64_t>(sizeof(float)), r.device) {}
  StepResult known;
  Mark begin, backward_done, end;
  Staging losses;  // f32 [accumulate]
};

// Work that is the same in every step.
struct TrainingStep::Piece {
  bool ran = false;
#if WEFT_CUDA
  Graph graph;
#endif
};

TrainingStep::TrainingStep(const Transformer& model, const Params& params, const Recipe& recipe, uint64_t seed)
    : model_(model), params_(params), recipe_(recipe), seed_(seed), input_(recipe.batch, recipe.seq, recipe.device) {
  if (recipe.muon)
    muon_.emplace(params.of({Kind::matrix}), MuonOptions{.momentum = recipe.momentum, .compute = recipe.precision});
  adamw_.emplace(recipe.muon ? params.of({Kind::vector, Kind::embedding}) : params.all(),
                 AdamWOptions{.weight_decay = recipe.weight_decay});
  if (recipe.precision == DType::bf16)
    params.keep_copies(DType::bf16, recipe.accumulate == 1 ? GradientSums::as_given : GradientSums::own);
  if (recipe.graphs && recipe.device == Device::cuda) pool_ = std::make_unique<MemoryPool>(allocator(recipe.device));
  for (std::unique_ptr<Piece>* piece : {&first_, &later_, &update_}) *piece = std::make_unique<Piece>();
  const MemoryScope scope(Category::workspace, "step");
  loss_ = Tensor::zeros({}, DType::f32, recipe.device);
  for (int i = 0; i < kInFlight; ++i) records_.push_back(std::make_unique<Record>(recipe));
}
TrainingStep::~TrainingStep() = default;

// In the first step everything runs eagerly: what lasts comes into being, kernels are loaded and algorithms chosen.
void TrainingStep::run(Piece& piece, const std::function<void()>& work) {
#if WEFT_CUDA
  if (pool_ && step_ > 0 && piece.ran) {
    if (!piece.graph) {
      const MemoryPool::Use use(*pool_);
      piece.graph = Graph(work);
    }
    piece.graph.launch();
    return;
  }
#endif
  work();
  piece.ran = true;
}

void TrainingStep::forward_and_backward() {
  Rng rng(seed_, input_.step());
  const Loss loss = model_.loss(input_.tokens(), input_.targets(),
                                {.training = true, .rng = &rng, .compute = recipe_.precision});
  copy_into(loss_, loss.ce);
  backward(scale(loss.total, 1.0 / static_cast<double>(recipe_.accumulate)));
}

void TrainingStep::micro_batch(const Batch& batch) {
  check(updates_pending() < kInFlight, "the results of {} steps must be taken before another begins", kInFlight);
  check(micro_in_step_ < recipe_.accumulate, "a step has {} micro-batches, and this one began another",
        recipe_.accumulate);
  Record& record = *records_[static_cast<size_t>(step_ % kInFlight)];
  if (micro_in_step_ == 0) {
    record.known = StepResult{};
    record.known.step = step_;
    record.known.first_micro_step = micro_step_;
    record.begin.set();
  }
  input_.queue(batch, static_cast<uint64_t>(micro_step_));
  run(micro_in_step_ == 0 ? *first_ : *later_, [this] { forward_and_backward(); });
  queue_copy(record.losses.at<float>(micro_in_step_ * static_cast<int64_t>(sizeof(float))), loss_.raw(), sizeof(float),
             recipe_.device);
  ++micro_in_step_;
  ++micro_step_;
}

void TrainingStep::update(double rate_factor) {
  check(micro_in_step_ > 0, "an update without a micro-batch before it");
  Record& record = *records_[static_cast<size_t>(step_ % kInFlight)];
  record.backward_done.set();
  std::vector<Tensor> gradients;
  for (const Parameter& p : params_.list()) gradients.push_back(p.value.grad());
  const double norm = std::sqrt(squared_norm(gradients).item());
  for (int64_t i = 0; i < micro_in_step_; ++i)
    if (const float loss = record.losses.at<float>()[i]; !std::isfinite(loss))
      fail(Fault::nonfinite, "micro-step {}: the loss is {}; no update was applied from it",
           record.known.first_micro_step + i, loss);
  if (!std::isfinite(norm)) {
    for (const Parameter& p : params_.list())
      if (!std::isfinite(squared_norm({p.value.grad()}).item()))
        fail(Fault::nonfinite, "optimizer step {}: the gradient of {} is not finite; no update was applied from it",
             step_, p.name);
    fail(Fault::nonfinite, "optimizer step {}: the global gradient norm overflows; no update was applied from it",
         step_);
  }
  const double scale = std::min(1.0, recipe_.clip_norm / (norm + 1e-6));
  if (muon_) muon_->step(recipe_.muon_lr * rate_factor, scale);
  adamw_->step(recipe_.adamw_lr * rate_factor, scale);
  if (!pool_ || step_ == 0) params_.clear_grads();
  record.end.set();
  record.known.gradient_norm = norm;
  record.known.rate_factor = rate_factor;
  record.known.losses.resize(static_cast<size_t>(micro_in_step_));
  micro_in_step_ = 0;
  ++step_;
}

StepResult TrainingStep::take() {
  check(updates_pending() > 0, "every step's results were taken");
  Record& record = *records_[static_cast<size_t>(taken_++ % kInFlight)];
  record.end.wait();
  StepResult result = record.known;
  for (size_t i = 0; i < result.losses.size(); ++i) result.losses[i] = record.losses.at<float>()[i];
  result.micro_ms = record.backward_done.milliseconds_since(record.begin) / static_cast<double>(result.losses.size());
  result.update_ms = record.end.milliseconds_since(record.backward_done);
  return result;
}

}  // namespace weft
