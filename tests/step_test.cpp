// The training step by itself: captured as CUDA graphs it does what it does eagerly, bit for bit.
#include "train/step.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#if WEFT_CUDA
#include "engine/cuda/graph.h"
#include "engine/cuda/stream.h"
#endif

using namespace weft;

namespace {

Batch batch_of(const Recipe& recipe, int64_t vocabulary, uint64_t number) {
  Batch batch;
  batch.batch = recipe.batch, batch.seq = recipe.seq;
  for (uint64_t i = 0; i < static_cast<uint64_t>(recipe.batch * recipe.seq); ++i) {
    batch.tokens.push_back(static_cast<int32_t>(random_below({1, number}, i, static_cast<uint64_t>(vocabulary))));
    batch.targets.push_back(static_cast<int32_t>(random_below({2, number}, i, static_cast<uint64_t>(vocabulary))));
  }
  return batch;
}

struct Outcome {
  std::vector<double> losses, norms;
  std::vector<std::vector<float>> parameters;
  int64_t peak = 0, held = 0;
  bool operator==(const Outcome& o) const {
    return losses == o.losses && norms == o.norms && parameters == o.parameters;
  }
};

// `steps` optimizer steps of which the last has one micro-batch less where it can.
Outcome train(const Recipe& recipe, const std::string& name, int64_t steps) {
  CachingAllocator& memory = allocator(recipe.device);
  memory.release_cached();
  memory.reset_peaks();
  const Config config = recipe.config(name);
  Params params(recipe.precision);
  const Transformer model(config, Scope(params, recipe.device, 3));
  Outcome outcome;
  {
    TrainingStep step(model, params, recipe, 42);
    const auto take = [&] {
      const StepResult result = step.take();
      outcome.losses.insert(outcome.losses.end(), result.losses.begin(), result.losses.end());
      outcome.norms.push_back(result.gradient_norm);
    };
    uint64_t number = 0;
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t group = s + 1 == steps && recipe.accumulate > 1 ? recipe.accumulate - 1 : recipe.accumulate;
      for (int64_t i = 0; i < group; ++i) step.micro_batch(batch_of(recipe, config.vocab_size, number++));
      step.update(1.0 / static_cast<double>(s + 1));
      if (step.updates_pending() > 2) take();
    }
    while (step.updates_pending() > 0) take();
    outcome.held = memory.stats().held;
  }
  for (const Parameter& p : params.list()) outcome.parameters.push_back(master_value(p.value).to_vector<float>());
  outcome.peak = memory.stats().peak_allocated;
  return outcome;
}

Recipe tiny(Device device, DType precision, int64_t accumulate) {
  Recipe recipe = make_recipe("tiny", device);
  recipe.precision = precision;
  recipe.accumulate = accumulate;
  return recipe;
}

}  // namespace

TEST_CASE("results may be taken late, and say which step they are of") {
  const Recipe recipe = tiny(Device::cpu, DType::f32, 2);
  Params params;
  const Transformer model(recipe.config("baseline"), Scope(params, recipe.device, 3));
  TrainingStep step(model, params, recipe, 42);
  CHECK_THROWS_AS(step.update(1), Error);
  CHECK_THROWS_AS(step.take(), Error);
  const auto micro_batch = [&] { step.micro_batch(batch_of(recipe, recipe.model.vocab_size, 0)); };
  for (int s = 0; s < TrainingStep::kInFlight; ++s) {
    micro_batch(), micro_batch();
    CHECK_THROWS_AS(micro_batch(), Error);
    step.update(0.25 * s);
  }
  CHECK_THROWS_AS(micro_batch(), Error);
  for (int s = 0; s < TrainingStep::kInFlight; ++s) {
    const StepResult result = step.take();
    CHECK(result.step == s);
    CHECK(result.first_micro_step == 2 * s);
    CHECK(result.rate_factor == 0.25 * s);
    CHECK(result.losses.size() == 2);
    CHECK(result.gradient_norm > 0);
  }
}

namespace {

// One weight becomes infinite between two steps, and more steps are queued before the results of the first are taken.
void check_nothing_is_applied_from_infinity(Device device) {
  const Recipe recipe = tiny(device, DType::f32, 1);
  Params params;
  const Transformer model(recipe.config("baseline"), Scope(params, device, 3));
  TrainingStep step(model, params, recipe, 42);
  const auto one = [&](uint64_t number) {
    step.micro_batch(batch_of(recipe, recipe.model.vocab_size, number));
    step.update(1);
  };
  for (uint64_t s = 0; s < 3; ++s) {
    one(s);
    step.take();
  }
  const Parameter& last = *params.find("norm.weight");
  fill(last.value.rows(0, 1), std::numeric_limits<double>::infinity());
  const auto values = [&] {
    std::vector<std::vector<float>> all;
    for (const Parameter& p : params.list()) all.push_back(p.value.to_vector<float>());
    return all;
  };
  const auto before = values();
  one(3), one(4);
  try {
    step.take();
    FAIL("nothing was thrown");
  } catch (const Error& e) {
    CHECK(e.fault() == Fault::nonfinite);
    CAPTURE(e.what());
    CHECK(std::string(e.what()).find("micro-step 3: the loss is") != std::string::npos);
    CHECK(std::string(e.what()).find("no update was applied") != std::string::npos);
  }
  CHECK(values() == before);
}

}  // namespace

namespace {

// A step's micro-batches read their number where they draw: the same as keys that hold the number.
void check_masks_follow_the_number(Device device, DType precision) {
  for (const char* name : {"baseline", "lora", "enhanced"}) {
    CAPTURE(name);
    CAPTURE(name_of(precision));
    const Recipe recipe = tiny(device, precision, 3);
    const Config config = recipe.config(name);
    Params params(precision), other_params(precision);
    const Transformer model(config, Scope(params, device, 3)), other(config, Scope(other_params, device, 3));
    TrainingStep step(model, params, recipe, 42);
    for (uint64_t n = 0; n < 3; ++n) {
      const Batch batch = batch_of(recipe, config.vocab_size, 0);
      step.micro_batch(batch);
      Rng rng(42, n);
      const auto ids = [&](const std::vector<int32_t>& v) { return Tensor::from(v, {batch.batch, batch.seq}, device); };
      const Loss loss = other.loss(ids(batch.tokens), ids(batch.targets),
                                   {.training = true, .rng = &rng, .compute = precision});
      backward(scale(loss.total, 1.0 / 3));
    }
    for (size_t i = 0; i < params.list().size(); ++i) {
      CAPTURE(params.list()[i].name);
      CHECK(params.list()[i].value.grad().to_vector<float>() == other_params.list()[i].value.grad().to_vector<float>());
    }
  }
}

}  // namespace

TEST_CASE("a micro-batch's masks follow from its number") { check_masks_follow_the_number(Device::cpu, DType::f32); }

TEST_CASE("from what is not finite nothing is applied, nor from later steps") {
  check_nothing_is_applied_from_infinity(Device::cpu);
}

TEST_SUITE("cuda") {
  TEST_CASE("a micro-batch's masks follow from its number on the GPU") {
    for (const DType precision : {DType::f32, DType::bf16}) check_masks_follow_the_number(Device::cuda, precision);
  }
  TEST_CASE("from what is not finite nothing is applied, nor from later steps, captured") {
    check_nothing_is_applied_from_infinity(Device::cuda);
  }
  TEST_CASE("captured steps train as eager ones do, bit for bit") {
    for (const char* name : {"baseline", "lora", "enhanced"})
      for (const DType precision : {DType::f32, DType::bf16})
        for (const int64_t accumulate : {1, 3})
          for (const bool muon : {true, false}) {
            CAPTURE(name);
            CAPTURE(name_of(precision));
            CAPTURE(accumulate);
            CAPTURE(muon);
            Recipe recipe = tiny(Device::cuda, precision, accumulate);
            recipe.muon = muon;
            recipe.graphs = false;
            const Outcome eager = train(recipe, name, 6);
            recipe.graphs = true;
            const Outcome captured = train(recipe, name, 6);
            CHECK(captured.losses == eager.losses);
            CHECK(captured.norms == eager.norms);
            CHECK(captured.parameters == eager.parameters);
            CHECK(eager.losses[0] != eager.losses[1]);
            CHECK(eager.held == 0);
            CHECK(captured.held > 0);
            CHECK(captured.peak == eager.peak);
          }
    CHECK(allocator(Device::cuda).stats().held == 0);
  }
#if WEFT_CUDA
  TEST_CASE("work that waits for the device cannot be captured, and the error says which call waited") {
    const Tensor x = Tensor::zeros({4}, DType::f32, Device::cuda);
    try {
      const Graph graph([&] {
        fill(x, 1);
        (void)x.to_vector<float>();
      });
      FAIL("nothing was thrown");
    } catch (const Error& e) {
      CHECK(e.fault() == Fault::device);
      CHECK(std::string(e.what()).find("recorded as a CUDA graph") != std::string::npos);
      CHECK(std::string(e.what()).find("cudaStreamSynchronize") != std::string::npos);
    }
    fill(x, 2);  // the stream is as before
    CHECK(x.to_vector<float>() == std::vector<float>(4, 2));
  }
#endif
}
