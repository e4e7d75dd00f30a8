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
        losses(r.accumulate * static_cast<int64_t>(sizeof(float)), r.device), state(sizeof(UpdateState), r.device) {}
  StepResult known;
  Mark begin, backward_done, end;
  Staging losses;  // f32 [accumulate]
  Staging state;   // an UpdateState
};

// Work that is the same in every step.
struct TrainingStep::Piece {
  bool ran = false;
#if WEFT_CUDA
  Graph graph;
  bool captured() const { return static_cast<bool>(graph); }
#else
  bool captured() const { return false; }
#endif
};

TrainingStep::TrainingStep(const Transformer& model, const Params& params, const Recipe& recipe, uint64_t seed)
    : model_(model), params_(params), recipe_(recipe), seed_(seed), clip_(params.all(), recipe.clip_norm),
      input_(recipe.batch, recipe.seq, recipe.device) {
  if (recipe.muon)
    muon_.emplace(params.of({Kind::matrix}), MuonOptions{.momentum = recipe.momentum, .compute = recipe.precision});
  adamw_.emplace(recipe.muon ? params.of({Kind::vector, Kind::embedding}) : params.all(),
                 AdamWOptions{.weight_decay = recipe.weight_decay});
  check(params.compute() == recipe.precision, "parameters made for {} were to be trained in {}",
        name_of(params.compute()), name_of(recipe.precision));
  params.sum_gradients(recipe.accumulate == 1 ? GradientSums::as_given : GradientSums::own);
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
      try {
        piece.graph = Graph(work);
      } catch (const Error& e) {
        fail(e.fault(), "{} (--set graphs=0 trains without CUDA graphs)", e.what());
      }
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
  clip_.set_rate_factor(rate_factor);
  run(*update_, [this] {
    clip_.measure();
    if (muon_) muon_->step(recipe_.muon_lr, clip_.state());
    adamw_->step(recipe_.adamw_lr, clip_.state());
  });
  queue_copy(record.state.at(), clip_.state(), sizeof(UpdateState), recipe_.device);
  record.end.set();
  // While a step is being captured its pieces find each other's gradients. After that they know where those are, and
  // between steps an evaluation may have the memory.
  const bool captured = first_->captured() && update_->captured() && (recipe_.accumulate == 1 || later_->captured());
  if (!pool_ || step_ == 0 || captured) params_.clear_grads();
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
  const UpdateState& state = *record.state.at<UpdateState>();
  const char* const kept = state.finite ? "its gradient is finite" : "no update was applied from it";
  for (size_t i = 0; i < result.losses.size(); ++i) {
    result.losses[i] = record.losses.at<float>()[i];
    if (!std::isfinite(result.losses[i]))
      fail(Fault::nonfinite, "micro-step {}: the loss is {}; {}", result.first_micro_step + static_cast<int64_t>(i),
           result.losses[i], kept);
  }
  if (!state.finite)
    fail(Fault::nonfinite, "optimizer step {}: the gradient of {} is not finite, or its squares are not; {}",
         result.step, params_.list()[static_cast<size_t>(state.parameter)].name, kept);
  result.gradient_norm = state.norm;
  result.micro_ms = record.backward_done.milliseconds_since(record.begin) / static_cast<double>(result.losses.size());
  result.update_ms = record.end.milliseconds_since(record.backward_done);
  return result;
}

}  // namespace weft
